"""Direct implementation of a pruned ViT of another library, in float64, as a reference for the package.

Every row is computed to the end, the whole softmax matrix is computed, and patches are dropped after the attention's
residual add. The implementation shares no code with the package.

A model's weights come as a list of blocks, each a dictionary with the names below.
"""

import math
import re
from fractions import Fraction

import torch
import torch.nn.functional as F

# Our name of a part: its names within a block in timm, in the AST of later versions of transformers 5, in the AST of
# transformers 4, and in Whisper.
TIMM = {"norm1": "norm1", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
LAYERS = {
    "norm1": "layernorm_before",
    "q": "attention.q_proj",
    "k": "attention.k_proj",
    "v": "attention.v_proj",
    "proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
ENCODER = {
    "norm1": "layernorm_before",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
WHISPER = {
    "norm1": "self_attn_layer_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "proj": "self_attn.out_proj",
    "norm2": "final_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
}


def blocks_of(model):
    """List of dictionaries of the parameters of a model's blocks, ``"q.weight"`` and so on; ``ls1`` and ``ls2`` are
    1 where the model has no layer scale, ``q_norm.weight`` is absent where queries are not normalized. A layer without
    bias has the bias 0.
    """
    parameters = dict(model.named_parameters())
    found = [re.match(r"(.*?(blocks|layers|layer))\.(\d+)\.", name) for name in parameters]
    prefix = next(match[1] for match in found if match)
    depth = 1 + max(int(match[3]) for match in found if match)
    names = {"blocks": TIMM, "layers": LAYERS, "layer": ENCODER}[prefix.split(".")[-1]]
    names = WHISPER if any(".self_attn." in name for name in parameters) else names
    blocks = []
    for i in range(depth):
        own = {name.removeprefix(f"{prefix}.{i}."): p for name, p in parameters.items() if f"{prefix}.{i}." in name}
        block = {}
        for kind in ("weight", "bias"):
            block |= {f"{ours}.{kind}": own.get(f"{theirs}.{kind}", 0.0) for ours, theirs in names.items()}
            if names is TIMM:
                for part, rows in zip("qkv", own[f"attn.qkv.{kind}"].chunk(3), strict=True):
                    block[f"{part}.{kind}"] = rows
                for part in "qk":
                    if f"attn.{part}_norm.{kind}" in own:
                        block[f"{part}_norm.{kind}"] = own[f"attn.{part}_norm.{kind}"]
        block["ls1"], block["ls2"] = own.get("ls1.gamma", 1.0), own.get("ls2.gamma", 1.0)
        blocks.append(block)
    return blocks


def layer_norm(x, weights, name, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x, weights, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def drop_path(x, rate):
    return x if rate == 0 else x * x.new_empty(len(x), 1, 1).bernoulli_(1 - rate) / (1 - rate)


def best(scores, keep):
    """Positions of the ``keep`` best scores of each row, ascending; ties go to the lower position."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda place: (-row[place], place))
        rows.append(sorted(order[:keep]))
    return torch.tensor(rows)


def take(x, index):
    return torch.stack([row[places] for row, places in zip(x, index, strict=True)])


def run(x, blocks, *, heads, extra, score, rates, eps, attn_drop=0.0, drop=0.0, hidden_drop=0.0, drop_paths=None):
    """Tokens before the first block and after each block, and the kept positions of each pruning block.

    ``x``: tokens that enter the first block. ``rates``: keep-rate by block. The rates of dropout apply
    to the softmax matrix (``attn_drop``), to the outputs of attention and MLP (``drop``) and within the MLP
    (``hidden_drop``). ``drop_paths``: rate of stochastic depth by block.
    """
    tokens, kept = [x], []
    for i, block in enumerate(blocks):
        path = 0.0 if drop_paths is None else drop_paths[i]
        y = layer_norm(x, block, "norm1", eps)
        q, k, v = (torch.stack(linear(y, block, part).chunk(heads, -1), 1) for part in "qkv")  # [B, H, N, D]
        if "q_norm.weight" in block:
            q, k = layer_norm(q, block, "q_norm", eps), layer_norm(k, block, "k_norm", eps)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)  # [B, H, N, N]
        if i in rates:
            if score == "column_mean":
                scores = weights.mean(1)[:, extra:, extra:].mean(1)
            elif score == "cls":
                scores = weights.mean(1)[:, 0, extra:]
            else:
                scores = score(q, k, v, extra)
            index = best(scores, math.ceil(Fraction(str(rates[i])) * (x.shape[1] - extra)))
            kept.append(index)
            rows = torch.cat([torch.arange(extra).expand(len(x), -1), index + extra], 1)
            x = take(x, rows)
            weights = take(weights.transpose(1, 2), rows).transpose(1, 2)
        weights = F.dropout(weights.contiguous(), attn_drop)
        out = torch.cat((weights @ v).unbind(1), -1)
        y = F.dropout(linear(out, block, "proj"), drop)
        x = x + drop_path(y * block["ls1"], path)
        y = F.dropout(gelu(linear(layer_norm(x, block, "norm2", eps), block, "fc1")), hidden_drop)
        y = F.dropout(linear(y, block, "fc2"), drop)
        x = x + drop_path(y * block["ls2"], path)
        tokens.append(x)
    return tokens, kept
