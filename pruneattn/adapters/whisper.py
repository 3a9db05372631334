"""The encoder of Hugging Face's Whisper, alone and in the models that contain it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .block import AdaptedBlock, BlockView
from .checks import expect_heads, expect_linear, expect_parts
from .packing import activate, add
from .trunk import Trunk

_PARTS = ("conv1", "conv2", "embed_positions", "layers", "layer_norm")
_PRUNE_BLOCKS = (1,)


def find(model: Any) -> Trunk | None:
    """Return the Trunk of a Whisper encoder, or of the ``encoder`` of a model; None if there is none.

    Raises:
        UserError: the encoder has Whisper's parts and further ones.
    """
    for path, encoder in (("layers", model), ("encoder.layers", getattr(model, "encoder", None))):
        if all(isinstance(getattr(encoder, name, None), nn.Module) for name in _PARTS):
            return _trunk(path, encoder)
    return None


def _trunk(path: str, encoder: Any) -> Trunk:
    further = [name for name, _ in encoder.named_children() if name not in _PARTS]
    if further:
        raise UserError(
            f"{type(encoder).__name__} has the parts of Whisper's encoder and {further[0]!r}, which may combine tokens "
            "that are no neighbors after pruning: only Whisper's own encoder is supported"
        )

    def hook(pruned: bool) -> None:
        unguard()
        function = functools.partial(_check_outputs, pruned)
        vars(encoder)["_pruneattn_hook"] = encoder.register_forward_pre_hook(function, with_kwargs=True)

    def unguard() -> None:
        if "_pruneattn_hook" in vars(encoder):
            vars(encoder).pop("_pruneattn_hook").remove()

    return Trunk(
        encoder.layers,
        path,
        WhisperBlock,
        extra_tokens=0,
        class_token=False,
        guard=functools.partial(hook, True),
        unguard=unguard,
        prune_blocks=_PRUNE_BLOCKS,
        guard_optimized=functools.partial(hook, False),
        module=encoder,
    )


def _check_outputs(
    pruned: bool, encoder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check the requested outputs. The blocks see a request for attention weights only as an argument."""
    kwargs = dict(kwargs)
    if kwargs.get("output_attentions") is None and getattr(encoder.config, "output_attentions", False):
        kwargs["output_attentions"] = True
    if pruned and kwargs.get("output_hidden_states") and getattr(encoder.config, "use_weighted_layer_sum", False):
        raise UserError(
            "use_weighted_layer_sum: the hidden states of a pruned model have different numbers of tokens, so they "
            "cannot be added: set it to False in the configuration, or call pruneattn.unprune first"
        )
    return args, kwargs


class WhisperBlock(BlockView):
    """WhisperEncoderLayer: pre-norm, with three projections, of which that to keys has no bias."""

    arguments = ("attention_mask", "layer_head_mask", "output_attentions")

    @classmethod
    def check(cls, block: Any, path: str) -> None:
        parts = ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
        expect_parts(block, path, parts, ("activation_fn",))
        attention, path = block.self_attn, f"{path}.self_attn"
        expect_parts(attention, path, ("q_proj", "k_proj", "v_proj", "out_proj"))
        heads = expect_heads(attention, path, "num_heads")
        dim: Any = getattr(attention.out_proj, "out_features", None)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expect_linear(getattr(attention, name), f"{path}.{name}", dim, dim)
        if dim % heads:
            raise UserError(f"{path}.num_heads: {heads} does not divide {dim} channels")

    @property
    def dim(self) -> int:
        return self.block.self_attn.out_proj.out_features

    @property
    def num_heads(self) -> int:  # type: ignore[override]  # see BlockView
        return self.block.self_attn.num_heads

    @property
    def dropout(self) -> float:
        attention = self.block.self_attn
        return attention.dropout if attention.training else 0.0

    def norm(self, x: Tensor) -> Tensor:
        return self.block.self_attn_layer_norm(x)

    def project(self, x: Tensor, parts: str) -> list[Tensor]:
        return [self.split_heads(getattr(self.block.self_attn, f"{part}_proj")(x))[0] for part in parts]

    def finish(self, x: Tensor, attended: Tensor) -> Any:
        block = self.block

        def dropout(y: Tensor, rate: float) -> Tensor:
            return F.dropout(y, rate, training=block.training)

        x = x + dropout(block.self_attn.out_proj(attended), block.dropout)
        y = block.activation_fn(block.fc1(block.final_layer_norm(x)))
        y = block.fc2(dropout(y, block.activation_dropout))
        return self._returned(x + dropout(y, block.dropout))

    def finish_packed(self, x: Tensor, attended: Tensor) -> Any:
        block = self.block
        x = add(x, block.self_attn.out_proj, attended)
        y = activate(block.fc1, block.activation_fn, x, block.final_layer_norm)
        return self._returned(add(x, block.fc2, y))

    def _returned(self, x: Tensor) -> Any:
        if x.dtype == torch.float16:  # as in the block itself
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        block: AdaptedBlock = self.block
        # Earlier versions return a tuple with the softmax matrix.
        return (x, None) if "output_attentions" in block.own_arguments else x
