"""What a model carries next to its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..data.fbank import FeatureConfig


@dataclass
class Description:
    """How to use a model's input and output. ``PrunedViT.description`` holds one; a new model's is empty.

    Attributes:
        features: how waveforms become the model's input; None if unknown.
        labels: name of each class in the order of the logits; None if unknown.
        multilabel: whether several classes can hold at once (sigmoid) or exactly one holds (softmax); None if unknown.
        extra: further plain values that were saved with the weights, such as the metric.
    """

    features: FeatureConfig | None = None
    labels: list[str] | None = None
    multilabel: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
