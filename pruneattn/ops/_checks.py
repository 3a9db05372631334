"""Argument checks shared by the ops. Each error names the argument, the expected value and the given value."""

from __future__ import annotations

from collections.abc import Sequence

import torch

ATTENTION_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shape(name: str, tensor: torch.Tensor, letters: Sequence[str], expected: Sequence[int] | None = None) -> None:
    """Check that the tensor has one dimension per letter and, if ``expected`` is given, these sizes."""
    shape = tensor.shape
    if len(shape) != len(letters) or (expected is not None and shape != expected):
        layout = f"[{', '.join(letters)}]" + ("" if expected is None else f" = {list(expected)}")
        raise ValueError(f"{name}: expected shape {layout}, got {list(shape)}")


def check_not_empty(name: str, tensor: torch.Tensor, letters: Sequence[str]) -> None:
    """Check that no dimension except the batch, which comes first, is empty."""
    if tensor.numel() == 0 and 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: expected [{', '.join(letters)}] empty in B at most, got {list(tensor.shape)}")


def check_like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that the tensor has the dtype and the device of another tensor."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype}, the dtype of {other_name}, got {tensor.dtype}")
    check_device(name, tensor, other_name, other)


def check_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Check that the tensor is on the device of another tensor."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device}, the device of {other_name}, got {tensor.device}")


def check_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Check that the tensor has one of the allowed dtypes."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def check_extra_tokens(extra_tokens: int, tokens: int) -> None:
    """Check that at least one of the tokens is a patch."""
    if not 0 <= extra_tokens < tokens:
        raise ValueError(f"extra_tokens: expected 0 to {tokens - 1} of {tokens} tokens, got {extra_tokens}")


def check_keep(keep: int, patches: int) -> None:
    """Check that the number of kept patches is between one and all of them."""
    if not 1 <= keep <= patches:
        raise ValueError(f"keep: expected 1 to {patches} of {patches} patches, got {keep}")
