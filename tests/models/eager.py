"""Direct implementation of the paper's method, in float64, as a reference for the package.

Every row is computed to the end, the whole softmax matrix is computed, and patches are dropped after the attention's
residual add. The implementation shares no code with the package.
"""

import math
from fractions import Fraction

import torch

# Extra tokens, whether tokens run along time first or along mel first, and the score of the paper.
AUDIOMAE = {"extra": 1, "time_major": True, "score": "column_mean"}
AST = {"extra": 2, "time_major": False, "score": "cls"}


def layer_norm(x, state, name, eps):
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def cut_patches(fbank, time_major, stride):
    """List of ``[B, 16 x 16]`` patches in token order: a patch of AudioMAE is (time, mel), one of AST (mel, time)."""
    columns, rows = range(0, fbank.shape[1] - 15, stride[1]), range(0, fbank.shape[2] - 15, stride[0])

    def patch(column, row):
        return fbank[:, column : column + 16, row : row + 16]

    if time_major:
        return [patch(column, row).flatten(1) for column in columns for row in rows]
    return [patch(column, row).transpose(1, 2).flatten(1) for row in rows for column in columns]


def best(scores, keep):
    """Positions of the ``keep`` best scores of each row, ascending; ties go to the lower position."""
    rows = []
    for row in scores.tolist():
        order = sorted(range(len(row)), key=lambda place: (-row[place], place))
        rows.append(sorted(order[:keep]))
    return torch.tensor(rows, device=scores.device)


def take(x, index):
    return torch.stack([row[places] for row, places in zip(x, index, strict=True)])


def run(state, fbank, kind, *, heads, keep_rates, prune_blocks=(3, 6, 9), score=None, patches=None, stride=(16, 16)):
    """Logits, kept patch numbers per pruning block and scores per pruning block.

    ``state``: name to tensor, from ``state_dict()``; ``kind``: AUDIOMAE or AST;
    ``stride``: mel bins and frames from one patch to the next.
    """
    extra, score = kind["extra"], score or kind["score"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    cells = torch.stack(cut_patches(fbank, kind["time_major"], stride), 1)  # [B, P, 256]
    values = {"intensity": cells.mean(-1), "variation": cells.std(-1, correction=0)}.get(score)
    x = cells @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = x + state["pos_embed"][:, extra:]
    numbers = torch.arange(x.shape[1]).expand(x.shape[0], -1)
    if patches is not None:
        x, numbers = take(x, patches), patches
        values = values if values is None else take(values, patches)
    tokens = [state["cls_token"]] + ([state["dist_token"]] if extra == 2 else [])
    tokens = torch.cat(tokens, 1) + state["pos_embed"][:, :extra]
    x = torch.cat([tokens.expand(len(x), -1, -1), x], 1)

    kept, scores = [], []
    rates = dict(zip(prune_blocks, keep_rates, strict=True))
    for i in range(depth):
        y = layer_norm(x, state, f"blocks.{i}.norm1", 1e-6)
        q, k, v = linear(y, state, f"blocks.{i}.attn.qkv").chunk(3, -1)
        q, k, v = (torch.stack(part.chunk(heads, -1), 1) for part in (q, k, v))  # [B, H, N, D]
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)  # [B, H, N, N]
        out = torch.cat((weights @ v).unbind(1), -1)
        x = x + linear(out, state, f"blocks.{i}.attn.proj")
        if i in rates:
            if score == "column_mean":
                block_scores = weights.mean(1)[:, extra:, extra:].mean(1)
            elif score == "cls":
                block_scores = weights.mean(1)[:, 0, extra:]
            elif callable(score):
                block_scores = score(q, k, v, extra)
            else:
                block_scores = values
            keep = math.ceil(Fraction(str(rates[i])) * (x.shape[1] - extra))
            index = best(block_scores, keep)
            x = torch.cat([x[:, :extra], take(x[:, extra:], index)], 1)
            numbers = take(numbers, index)
            values = values if values is None else take(values, index)
            kept.append(numbers)
            scores.append(block_scores)
        y = layer_norm(x, state, f"blocks.{i}.norm2", 1e-6)
        x = x + linear(gelu(linear(y, state, f"blocks.{i}.mlp.fc1")), state, f"blocks.{i}.mlp.fc2")

    if kind is AUDIOMAE:
        feature = layer_norm(x[:, 1:].mean(1), state, "fc_norm", 1e-6)
    else:
        x = layer_norm(x, state, "norm", 1e-6)
        feature = layer_norm((x[:, 0] + x[:, 1]) / 2, state, "head_norm", 1e-5)
    return linear(feature, state, "head"), kept, scores
