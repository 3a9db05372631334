"""Token pruning in a custom model, a stack of PyTorch's nn.TransformerEncoderLayer, with a custom score.

    python python/prune_own_backbone.py --keep-rate 0.5

`EncoderLayerView` describes the parts of a block. `find` finds the blocks of a model. `ValueScore` ranks the patches.
"""

import argparse
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import pruneattn
from pruneattn import UserError, ops
from pruneattn.adapters import BlockView, Trunk, register_family
from pruneattn.adapters.checks import expect_parts
from pruneattn.report import markdown_lines
from pruneattn.runtime.timing import interleaved_rounds


class SpectrogramEncoder(nn.Module):
    """Logits ``[B, num_classes]`` of spectrograms ``[B, frames, 128]``, from a class token and PyTorch's encoder."""

    def __init__(self, dim=384, depth=12, heads=6, frames=1024, num_classes=50, norm_first=True):
        super().__init__()
        self.patches = nn.Conv2d(1, dim, kernel_size=16, stride=16)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + frames // 16 * 8, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, 4 * dim, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, fbank):
        x = self.patches(fbank.unsqueeze(1)).flatten(2).transpose(1, 2)  # [B, P, C]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.positions  # [B, 1 + P, C]
        return self.head(self.encoder(x)[:, 0])


class EncoderLayerView(BlockView):
    """The parts of an nn.TransformerEncoderLayer, with norms before (norm_first) or after attention and MLP."""

    arguments = ("src_mask", "src_key_padding_mask", "is_causal")

    @classmethod
    def check(cls, block, path):
        parts = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2")
        expect_parts(block, path, parts)
        expect_parts(block.self_attn, f"{path}.self_attn", ("in_proj_weight", "out_proj"), ("in_proj_bias",))
        if not block.self_attn.batch_first:
            raise UserError(f"{path}.self_attn: pruning needs tokens as [B, N, C]: create it with batch_first=True")

    @property
    def dim(self):
        return self.block.self_attn.embed_dim

    @property
    def num_heads(self):
        return self.block.self_attn.num_heads

    @property
    def dropout(self):
        attention = self.block.self_attn
        return attention.dropout if attention.training else 0.0

    def norm(self, x):
        return self.block.norm1(x) if self.block.norm_first else x

    def project(self, x, parts):
        attention, start = self.block.self_attn, "qkv".index(parts) * self.dim
        rows = slice(start, start + len(parts) * self.dim)
        bias = attention.in_proj_bias
        return self.split_heads(F.linear(x, attention.in_proj_weight[rows], None if bias is None else bias[rows]))

    def finish(self, x, attended):
        block = self.block
        x = x + block.dropout1(block.self_attn.out_proj(attended))
        if block.norm_first:
            return x + self.mlp(block.norm2(x))
        x = block.norm1(x)
        return block.norm2(x + self.mlp(x))

    def mlp(self, x):
        block = self.block
        return block.dropout2(block.linear2(block.dropout(block.activation(block.linear1(x)))))


@register_family
def find(model):
    if not isinstance(model, SpectrogramEncoder):
        return None
    return Trunk(model.encoder.layers, "encoder.layers", EncoderLayerView, extra_tokens=1, class_token=True)


class ValueScore(pruneattn.Pruning):
    """The class token's attention to a patch, times the norm of the patch's value vectors.

    The score reads one query and all keys and values, so dropped patches need no query.
    """

    parts = ("q", "kv")

    def __call__(self, attn, x, y, keep, extra, values):
        k, v = attn.project(y, "kv")  # [B, H, N, D] each
        (q_cls,) = attn.project(y[:, :1], "q")  # [B, H, 1, D]
        norms = v[:, :, extra:].float().norm(dim=-1).mean(1)  # [B, N - extra]
        scores = (ops.cls_scores(q_cls.squeeze(2), k, extra) * norms).detach()
        return self.select_then_query(attn, x, y, scores, k, v, keep, extra)

    def attention_macs(self, tokens, kept, dim):
        return dim**2 + tokens * dim + 2 * tokens * dim**2 + 2 * kept * dim**2 + 2 * kept * tokens * dim


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep-rate", type=float, default=0.5, help="keep-rate of blocks 3, 6 and 9 (default: 0.5)")
    parser.add_argument("--frames", type=int, default=1024, help="frames of 10 ms (default: 1024)")
    parser.add_argument("--batch-size", type=int, default=4, help="spectrograms per call (default: 4)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing (default: 9)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    fbank = torch.randn(args.batch_size, args.frames, 128)
    variants = {}
    for name, score in (
        ("unpruned", None),
        ("class token's attention", "cls"),
        ("times length of value", ValueScore()),
    ):
        torch.manual_seed(0)
        model = SpectrogramEncoder(frames=args.frames).eval()
        if score is not None:
            pruneattn.prune(model, keep_rate=args.keep_rate, score=score)
        variants[name] = torch.inference_mode()(lambda model=model: model(fbank))
    seconds = {name: median(rounds) for name, rounds in interleaved_rounds(variants, "cpu", args.rounds).items()}
    rows = [{"score": name, "ms": 1000 * s, "saving": 1 - s / seconds["unpruned"]} for name, s in seconds.items()]
    columns = [("score", "score", str), ("ms per call", "ms", "{:.0f}".format), ("saving", "saving", "{:.1%}".format)]
    print("\n".join(markdown_lines(columns, rows)))


if __name__ == "__main__":
    main()
