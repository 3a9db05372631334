"""One process, or several started by torchrun: the few collective operations that training and evaluation need."""

import os
import re

import torch
import torch.distributed as dist

from ..errors import UserError

# Group of the values that Python gathers. A thread of gloo lets go of them some time after the operation; where that is
# after the interpreter's end, the process aborts. The threads end with their group, and DDP keeps the default one for
# ever, so that these values have a group of their own (torch 2.11).
_values = None


def start(name):
    """Join the group that torchrun announces in the environment, if any; returns this process's device.

    ``name`` is "auto", "cpu", "cuda" or "cuda:N"; under torchrun each process takes the GPU of its local rank. Raises
    `UserError` for a device that is not there, and for a torchrun whose restarts would hang.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[1-9]?\d)?", name):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no GPU here; use --device cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there is no {device}; torch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized():
        _check_restarts()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        global _values
        _values = dist.new_group(backend="gloo")
    return device


def _check_restarts():
    # One store serves all starts of such a torchrun, and nothing in it says of which start an address is (torch 2.11).
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0:
        raise UserError(
            "torchrun --max-restarts: after a restart the processes can find addresses of those before, and wait for "
            "them until a timeout: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is called"
        )


def finish():
    """Leave the group."""
    global _values
    if dist.is_initialized():
        _values = None
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    """True in the one process that writes files and prints."""
    return rank() == 0


def gather_numbers(values):
    """A list of numbers from every process, in the order of their ranks, the same floats in each of them."""
    if world_size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = mine.new_empty(world_size(), len(values))
    dist.all_gather(list(everyone.unbind()), mine, group=_values)
    return everyone.tolist()


def gather_objects(value):
    """The picklable value of every process, in the order of their ranks, in each of them."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group=_values)
    return values


def barrier():
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
