"""timm's VisionTransformer, and models with the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models.packed import PackedQKV
from .block import BlockView
from .checks import expect_heads, expect_linear, expect_parts
from .packing import activate, add, has_parts
from .trunk import Trunk

_GRID_METHODS = ("forward_intermediates", "get_intermediate_layers")


def find(model: Any) -> Trunk | None:
    """Return the model's Trunk; None if it has no ``blocks``.

    Raises:
        UserError: it has ``blocks``, but not timm's number of prefix tokens.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return None
    extra_tokens = getattr(model, "num_prefix_tokens", None)
    if not isinstance(extra_tokens, int):
        raise UserError(
            f"{type(model).__name__} has blocks, but no 'num_prefix_tokens' with the number of tokens that are not "
            "patches: it is not one of timm's vision transformers"
        )
    class_token = getattr(model, "cls_token", None) is not None

    def guard() -> None:
        # These attributes of the object hide the methods of the class.
        vars(model).update(dict.fromkeys(_GRID_METHODS, _reject_grid))

    def unguard() -> None:
        for name in _GRID_METHODS:
            vars(model).pop(name, None)

    return Trunk(blocks, "blocks", TimmBlock, extra_tokens, class_token, guard, unguard)


def _reject_grid(*args: Any, **kwargs: Any) -> NoReturn:
    raise UserError(
        "a pruned model has no complete grid of patches for intermediate layers: use forward_features, or call "
        "pruneattn.unprune first"
    )


class TimmBlock(BlockView):
    """Pre-norm block with packed queries, keys and values, and optional layer scale and norms within attention."""

    arguments = ("attn_mask", "is_causal")
    joint_projection = "attn.qkv"

    @classmethod
    def check(cls, block: Any, path: str) -> None:
        optional = ("ls1", "drop_path1", "ls2", "drop_path2")
        expect_parts(block, path, ("norm1", "attn", "norm2", "mlp"), optional)
        attn, path = block.attn, f"{path}.attn"
        expect_parts(attn, path, ("qkv", "proj"), ("q_norm", "k_norm", "attn_drop", "norm", "proj_drop"))
        heads = expect_heads(attn, path, "num_heads")
        dim: Any = getattr(attn.qkv, "in_features", None)
        inner: Any = getattr(attn.proj, "in_features", None)
        expect_linear(attn.proj, f"{path}.proj", inner, dim)
        expect_linear(attn.qkv, f"{path}.qkv", dim, 3 * inner)
        if inner % heads:
            raise UserError(f"{path}.num_heads: {heads} does not divide the {inner} channels of {path}.proj")

    @property
    def dim(self) -> int:
        return self.block.attn.proj.out_features

    @property
    def num_heads(self) -> int:  # type: ignore[override]  # see BlockView
        return self.block.attn.num_heads

    @property
    def head_dim(self) -> int:  # type: ignore[override]  # see BlockView
        return self.block.attn.proj.in_features // self.num_heads

    @property
    def dropout(self) -> float:
        drop = getattr(self.block.attn, "attn_drop", None)
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def norm(self, x: Tensor) -> Tensor:
        return self.block.norm1(x)

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        attn, qkv, inner = self.block.attn, self.block.attn.qkv, self.block.attn.proj.in_features
        start = "qkv".index(parts) * inner
        rows = slice(start, start + len(parts) * inner)
        plain = type(qkv) is nn.Linear and not qkv._forward_pre_hooks and not qkv._forward_hooks
        if isinstance(qkv, PackedQKV):
            projected = qkv.project(x, parts)
        elif plain and parts != "qkv":
            projected = [F.linear(x, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])]
        else:  # a wrapped (LoRA) or hooked layer computes more than its weight does
            projected = [qkv(x)[..., rows]]
        views = [view for packed in projected for view in self.split_heads(packed)]
        norms = {"q": "q_norm", "k": "k_norm"}
        return [_apply(attn, norms.get(part), view) for part, view in zip(parts, views, strict=True)]

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        block, attn = self.block, self.block.attn
        y = _apply(attn, "proj_drop", attn.proj(_apply(attn, "norm", attended)))
        x = x + _apply(block, "drop_path1", _apply(block, "ls1", y))
        y = block.mlp(block.norm2(x))
        return x + _apply(block, "drop_path2", _apply(block, "ls2", y))

    def finish_packed(self, x: Tensor, attended: Tensor) -> Tensor:
        block, attn, mlp = self.block, self.block.attn, self.block.mlp
        x = add(x, attn.proj, _apply(attn, "norm", attended), getattr(block, "ls1", None))
        scale = getattr(block, "ls2", None)
        two_layers = has_parts(mlp, {"fc1", "act", "fc2"}, {"drop1", "norm", "drop2"})
        if not two_layers or mlp.fc1.out_features != mlp.fc2.in_features:  # a gated MLP has the same parts
            return add(x, mlp, block.norm2(x), scale)
        return add(x, mlp.fc2, _apply(mlp, "norm", activate(mlp.fc1, mlp.act, x, block.norm2)), scale)


def _apply(module: nn.Module, name: str | None, x: Tensor) -> Tensor:
    """Apply a part that a module may lack to ``x``."""
    part: Callable[[Tensor], Tensor] | None = None if name is None else getattr(module, name, None)
    return x if part is None else part(x)
