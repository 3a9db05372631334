import contextlib
from pathlib import Path

import pytest
import torch

from pruneattn.ops.backend import DEVICES, use_backend, why_not


def on_cuda(param):
    return pytest.param(param, marks=pytest.mark.device)


PLACES = [
    ("reference", "cpu"),
    ("cpu", "cpu"),
    ("triton", "cpu"),
    on_cuda(("reference", "cuda")),
    on_cuda(("cuda", "cuda")),
    on_cuda(("triton", "cuda")),
]


@contextlib.contextmanager
def forced(backend, device):
    """A device, with the backend forced on it; skips where one of them is missing."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if why_not(backend):
        pytest.skip(why_not(backend))
    if DEVICES.get(backend, device) != device:
        pytest.skip(f"{backend} runs on {DEVICES[backend]} here")
    with use_backend(backend):
        yield torch.device(device)


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-on-{place[1]}")
def device(request):
    """A device, with one backend forced on it; each test runs once per pair that is usable here."""
    with forced(*request.param) as device:
        yield device


@pytest.fixture
def cpu_kernels(isa):
    """The CPU, with its kernels forced; each test runs once per instruction set."""
    with forced("cpu", "cpu") as device:
        yield device


ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]
TRITON = ["triton-on-cpu", on_cuda("triton-on-cuda")]


@pytest.fixture(params=["reference-on-cpu", *ISAS, *TRITON, on_cuda("reference-on-cuda"), on_cuda("cuda-on-cuda")])
def place(request, use_isa):
    """As ``device``, for the attention ops: the CPU's kernels run once per instruction set. Triton's run on a GPU, or in
    its interpreter on the CPU where there is none."""
    with place_of(request.param, use_isa) as device:
        yield device


@pytest.fixture(params=[*ISAS, *TRITON])
def kernels(request, use_isa):
    """As ``place``, for what our attention kernels promise and PyTorch's do not."""
    with place_of(request.param, use_isa) as device:
        yield device


@contextlib.contextmanager
def place_of(name, use_isa):
    """The device of "<backend>-on-<device>", or of an instruction set of the CPU, with the backend forced on it."""
    backend, _, device = name.partition("-on-")
    with contextlib.nullcontext() if device else use_isa(backend):
        with forced(backend if device else "cpu", device or "cpu") as device:
            yield device


@pytest.fixture
def interpreted(request):
    """Whether Triton's interpreter runs the kernels: some 20 ms a program, so that tests do less of the same."""
    return DEVICES["triton"] == "cpu" and "triton-on-cpu" in request.node.name


@pytest.fixture(params=["cpu", on_cuda("cuda")])
def any_device(request):
    """A device, with the backend that is best there: for what does not depend on the kernel."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cases(load_file):
    """Inputs and exact results for the attention ops: attention_cases.py beside this file."""
    return load_file(Path(__file__).with_name("attention_cases.py"))
