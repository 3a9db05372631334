"""Linear layers of a base vision transformer with 8-bit weights, against oneDNN in the dtype of the case."""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.harness.op_cases import DIM, op_providers, random_tokens
from pruneattn.models.optimize import PackedLinear, can_pack
from pruneattn.ops import int8_linear
from pruneattn.ops.int8_linear import pack_int8_weight, quantize_rows

LEVELS, OP = ("op",), "int8_linear"

#: Largest error of a float layer as a replacement of the 8-bit layer, relative to the largest value.
QUANTIZATION = 0.1


class Layer(NamedTuple):
    """Input and output channels, and the steps after the product."""

    channels: int
    out: int
    gelu: bool = False
    residual: bool = False


#: Layers of a block; None is the first layer of the MLP.
LAYERS = {
    None: Layer(DIM, 4 * DIM, gelu=True),
    "second layer of the MLP": Layer(4 * DIM, DIM, residual=True),
    "projection to q, k, v": Layer(DIM, 3 * DIM),
}


def eager(weight, bias, x, _weight, _scale, _bias, residual, gelu):
    y = F.linear(x, weight, bias)
    y = F.gelu(y) if gelu else y
    return y if residual is None else residual + y


def packed(linear, x, _weight, _scale, _bias, residual, gelu):
    if residual is not None:
        return linear.add(x, residual)
    return linear.gelu(x) if gelu else linear(x)


def providers(case):
    rows = []
    for part, layer in LAYERS.items():
        x = random_tokens(case)  # [B, N, 768]
        residual = x if layer.residual else None
        x = x.repeat(1, 1, layer.channels // DIM)
        weight = torch.randn(layer.out, layer.channels, device=case.device) / layer.channels**0.5
        bias = torch.randn(layer.out, device=case.device)
        q, scale = quantize_rows(weight)
        plain = weight.to(case.torch_dtype), bias.to(case.torch_dtype)
        alternatives = {"eager": partial(eager, *plain)}
        if can_pack(plain[0]):
            alternatives["oneDNN, packed"] = partial(packed, PackedLinear(*plain))
        arguments = (x, pack_int8_weight(q), scale, bias, residual, layer.gelu)
        macs = x.numel() * layer.out
        found = op_providers(case, int8_linear, alternatives, *arguments, macs=macs, tolerance=QUANTIZATION)
        rows += [row._replace(part=part) for row in found]
    return rows


def test_int8_linear(measure, case):
    measure(case, providers(case))
