"""Data that a model carries in addition to its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, overload

from ..data.fbank import FeatureConfig


@dataclass
class Description:
    """Description of a model's input and output. ``PrunedViT.description`` is empty for a new model.

    Attributes:
        features: conversion of waveforms to the model's input; None if unknown.
        labels: name of each class in the order of the logits; None if unknown.
        multilabel: True if a clip can have several classes (sigmoid), False if it has exactly one (softmax); None if
            unknown.
        extra: further plain values saved with the weights, for example the metric.
    """

    features: FeatureConfig | None = None
    labels: list[str] | None = None
    multilabel: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)


class _Described(Protocol):
    description: Description


_Value = TypeVar("_Value")


class DescriptionField(Generic[_Value]):
    """Descriptor: an attribute of a model that reads and sets the field of the same name of ``model.description``."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, model: None, owner: type) -> DescriptionField[_Value]: ...

    @overload
    def __get__(self, model: _Described, owner: type) -> _Value: ...

    def __get__(self, model: _Described | None, owner: type) -> DescriptionField[_Value] | _Value:
        return self if model is None else getattr(model.description, self.name)

    def __set__(self, model: _Described, value: _Value) -> None:
        setattr(model.description, self.name, value)
