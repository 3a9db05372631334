"""Alternatives to our models with the same weights: the paper's method in plain PyTorch, other libraries' models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config as inductor

from bench.harness.machine import version
from bench.harness.op_peers import softmax_matrix
from pruneattn.checkpoints.converters import AST_HUGGING_FACE_MODULES
from pruneattn.constants import MEL_BINS, PATCH
from pruneattn.models import PrunedViT
from pruneattn.models.blocks import MLP_RATIO, kept_patches
from pruneattn.models.macs import block_macs

#: Names of the providers in the result files. They do not change, so that results remain comparable.
PAPER, SEPARATE_SCORE = "the paper's way", "SDPA, separate score"


class PapersAttention(nn.Module):
    """Attention of published implementations: the whole softmax matrix, which also gives the score."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, scored_queries: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output ``[B, N, C]`` and the rows `scored_queries` of the softmax matrix ``[B, H, .., N]``."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D]
        out, weights = self.attend(q, k, v, scored_queries)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim)), weights

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scored_queries: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = softmax_matrix(q, k)
        return weights @ v, weights[:, :, scored_queries]


class SeparateScoreAttention(PapersAttention):
    """PyTorch's fused attention, then a second product of scored queries and keys for the score."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scored_queries: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return F.scaled_dot_product_attention(q, k, v), softmax_matrix(q[:, :, scored_queries], k)


class PapersBlock(nn.Module):
    """A block that drops patches after the attention's residual addition, so that it also computes the dropped rows."""

    def __init__(
        self, dim: int, heads: int, extra: int, score: str, keep_rate: float, attention: type[PapersAttention]
    ):
        super().__init__()
        self.extra, self.score, self.keep_rate = extra, score, keep_rate
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, MLP_RATIO * dim), "fc2": nn.Linear(MLP_RATIO * dim, dim)})

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the remaining tokens, and the positions ``[B, keep]`` of the kept patches, best first (None: all)."""
        attended, weights = self.attn(self.norm1(x), self.scored_queries())
        x = x + attended
        index = None
        if self.keep_rate < 1:
            x, index = self.prune(x, weights)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))), index

    def scored_queries(self) -> slice:
        """The queries whose rows of the softmax matrix give the score."""
        if self.keep_rate == 1:
            return slice(0, 0)
        return slice(0, 1) if self.score == "cls" else slice(self.extra, None)

    def macs(self, patches: int) -> tuple[int, int]:
        """Multiply-accumulates of one clip, including a separate score, and the number of remaining patches."""
        dim, tokens, left = self.norm1.weight.numel(), self.extra + patches, kept_patches(patches, self.keep_rate)
        macs = block_macs(tokens, self.extra + left, dim)
        if isinstance(self.attn, SeparateScoreAttention):
            macs += len(range(tokens)[self.scored_queries()]) * tokens * dim
        return macs, left

    def prune(self, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the remaining tokens and the positions of the kept patches, best first."""
        scores = weights.mean(1)[:, :, self.extra :].mean(1)  # [B, P]; mean((1, 2)) is five times slower
        index = scores.topk(kept_patches(scores.shape[1], self.keep_rate)).indices  # [B, keep]
        rows = index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.extra], x[:, self.extra :].gather(1, rows)], 1), index


