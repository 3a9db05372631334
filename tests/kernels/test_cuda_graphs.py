"""On a CUDA device, a pruned model runs in one CUDA graph and never waits for the device."""

from contextlib import nullcontext

import pytest
import torch

import pruneattn
from pruneattn import use_backend

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("backend", ["triton", None])
@pytest.mark.parametrize("name", ["audiomae_tiny", "ast_tiny"])
def test_pruned_forward(name, backend):
    torch.manual_seed(0)
    model = pruneattn.create_model(name, num_classes=4, keep_rate=0.7).cuda().half().eval()
    fbank = torch.randn(2, 1024, 128, device="cuda", dtype=torch.half)
    with torch.inference_mode(), use_backend(backend) if backend else nullcontext():
        expected = model(fbank)  # compiles the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(fbank)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        static, graph = torch.zeros_like(fbank), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(static)
        static.copy_(fbank)
        graph.replay()
        torch.testing.assert_close(out, expected)


def test_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    q, k, v = torch.randn(3, 1, 2, 65, 64, device="cuda:1", dtype=torch.half).unbind(0)
    out, scores = pruneattn.ops.column_mean_attention(q, k, v, 1)
    with use_backend("reference"):
        expected, expected_scores = pruneattn.ops.column_mean_attention(q, k, v, 1)
    assert out.device == q.device
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(scores, expected_scores)
