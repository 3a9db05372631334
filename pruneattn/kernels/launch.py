"""How a kernel is launched: its arguments by name, and the tile sizes for the GPU at hand."""

import functools
import json
from importlib import resources
from typing import NamedTuple

import torch

from .tiles import block_channels, last_rows, split, tiled

#: What the kernels compute in; other dtypes, and larger heads, run the reference.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_CHANNELS = 128
#: The tile size by which each kernel shares out its rows among programs.
SHARED_OUT = {
    "attention": "BLOCK_M",
    "column_sums": "BLOCK_N",
    "grad_queries": "BLOCK_M",
    "grad_keys": "BLOCK_N",
    "cls_weights": "BLOCK_M",
}


class Config(NamedTuple):
    """Tile sizes: ``BLOCK_M`` queries by ``BLOCK_N`` keys, warps of a program, and tiles that are on their way at once."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A kernel with its grid, its arguments by name, in their order, and its `Config`."""

    kernel: object
    grid: tuple
    arguments: dict
    config: Config

    def run(self, tensor):
        """Launch it where ``tensor`` is, on the current stream there."""
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
        if compiled is not None:  # as it is for the interpreter
            _compiled[key] = compiled


# What a call compiled, by all that Triton specializes a kernel for: its own look-up is half of what a launch takes.
_compiled = {}
_HIP = torch.version.hip is not None  # where Triton takes offsets of 32 bits in tensors of up to 2 GiB


def _kind(value):
    """What a compiled kernel depends on of an argument that is no int: of those, it may be the value."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16, _HIP and value.untyped_storage().size() >= 2**31
    return float if value.__class__ is float else value


@functools.lru_cache(1024)
def tiles_of(channels, count, block, steps, step):
    """Constants of a kernel whose programs share out ``count`` rows by ``block`` and go through ``steps`` by ``step``."""
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


def takes(q):
    """Whether the kernels take such queries, keys and values ``[.., D]``."""
    return q.dtype in DTYPES and q.shape[-1] <= MOST_CHANNELS


def strided(**tensors):
    """Arguments of a kernel for tensors ``[B, H, N, D]`` with contiguous channels: pointer, strides of clip, head, row."""
    arguments = {}
    for name, tensor in tensors.items():
        arguments[name] = tensor
        arguments[f"{name}_batch"], arguments[f"{name}_head"], arguments[f"{name}_row"], _ = tensor.stride()
    return arguments


def choose(kernel, tensor, count):
    """The tile sizes of a kernel for heads ``[B, H, .., D]`` on their device, whose programs share out ``count`` rows."""
    batch, heads, *_, channels = tensor.shape
    return _choose(kernel, tensor.device if tensor.is_cuda else None, tensor.dtype, channels, batch * heads, count)


@functools.lru_cache(1024)
def _choose(kernel, device, dtype, channels, heads, count):
    architecture, processors = (architecture_of(device), _processors(device)) if device else (None, 0)
    config = config_for(kernel, architecture, dtype, block_channels(channels))
    return fit(config, SHARED_OUT[kernel], heads, count, processors)


def fit(config, block, heads, count, processors):
    """The config, or one with smaller programs where these leave less of their tiles empty, or multiprocessors idle.

    Args:
        config: `Config`.
        block: name of the tile size by which ``count`` rows (queries or keys) are shared out.
        heads: of all clips together.
        processors: multiprocessors of the GPU.
    """
    large, small = getattr(config, block), 64
    idle = heads * -(-count // large) < processors
    if large > small and (idle or tiled(count, small) < tiled(count, large)):
        return config._replace(num_warps=4, **{block: small})
    return config


def config_for(kernel, architecture, dtype, channels):
    """The measured tile sizes (configs.json, written by ``python -m tools.tune``), or else a guess that compiles well."""
    measured = _table().get(architecture, {}).get(kernel, {}).get(f"{str(dtype)[6:]}, {channels}")
    return Config(*measured) if measured else fallback(kernel, dtype, channels)


def fallback(kernel, dtype, channels):
    """Tile sizes for a GPU that was not measured: no spilled registers, and less than 100 KB of shared memory."""
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
def _table():
    return json.loads((resources.files(__package__) / "configs.json").read_text(encoding="utf-8"))


@functools.cache
def architecture_of(device):
    """Name of a GPU's architecture: sm_90, gfx942."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _processors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count
