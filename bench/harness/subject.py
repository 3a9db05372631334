"""A model of this package as the subject of a case: weights, input and checks against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

import pruneattn
from bench.harness.case import Case, Work
from bench.harness.grid import extra_tokens, input_of
from bench.harness.guards import TOLERANCE, WrongResult, check_close, check_kept
from pruneattn.constants import MEL_BINS
from pruneattn.models import PrunedViT
from pruneattn.models.trace import Trace
from pruneattn.runtime.inference import AMP_DTYPES, can_optimize

#: Largest difference of logits of pruned models, relative to the largest logit. If two patches have equal scores up to
#: rounding and the other patch is kept, logits differ by about 0.01; if other patches are kept, by 0.2 and more.
PRUNED_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.15, torch.float16: 0.15}

_AMP = {dtype or torch.float32: name for name, dtype in AMP_DTYPES.items()}


def make_model(case: Case, **arguments: Any) -> PrunedViT:
    """Make the float32 model of a case on its device, with fixed random weights. Its stride is that of `grid.input_of`.

    The weights of queries and keys are doubled. The attention of a newly initialized model is almost uniform, so that
    the choice of the kept patches would hardly change the result, and no check could find a wrong choice.

    Args:
        case: the case; its subject is the model's name.
        **arguments: further arguments of ``pruneattn.create_model``.
    """
    torch.manual_seed(0)
    frames, stride = input_of(case.tokens - extra_tokens(case.subject))
    model = pruneattn.create_model(case.subject, frames=frames, stride=stride, **arguments).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= 2
    return model.to(case.device)


def call_at_keep_rate(model: PrunedViT, keep_rate: float, *inputs: torch.Tensor) -> torch.Tensor:
    """Set a model's keep-rate and call the model.

    All keep-rates share one model. Unlike ``pruneattn.at_keep_rate``, this function does not restore the previous
    keep-rate, so that a timed call contains only an assignment, which takes a microsecond.
    """
    model.set_keep_rate(keep_rate)
    return model(*inputs)


class Subject:
    """A model in one precision, for inference.

    Attributes:
        case: the case.
        model: the float32 model. The weights of all other models are copies of its weights.
        plain: the model in the case's precision.
        fbank: float32 input ``[B, frames, 128]``; ``input`` is the same in the case's precision.
    """

    def __init__(self, case: Case, **arguments: Any):
        self.case, self.arguments = case, arguments
        self.model = make_model(case, **arguments)
        self.plain = copy.deepcopy(self.model).to(case.torch_dtype)
        self.use_input(torch.randn(case.batch, self.model.frames, MEL_BINS, device=case.device))

    def use_input(self, fbank: torch.Tensor) -> None:
        """Replace the input by another float32 input ``[B, frames, 128]``."""
        self.fbank, self.input = fbank, fbank.to(self.case.torch_dtype)
        self._expected: dict[float, Trace] = {}

    @property
    def fast_backend(self) -> str:
        """Name of the fastest variant: ``"optimized"`` or ``"eager"``."""
        return "optimized" if can_optimize(self.case.device, _AMP[self.case.torch_dtype]) else "eager"

    @cached_property
    def fast(self) -> PrunedViT:
        """The fastest variant of the model in the case's precision; see `fast_backend`."""
        return self.made_fast(self.model)

    def copy_at(self, keep_rate: float) -> PrunedViT:
        """Copy `plain` and set the keep-rate of the copy."""
        model = copy.deepcopy(self.plain)
        model.set_keep_rate(keep_rate)
        return model

    def made_fast(self, model: PrunedViT) -> PrunedViT:
        """Make the fastest variant of a float32 model in the case's precision. The model is not changed."""
        model = copy.deepcopy(model)
        if self.fast_backend == "optimized":
            return pruneattn.optimize_for_inference(model, self.case.torch_dtype)
        return model.to(self.case.torch_dtype)

    def with_score(self, score: Any) -> PrunedViT:
        """The float32 model with another score."""
        other = make_model(self.case, score=score, **self.arguments)
        other.load_state_dict(self.model.state_dict())
        return other

    def expected(self, keep_rate: float) -> Trace:
        """``pruneattn.trace`` of the reference at a keep-rate."""
        if keep_rate not in self._expected:
            with (
                torch.inference_mode(),
                pruneattn.use_backend("reference"),
                pruneattn.at_keep_rate(self.model, keep_rate),
            ):
                self._expected[keep_rate] = pruneattn.trace(self.model, self.fbank)
        return self._expected[keep_rate]

    def check(
        self, keep_rate: float = 1.0, kept: Callable[[torch.Tensor], Sequence[torch.Tensor]] | None = None
    ) -> Callable[[torch.Tensor], None]:
        """Make a check of logits against the reference.

        Args:
            keep_rate: keep-rate of the logits.
            kept: function of the input that returns the patches kept. It is checked in float32 only, because the order
                of close scores changes in half precision.
        """
        return partial(self._check, keep_rate, kept)

    def _check(self, keep_rate: float, kept: Callable | None, logits: torch.Tensor) -> None:
        dtype, expected = self.case.torch_dtype, self.expected(keep_rate)
        tolerance = TOLERANCE[dtype] if keep_rate == 1 else PRUNED_TOLERANCE[dtype]
        check_close("logits", logits, expected.logits, tolerance)
        if keep_rate < 1 and kept is not None and dtype == torch.float32:
            check_kept(kept(self.input), expected)

    def check_shape(self, logits: torch.Tensor) -> None:
        """Check logits of providers that choose other patches by design.

        Raises:
            WrongResult: the shape is wrong, a number is not finite, or the logits are those of the unpruned model.
        """
        dense = self.expected(1.0).logits
        if logits.shape != dense.shape or not logits.isfinite().all():
            raise WrongResult(f"logits are not {list(dense.shape)} finite numbers")
        if torch.allclose(logits.float(), dense, rtol=0, atol=1e-4 * dense.abs().max().item()):
            raise WrongResult("nothing was pruned")

    def work(self, keep_rate: float = 1.0, macs_computed: int | None = None, macs_paper: int | None = None) -> Work:
        """`Work` of a call. Its bytes are those of the weights and the input.

        Args:
            keep_rate: keep-rate of the call.
            macs_computed: multiply-accumulates of one clip, if they differ from those of our model.
            macs_paper: the same by the paper's count.
        """
        count = pruneattn.count_macs(self.model, keep_rate)
        return Work(
            self.case.batch * (macs_paper or count.paper),
            self.case.batch * (macs_computed or count.computed),
            bytes_of(self.plain) + self.input.numel() * self.input.element_size(),
        )


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
