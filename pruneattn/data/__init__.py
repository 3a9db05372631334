"""Audio files, datasets, batches of labeled clips, and log-mel features."""

from __future__ import annotations

from .catalog import DATASETS, DatasetInfo, load_dataset
from .clips import Clip, ClipDataset
from .decode import load_audio
from .fbank import FeatureConfig, FeatureExtractor
from .loader import Batch, collate, make_loader
from .search import find_audio

__all__ = [
    "DATASETS",
    "Batch",
    "Clip",
    "ClipDataset",
    "DatasetInfo",
    "FeatureConfig",
    "FeatureExtractor",
    "collate",
    "find_audio",
    "load_audio",
    "load_dataset",
    "make_loader",
]
