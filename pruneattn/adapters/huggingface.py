"""Hugging Face's AST and what is made of the same blocks, by either set of names that transformers gave their parts."""

import functools
import inspect

from torch import nn

from ..errors import UserError
from .block import BlockView
from .checks import expect_heads, expect_linear, expect_parts
from .trunk import Trunk

_MASKS = ("attention_mask", "head_mask")


def find(model):
    """The model's Trunk, None if it has neither ``layers`` nor ``encoder.layer``."""
    views = {"layers": LayersBlock, "encoder.layer": EncoderBlock}
    for path, view in views.items():
        blocks = model
        for name in path.split("."):
            blocks = getattr(blocks, name, None)
        if isinstance(blocks, nn.ModuleList):
            break
    else:
        return None
    embeddings = getattr(model, "embeddings", None)
    tokens = ("cls_token", "distillation_token")
    if getattr(embeddings, "cls_token", None) is None:
        raise UserError(
            f"{type(model).__name__} has {path}, but no 'embeddings.cls_token': it is not an AST of Hugging Face"
        )
    known = (*tokens, "position_embeddings", "mask_token", "patch_embeddings", "dropout")
    expect_parts(embeddings, "embeddings", ("cls_token",), known)
    extra_tokens = sum(getattr(embeddings, name, None) is not None for name in tokens)

    def guard():
        names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        hooks = [model.register_forward_pre_hook(functools.partial(_refuse_arguments, names), with_kwargs=True)]
        hooks += [block.register_forward_pre_hook(_without_mask, with_kwargs=True) for block in blocks]
        vars(model)["_pruneattn_hooks"] = hooks

    def unguard():
        for hook in vars(model).pop("_pruneattn_hooks", []):
            hook.remove()

    return Trunk(blocks, path, view, extra_tokens, True, guard, unguard)


def _refuse_arguments(names, model, args, kwargs):
    given = {**dict(zip(names, args)), **kwargs}
    if given.get("output_attentions") is None:
        given["output_attentions"] = getattr(model.config, "output_attentions", False)
    for name in (*_MASKS, "output_attentions"):
        if given.get(name) is not None and given[name] is not False:
            raise UserError(
                f"{name}: a pruned model takes no masks and returns no attentions: leave it out, or use "
                "pruneattn.unprune first"
            )


def _without_mask(block, args, kwargs):
    # Without a mask given, transformers makes one that shows everything for flex_attention and inside torch.compile,
    # of a size that fits no tokens after the first pruning.
    return args[:1], {name: value for name, value in kwargs.items() if name not in _MASKS}


class Block(BlockView):
    """Pre-norm block with three projections, two of whose parts have other places in the two versions."""

    attention_path = ""
    names = ()  # of the projections to queries, keys and values

    @property
    def attention(self):
        """The module with these projections."""
        raise NotImplementedError

    @property
    def projection(self):
        """The linear layer behind attention."""
        raise NotImplementedError

    @classmethod
    def check_attention(cls, block, path):
        view = cls(block)
        attention, path = view.attention, f"{path}.{cls.attention_path}"
        heads = expect_heads(attention, path, "num_attention_heads")
        query = getattr(attention, cls.names[0])
        dim, inner = getattr(query, "in_features", None), getattr(query, "out_features", None)
        for name in cls.names:
            expect_linear(getattr(attention, name), f"{path}.{name}", dim, inner)
        expect_linear(view.projection, f"{path}: the projection behind it", inner, dim)
        if inner % heads:
            raise UserError(f"{path}.num_attention_heads: {heads} does not divide {inner} channels")

    @property
    def dim(self):
        return self.projection.out_features

    @property
    def num_heads(self):
        return self.attention.num_attention_heads

    @property
    def head_dim(self):
        return self.projection.in_features // self.num_heads

    def norm(self, x):
        return self.block.layernorm_before(x)

    def project(self, x, parts):
        names = dict(zip("qkv", self.names))
        return [self.split_heads(getattr(self.attention, names[part])(x))[0] for part in parts]


class LayersBlock(Block):
    """ASTLayer in ``layers``, of later versions of transformers 5."""

    arguments = ("attention_mask",)
    attention_path = "attention"
    names = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def check(cls, block, path):
        expect_parts(block, path, ("layernorm_before", "attention", "layernorm_after", "mlp", "dropout"))
        expect_parts(block.attention, f"{path}.attention", (*cls.names, "o_proj"))
        cls.check_attention(block, path)

    @property
    def attention(self):
        return self.block.attention

    @property
    def projection(self):
        return self.attention.o_proj

    @property
    def dropout(self):
        return self.attention.attention_dropout if self.attention.training else 0.0

    def finish(self, x, attended):
        block = self.block
        x = block.dropout(self.projection(attended)) + x
        return block.dropout(block.mlp(block.layernorm_after(x))) + x


class EncoderBlock(Block):
    """ASTLayer in ``encoder.layer``, of transformers 4 and 5.0. The earlier ones return their tokens in a tuple."""

    arguments = ("head_mask", "output_attentions")
    attention_path = "attention.attention"
    names = ("query", "key", "value")

    @classmethod
    def check(cls, block, path):
        parts = ("layernorm_before", "attention", "layernorm_after", "intermediate", "output")
        expect_parts(block, path, parts)
        expect_parts(block.attention, f"{path}.attention", ("attention", "output"))
        expect_parts(block.attention.attention, f"{path}.attention.attention", cls.names, ("dropout",))
        expect_parts(block.attention.output, f"{path}.attention.output", ("dense",), ("dropout",))
        cls.check_attention(block, path)

    @property
    def attention(self):
        return self.block.attention.attention

    @property
    def projection(self):
        return self.block.attention.output.dense

    @property
    def dropout(self):
        if not self.attention.training:
            return 0.0
        module = getattr(self.attention, "dropout", None)
        return self.attention.dropout_prob if module is None else module.p

    def finish(self, x, attended):
        block = self.block
        x = block.attention.output(attended, x) + x  # projection and dropout; the sum is the block's
        out = block.output(block.intermediate(block.layernorm_after(x)), x)
        return (out,) if "output_attentions" in block.unpruned_arguments else out
