import contextlib
from pathlib import Path

import pytest
import torch

from pruneattn.ops.backend import _C, DEVICES, use_backend, why_not

CUDA = torch.cuda.is_available()
#: Instruction sets of the CPU's attention kernels on this machine, best first.
ISAS = _C.cpu_isas() if _C else []


def on_cuda(param):
    return pytest.param(param, marks=pytest.mark.device)


def usable(backend, device):
    """Whether the backend runs on this device type on this machine."""
    return (device == "cpu" or CUDA) and not why_not(backend) and DEVICES.get(backend, device) == device


def place_params(backend, device):
    """The parameter "<backend>-on-<device>", or none if this machine cannot use the pair."""
    if not usable(backend, device):
        return []
    name = f"{backend}-on-{device}"
    if device == "cuda":
        return [on_cuda(name)]
    return [pytest.param(name, marks=pytest.mark.interpreted) if backend == "triton" else name]


# Quick tests run the best instruction set of this machine, slow tests run all other sets. All share one source.
CPU_KERNELS = [pytest.param(isa, marks=[pytest.mark.slow] if isa != ISAS[0] else []) for isa in ISAS]
TRITON = place_params("triton", "cpu") + place_params("triton", "cuda")
REFERENCES = place_params("reference", "cpu") + place_params("reference", "cuda")
CUDA_KERNELS = place_params("cuda", "cuda")


@contextlib.contextmanager
def place_of(name, use_isa):
    """The device of "<backend>-on-<device>", or of an instruction set of the CPU, with the backend forced on it."""
    backend, _, device = name.partition("-on-")
    with contextlib.nullcontext() if device else use_isa(backend), use_backend(backend if device else "cpu"):
        yield torch.device(device or "cpu")


@pytest.fixture(params=REFERENCES + place_params("cpu", "cpu") + CUDA_KERNELS)
def device(request):
    """A device with one backend forced on it, for ops without Triton kernels or instruction sets of the CPU."""
    with place_of(request.param, None) as device:
        yield device


@pytest.fixture(params=REFERENCES + CPU_KERNELS + TRITON + CUDA_KERNELS)
def place(request, use_isa):
    """A device with one backend forced on it, for the attention ops: the CPU kernels run once per instruction set.

    Where there is no GPU, the Triton kernels run in Triton's interpreter on the CPU.
    """
    with place_of(request.param, use_isa) as device:
        yield device


@pytest.fixture(params=REFERENCES + CPU_KERNELS)
def place_without_triton(request, use_isa):
    """As ``place``, for ops without a Triton or CUDA kernel."""
    with place_of(request.param, use_isa) as device:
        yield device


@pytest.fixture(params=CPU_KERNELS + TRITON)
def kernels(request, use_isa):
    """As ``place``, for properties that only our attention kernels have, not PyTorch's."""
    with place_of(request.param, use_isa) as device:
        yield device


@pytest.fixture(params=CPU_KERNELS)
def cpu_kernels(request, use_isa):
    """The CPU with its kernels forced, once per instruction set."""
    with place_of(request.param, use_isa) as device:
        yield device


@pytest.fixture
def interpreted(request):
    """Whether Triton's interpreter runs the kernels. It takes some 20 ms per program, so tests run fewer cases."""
    return "triton-on-cpu" in request.node.name


@pytest.fixture(params=["cpu", *([on_cuda("cuda")] if CUDA else [])])
def any_device(request):
    """A device with its best backend, for properties that do not depend on the kernel."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cases(load_file):
    """Inputs and exact results for the attention ops: attention_cases.py next to this file."""
    return load_file(Path(__file__).with_name("attention_cases.py"))
