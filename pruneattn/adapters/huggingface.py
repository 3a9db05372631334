"""Hugging Face's AST, and models with the same blocks, under both sets of part names that transformers has used."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from .block import BlockView
from .checks import expect_heads, expect_linear, expect_parts
from .packing import activate, add, has_parts
from .trunk import Trunk

_MASKS = ("attention_mask", "head_mask")


def find(model: Any) -> Trunk | None:
    """Return the model's Trunk; None if it has neither ``layers`` nor ``encoder.layer``.

    Raises:
        UserError: it has one of the two, but is not an AST.
    """
    found = _find_blocks(model)
    if found is None:
        return None
    path, view, blocks = found
    embeddings: Any = getattr(model, "embeddings", None)
    tokens = ("cls_token", "distillation_token")
    if getattr(embeddings, "cls_token", None) is None:
        raise UserError(
            f"{type(model).__name__} has {path}, but no 'embeddings.cls_token': it is not Hugging Face's AST"
        )
    known = (*tokens, "position_embeddings", "mask_token", "patch_embeddings", "dropout")
    expect_parts(embeddings, "embeddings", ("cls_token",), known)
    extra_tokens = sum(getattr(embeddings, name, None) is not None for name in tokens)

    def guard() -> None:
        unguard()
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        hooks = [model.register_forward_pre_hook(functools.partial(_reject_arguments, names), with_kwargs=True)]
        hooks += [block.register_forward_pre_hook(_without_mask, with_kwargs=True) for block in blocks]
        vars(model)["_pruneattn_hooks"] = hooks

    def unguard() -> None:
        for hook in vars(model).pop("_pruneattn_hooks", []):
            hook.remove()

    return Trunk(blocks, path, view, extra_tokens, True, guard, unguard, guard_optimized=guard)


def _find_blocks(model: Any) -> tuple[str, type[Block], nn.ModuleList] | None:
    """Name of the blocks in the model, their view, and the blocks; None if the model has neither name."""
    views: dict[str, type[Block]] = {"layers": LayersBlock, "encoder.layer": EncoderBlock}
    for path, view in views.items():
        blocks = model
        for name in path.split("."):
            blocks = getattr(blocks, name, None)
        if isinstance(blocks, nn.ModuleList):
            return path, view, blocks
    return None


def _reject_arguments(names: tuple[str, ...], model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("output_attentions") is None:
        given["output_attentions"] = getattr(model.config, "output_attentions", False)
    for name in (*_MASKS, "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            raise UserError(
                f"{name}: a pruned or optimized model takes no masks and returns no attentions: leave it out, call "
                "pruneattn.unprune, or load the model again"
            )


def _without_mask(
    block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # If no mask is given, transformers creates one that hides nothing, for flex_attention and inside torch.compile. Its
    # size does not match the tokens after the first pruning.
    return args[:1], {name: value for name, value in kwargs.items() if name not in _MASKS}


class Block(BlockView):
    """Pre-norm block with three projections: base of the two layouts of transformers.

    Attributes:
        attention_path: name of the module with the projections, in the block.
        names: names of the projections to queries, keys and values.
    """

    attention_path = ""
    names: tuple[str, str, str]

    @property
    def attention(self) -> Any:
        """The module with the projections."""
        raise NotImplementedError

    @property
    def projection(self) -> Any:
        """The linear layer after attention."""
        raise NotImplementedError

    @classmethod
    def check_attention(cls, block: Any, path: str) -> None:
        """Check the heads and the linear layers of the attention."""
        view = cls(block)
        attention, path = view.attention, f"{path}.{cls.attention_path}"
        heads = expect_heads(attention, path, "num_attention_heads")
        query = getattr(attention, cls.names[0])
        dim: Any = getattr(query, "in_features", None)
        inner: Any = getattr(query, "out_features", None)
        for name in cls.names:
            expect_linear(getattr(attention, name), f"{path}.{name}", dim, inner)
        expect_linear(view.projection, f"{path}: the projection after this module", inner, dim)
        if inner % heads:
            raise UserError(f"{path}.num_attention_heads: {heads} does not divide {inner} channels")

    @property
    def dim(self) -> int:
        return self.projection.out_features

    @property
    def num_heads(self) -> int:  # type: ignore[override]  # see BlockView
        return self.attention.num_attention_heads

    @property
    def head_dim(self) -> int:  # type: ignore[override]  # see BlockView
        return self.projection.in_features // self.num_heads

    def norm(self, x: Tensor) -> Tensor:
        return self.block.layernorm_before(x)

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        names = dict(zip("qkv", self.names, strict=True))
        return [self.split_heads(getattr(self.attention, names[part])(x))[0] for part in parts]


class LayersBlock(Block):
    """ASTLayer in ``layers``, of later versions of transformers 5."""

    arguments = ("attention_mask",)
    attention_path = "attention"
    names = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def check(cls, block: Any, path: str) -> None:
        expect_parts(block, path, ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout"))
        expect_parts(block.attention, f"{path}.attention", (*cls.names, "o_proj"))
        cls.check_attention(block, path)

    @property
    def attention(self) -> Any:
        return self.block.attention

    @property
    def projection(self) -> Any:
        return self.attention.o_proj

    @property
    def dropout(self) -> float:
        return self.attention.attention_dropout if self.attention.training else 0.0

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        block = self.block
        x = block.dropout(self.projection(attended)) + x
        return block.dropout(block.mlp(block.layernorm_after(x))) + x

    def finish_packed(self, x: Tensor, attended: Tensor) -> Tensor:
        block, mlp = self.block, self.block.mlp
        if not has_parts(mlp, {"fc1", "activation_fn", "fc2"}, set()):
            return self.finish(x, attended)
        x = add(x, self.projection, attended)
        return add(x, mlp.fc2, activate(mlp.fc1, mlp.activation_fn, x, block.layernorm_after))


class EncoderBlock(Block):
    """ASTLayer in ``encoder.layer``, of transformers 4 and 5.0. Earlier versions return the tokens in a tuple."""

    arguments = ("head_mask", "output_attentions")
    attention_path = "attention.attention"
    names = ("query", "key", "value")

    @classmethod
    def check(cls, block: Any, path: str) -> None:
        parts = ("layernorm_before", "attention", "layernorm_after", "intermediate", "output")
        expect_parts(block, path, parts)
        expect_parts(block.attention, f"{path}.attention", ("attention", "output"))
        expect_parts(block.attention.attention, f"{path}.attention.attention", cls.names, ("dropout",))
        expect_parts(block.attention.output, f"{path}.attention.output", ("dense",), ("dropout",))
        cls.check_attention(block, path)

    @property
    def attention(self) -> Any:
        return self.block.attention.attention

    @property
    def projection(self) -> Any:
        return self.block.attention.output.dense

    @property
    def dropout(self) -> float:
        if not self.attention.training:
            return 0.0
        module = getattr(self.attention, "dropout", None)
        return self.attention.dropout_prob if module is None else module.p

    def finish(self, x: Tensor, attended: Tensor) -> Any:
        block = self.block
        x = block.attention.output(attended, x) + x  # projection and dropout; the block adds the residual
        return self._returned(block.output(block.intermediate(block.layernorm_after(x)), x))

    def finish_packed(self, x: Tensor, attended: Tensor) -> Any:
        first, second = self.block.intermediate, self.block.output
        parts = has_parts(first, {"dense"}, {"intermediate_act_fn"}) and has_parts(second, {"dense"}, {"dropout"})
        if not parts:
            return self.finish(x, attended)
        x = add(x, self.projection, attended)
        y = activate(first.dense, first.intermediate_act_fn, x, self.block.layernorm_after)
        return self._returned(add(x, second.dense, y))

    def _returned(self, x: Tensor) -> Any:
        return (x,) if "output_attentions" in self.block.own_arguments else x
