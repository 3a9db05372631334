"""From sound files to batches of labelled clips and their log-mel filterbanks."""

from pruneattn.data.catalog import DATASETS, DatasetInfo, load_dataset
from pruneattn.data.clips import Clip, ClipDataset
from pruneattn.data.decode import find_audio, load_audio
from pruneattn.data.fbank import FeatureConfig, FeatureExtractor
from pruneattn.data.loader import Batch, collate, make_loader

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
