"""Device and process group: a single process, or several that torchrun starts, and their collective operations."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import UserError

T = TypeVar("T")

# Group for values that Python gathers. A gloo thread releases such a value some time after the operation. If that
# happens after the interpreter has shut down, the process aborts. The threads end with their group, but DDP keeps the
# default group alive forever, so these values need a separate group (torch 2.11).
_values: dist.ProcessGroup | None = None


def start(name: str) -> torch.device:
    """Choose the device of this process, and join the process group that torchrun announces, if any.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N". Under torchrun, "auto" and "cuda" select the GPU of the local rank.

    Returns:
        The device of this process.

    Raises:
        UserError: the device does not exist, or torchrun is set up so that processes would hang after a restart.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", name):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch finds no GPU on this machine; use --device cpu")
        if name == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: {device} does not exist; torch finds {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _check_restarts()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        global _values
        _values = dist.new_group(backend="gloo")
    return device


def _check_restarts() -> None:
    # By default, torchrun uses one store for all restarts, and the store does not record to which start an address
    # belongs (torch 2.11).
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "torchrun --max-restarts: after a restart, processes can find addresses of the previous start and wait for "
            "them until a timeout: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"
        )


def finish() -> None:
    """Leave the process group, if any."""
    global _values
    if dist.is_initialized():
        _values = None
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process in the group; 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group; 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def gather_numbers(values: Sequence[float]) -> list[list[float]]:
    """Gather a list of numbers from every process.

    Args:
        values: numbers of this process; every process passes equally many.

    Returns:
        The lists of all processes in the order of their ranks, identical in every process.
    """
    if world_size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = mine.new_empty(world_size(), len(values))
    dist.all_gather(list(everyone.unbind()), mine, group=_values)
    return everyone.tolist()


def gather_objects(value: T) -> list[T]:
    """Gather a picklable value from every process: a list in the order of the ranks, equal in every process."""
    if world_size() == 1:
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value, group=_values)
    return values


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        dist.barrier()
