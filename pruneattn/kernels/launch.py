"""Kernel launches: arguments by name, and tile sizes for the current GPU."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch

from .tiles import block_channels, last_rows, split, tiled

#: Dtypes of the kernels. The reference runs other dtypes, and heads with more channels.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_CHANNELS = 128
#: The tile size that divides the rows of each kernel among programs.
SHARED_OUT = {
    "attention": "BLOCK_M",
    "column_sums": "BLOCK_N",
    "grad_queries": "BLOCK_M",
    "grad_keys": "BLOCK_N",
    "cls_weights": "BLOCK_M",
}


class Config(NamedTuple):
    """Tile sizes (``BLOCK_M`` queries by ``BLOCK_N`` keys), warps per program, and stages of software pipelining."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A kernel with its grid, its arguments by name in the order of the kernel, and its :class:`Config`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config

    def run(self, tensor: torch.Tensor) -> None:
        """Launch the kernel on the current stream of the device of ``tensor``."""
        if self.grid[0] == 0:
            return
        values = self.arguments.values()
        kinds = [value if value.__class__ is int else _kind(value) for value in values]
        key = (self.kernel.fn, tensor.get_device(), self.config, *kinds)
        compiled = _compiled.get(key)
        with torch.cuda.device_of(tensor):  # no-op for the interpreter's CPU tensors
            if compiled is not None:
                compiled[(*self.grid, 1, 1)](*values)
                return
            options = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
            compiled = self.kernel[self.grid](*values, **options)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled


# Compiled kernels by everything that Triton specializes them for. Triton's own lookup takes half of the launch time.
_compiled: dict[tuple, Any] = {}
_HIP = torch.version.hip is not None  # Triton uses 32-bit offsets for tensors of up to 2 GiB there


def _kind(value: Any) -> Any:
    """Return the properties that Triton specializes a kernel for, of an argument that is not an int."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16, _HIP and value.untyped_storage().size() >= 2**31
    return float if value.__class__ is float else value


@functools.lru_cache(1024)
def tiles_of(channels: int, count: int, block: int, steps: int, step: int) -> dict[str, int | bool]:
    """Return the constants of a kernel: tiles of ``block`` of ``count`` rows, and a loop over ``steps`` by ``step``."""
    apart, masked = split(steps, step)
    return {
        "D": channels,
        "C": block_channels(channels),
        "BLOCK": block,
        "LAST": last_rows(count, block),
        "STEP": step,
        "APART": apart,
        "MASKED": masked,
    }


def takes(q: torch.Tensor) -> bool:
    """Return whether the kernels support the dtype and channels of these queries or keys ``[..., D]``."""
    return q.dtype in DTYPES and q.shape[-1] <= MOST_CHANNELS


def strided(**tensors: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Return kernel arguments for tensors ``[B, H, N, D]``: each tensor, and its strides over clips, heads and rows."""
    arguments: dict[str, torch.Tensor | int] = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        arguments[f"{name}_batch"], arguments[f"{name}_head"], arguments[f"{name}_row"], _ = tensor.stride()
    return arguments


def choose(kernel: str, tensor: torch.Tensor, count: int) -> Config:
    """Return the tile sizes of a kernel for ``tensor`` ``[B, H, ..., D]`` that divides ``count`` rows by programs."""
    batch, heads, *_, channels = tensor.shape
    return _choose(kernel, tensor.device if tensor.is_cuda else None, tensor.dtype, channels, batch * heads, count)


@functools.lru_cache(1024)
def _choose(
    kernel: str, device: torch.device | None, dtype: torch.dtype, channels: int, heads: int, count: int
) -> Config:
    architecture, processors = (architecture_of(device), _processors(device)) if device else (None, 0)
    config = config_for(kernel, architecture, dtype, block_channels(channels))
    return fit(config, SHARED_OUT[kernel], heads, count, processors)


def fit(config: Config, block: str, heads: int, count: int, processors: int) -> Config:
    """Return ``config``, with smaller tiles if large tiles would be partly empty or leave multiprocessors idle.

    Args:
        config: Tile sizes.
        block: Name of the tile size that divides the rows.
        heads: Number of heads of all clips.
        count: Number of rows (queries or keys) to divide.
        processors: Number of multiprocessors of the GPU.
    """
    large, small = getattr(config, block), 64
    idle = heads * -(-count // large) < processors
    if large > small and (idle or tiled(count, small) < tiled(count, large)):
        return config._replace(num_warps=4, **{block: small})
    return config


def config_for(kernel: str, architecture: str | None, dtype: torch.dtype, channels: int) -> Config:
    """Return the tile sizes from configs.json (``python -m tools.tune`` measures them), or else those of `fallback`."""
    measured = _table().get(architecture or "", {}).get(kernel, {}).get(f"{str(dtype)[6:]}, {channels}")
    return Config(*measured) if measured else fallback(kernel, dtype, channels)


def fallback(kernel: str, dtype: torch.dtype, channels: int) -> Config:
    """Return tile sizes for a GPU without measurements: no spilled registers, less than 100 KB of shared memory."""
    if dtype == torch.float32:
        return (_FLOAT32 if channels <= 64 else _FLOAT32_WIDE)[kernel]
    return (_HALF if channels <= 64 else _HALF_WIDE)[kernel]


_FLOAT32 = dict.fromkeys(SHARED_OUT, Config(32, 32, 4, 1)) | {"cls_weights": Config(1, 64, 4, 1)}
_FLOAT32_WIDE = dict.fromkeys(SHARED_OUT, Config(32, 16, 8, 1)) | {"cls_weights": Config(1, 64, 4, 1)}
_HALF = {
    "attention": Config(128, 64, 4, 3),
    "column_sums": Config(64, 128, 4, 3),
    "grad_queries": Config(64, 64, 4, 2),
    "grad_keys": Config(64, 64, 4, 2),
    "cls_weights": Config(1, 128, 4, 3),
}
_HALF_WIDE = {
    "attention": Config(128, 64, 8, 2),
    "column_sums": Config(64, 128, 8, 2),
    "grad_queries": Config(64, 64, 8, 1),
    "grad_keys": Config(64, 64, 8, 1),
    "cls_weights": Config(1, 64, 4, 3),
}


@functools.cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads((resources.files(__package__) / "configs.json").read_text(encoding="utf-8"))


@functools.cache
def architecture_of(device: torch.device) -> str:
    """Return the name of a GPU's architecture, for example sm_90 or gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
