import contextlib
import importlib.util
import os
import warnings
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's interpreter runs the Triton kernels on the CPU. Triton chooses it at import time.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def load(path):
    """Import a Python file that is in no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    load(Path(__file__).with_name("triton_interpreter.py")).mend()


def cuda_allocations():
    """Number of memory allocations of this process on a CUDA device."""
    return torch.cuda.memory_stats().get("allocation.all.allocated", 0) if torch.cuda.is_initialized() else 0


@pytest.fixture(autouse=True)
def marked(request):
    """Warn about tests that use a CUDA device without the mark ``device``, which `make gpu` would not run."""
    before = cuda_allocations()
    yield
    if cuda_allocations() > before and request.node.get_closest_marker("device") is None:
        warnings.warn(f"{request.node.nodeid} uses a CUDA device: mark it with pytest.mark.device", stacklevel=1)


@pytest.fixture(scope="session")
def real_audio():
    """Folder with the real labeled audio (``esc10/``, ``speech_commands_ar/``); skips if there is none."""
    candidates = [os.environ.get("PRUNEATTN_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    for folder in candidates:
        if folder and (Path(folder) / "esc10").is_dir():
            return Path(folder)
    pytest.skip("no real audio: set PRUNEATTN_DATA to the folder that holds esc10/ and speech_commands_ar/")


@pytest.fixture(scope="session")
def load_file():
    """``load_file(path)``: a Python file that is in no package, as a module."""
    return load


@pytest.fixture
def use_isa():
    """``with use_isa(name):`` makes the CPU's attention kernels use that instruction set; skips if the CPU lacks it."""
    compiled = pytest.importorskip("pruneattn._C", reason="pruneattn._C is not built: pip install -e .")

    @contextlib.contextmanager
    def use(name):
        if name not in compiled.cpu_isas():
            pytest.skip(f"no {name} on this machine")
        previous = compiled.cpu_isa()
        compiled.cpu_use_isa(name)
        try:
            yield
        finally:
            compiled.cpu_use_isa(previous)

    return use


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16"])
def isa(request, use_isa):
    """Each instruction set of the CPU's attention kernels."""
    with use_isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def make_model():
    """``make_model(family, ...)``: a small model with weights large enough that attention is far from uniform."""

    from pruneattn.models import create_model  # after TRITON_INTERPRET is set

    def make(family, seed=0, **arguments):
        arguments = {"embed_dim": 24, "depth": 10, "num_heads": 3, "num_classes": 5, "frames": 128} | arguments
        torch.manual_seed(seed)
        model = create_model(f"{family}_tiny", **arguments).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                else:
                    parameter.normal_(std=1.0 if name.endswith(("token", "pos_embed")) else 0.3)
        return model

    return make