class PapersViT(nn.Module):
    """The paper's method in plain PyTorch: every block computes the whole softmax matrix in the dtype of the model. Its
    means rank the patches.

    Args:
        model: model of ``pruneattn.create_model``, whose weights are copied.
        keep_rate: fraction of the patches that each pruning block keeps.
        attention: `PapersAttention` or `SeparateScoreAttention`.
    """

    def __init__(self, model: PrunedViT, keep_rate: float = 1.0, attention: type[PapersAttention] = PapersAttention):
        super().__init__()
        dim, extra = model.embed_dim, model.num_extra_tokens
        self.extra, self.time_major = extra, model.time_major
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty_like(model.pos_embed))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, PATCH, model.patch_embed.proj.stride)})
        self.blocks = nn.ModuleList(
            PapersBlock(
                dim, model.num_heads, extra, model.score, keep_rate if i in model.prune_blocks else 1.0, attention
            )
            for i in range(len(model.blocks))
        )
        if extra == 2:
            self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.head_norm = nn.LayerNorm(dim, eps=1e-5)
        else:
            self.fc_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, model.num_classes)
        self.load_state_dict(model.state_dict())
        self.to(model.pos_embed).eval()

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        return self.run(fbank)[0]

    def run(self, fbank: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the logits, and for each pruning block the positions of the kept patches among its input patches."""
        image = (fbank if self.time_major else fbank.transpose(1, 2)).unsqueeze(1)
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2)  # [B, P, C]
        front = self.cls_token if self.extra == 1 else torch.cat([self.cls_token, self.dist_token], 1)
        x = torch.cat([front.expand(len(x), -1, -1), x], 1) + self.pos_embed  # [B, N, C]
        places = []
        for block in self.blocks:
            x, index = block(x)
            if index is not None:
                places.append(index)
        if self.extra == 1:
            return self.head(self.fc_norm(x[:, 1:].mean(1))), places
        x = self.norm(x)
        return self.head(self.head_norm((x[:, 0] + x[:, 1]) / 2)), places

    def macs(self) -> int:
        """Multiply-accumulates of one clip, including head and separate scores."""
        dim, patches = self.pos_embed.shape[2], self.pos_embed.shape[1] - self.extra
        total = patches * PATCH**2 * dim + self.head.weight.numel()
        for block in self.blocks:
            macs, patches = block.macs(patches)
            total += macs
        return total

    def kept(self, fbank: torch.Tensor) -> list[torch.Tensor]:
        """Ascending numbers of the input patches that each pruning block keeps, as in ``pruneattn.trace``."""
        numbers = torch.arange(self.pos_embed.shape[1] - self.extra, device=fbank.device).expand(len(fbank), -1)
        kept = []
        for index in self.run(fbank)[1]:
            numbers = numbers.gather(1, index)
            kept.append(numbers.sort(1).values)
        return kept


TIMM, HUGGINGFACE = "timm ViT", "Hugging Face AST"


def library_model(model: PrunedViT) -> tuple[str, Callable[[PrunedViT], Adapter]]:
    """Name of the equivalent model of another library, and the function that makes it with the same weights."""
    return (TIMM, timm_vit) if model.num_extra_tokens == 1 else (HUGGINGFACE, huggingface_ast)


def huggingface_ast(model: PrunedViT) -> Adapter:
    """Make Hugging Face's AST with the weights of our AST."""
    import transformers

    theirs = transformers.ASTForAudioClassification(
        transformers.ASTConfig(
            hidden_size=model.embed_dim,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=model.num_heads,
            intermediate_size=MLP_RATIO * model.embed_dim,
            max_length=model.frames,
            num_labels=model.num_classes,
            frequency_stride=model.stride[0],
            time_stride=model.stride[1],
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
    )
    theirs.classifier.layernorm.eps = 1e-5
    theirs.load_state_dict(AST_HUGGING_FACE_MODULES.from_ours(model.state_dict()))
    return Adapter(theirs.to(model.pos_embed).eval(), lambda theirs, fbank: theirs(fbank).logits)


def timm_vit(model: PrunedViT) -> Adapter:
    """Make timm's vision transformer with the weights of our AudioMAE."""
    from timm.models.vision_transformer import VisionTransformer

    theirs = VisionTransformer(
        img_size=(model.frames, MEL_BINS),
        in_chans=1,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=model.num_heads,
        num_classes=model.num_classes,
        global_pool="avg",
        drop_path_rate=model.drop_path,
    )
    theirs.load_state_dict(model.state_dict())
    return Adapter(theirs.to(model.pos_embed).eval(), lambda theirs, fbank: theirs(fbank.unsqueeze(1)))


class Adapter(nn.Module):
    """Another library's model with our interface: input ``[B, frames, 128]``, output logits ``[B, K]``."""

    def __init__(self, model: nn.Module, call: Callable[[Any, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, fbank: torch.Tensor) -> torch.Tensor:
        return self.call(self.model, fbank)


def why_not(name: str) -> str:
    """Why another library's model cannot run on this machine; empty if it can."""
    if name == TIMM and version("timm") is None:
        return "timm is not installed"
    if name == HUGGINGFACE and int((version("transformers") or "0").split(".")[0]) < 5:
        return f"needs transformers 5, installed: {version('transformers')}"
    return ""


def compiled(model: nn.Module, fbank: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile a model with ``torch.compile`` and frozen weights, for inputs like `fbank`.

    The model is compiled without gradients. Call it in ``torch.inference_mode()``.
    """
    model = torch.compile(model, dynamic=False)
    # Each model and keep-rate is compiled separately, and all of them count toward the limit of one forward function.
    with torch.inference_mode(), inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):
        model(fbank)
    return model
