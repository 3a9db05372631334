"""Inputs of the attention ops in all benchmarks."""

import torch

_CASES = [("cpu", batch, dtype) for dtype in (torch.float32, torch.bfloat16) for batch in (1, 8)]
_CASES.append(("cuda", 64, torch.bfloat16))

#: For ``pytest.mark.parametrize``: device, batch and dtype, in place of the fixtures of these names.
ATTENTION_CASES = {
    "argnames": "device, batch, dtype",
    "argvalues": _CASES,
    "ids": [f"{device}-{batch}-{dtype}".replace("torch.", "") for device, batch, dtype in _CASES],
}


def tolerance(dtype):
    """How far an alternative may be from the reference."""
    return dict.fromkeys(("rtol", "atol"), 1e-5 if dtype == torch.float32 else 2e-2)


def random_qkv(batch, tokens, device, dtype, heads=12):
    """q, k, v ``[B, H, N, 64]`` as views of one tensor, as a model's projection makes them."""
    packed = torch.randn(batch, tokens, 3, heads, 64, device=device, dtype=dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)
