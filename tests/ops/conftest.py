import pytest
import torch

from pruneattn.backend import use_backend, why_not

PLACES = [("reference", "cpu"), ("cpu", "cpu"), ("reference", "cuda"), ("cuda", "cuda")]


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-on-{place[1]}")
def device(request):
    """A device, with one backend forced on it; each test runs once per pair that is usable here."""
    backend, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if why_not(backend):
        pytest.skip(why_not(backend))
    with use_backend(backend):
        yield torch.device(device)


@pytest.fixture(params=["cpu", "cuda"])
def any_device(request):
    """A device, with the backend that is best there: for ops whose reference is all there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
