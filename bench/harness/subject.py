"""A model of ours as the subject of a case: its weights, its input, and what every provider should make of them."""

import copy
from functools import cached_property, partial

import torch

import pruneattn
from bench.harness.grid import extra_tokens
from bench.harness.guards import TOLERANCE, WrongResult, check_close, check_kept
from bench.harness.measure import Work

#: Largest difference of logits where patches were pruned, as a share of the largest. One patch chosen otherwise, of two
#: whose scores are the same to rounding, makes about 0.01; another choice altogether makes 0.2 and more.
PRUNED_TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.15, torch.float16: 0.15}


def make_model(case, **arguments):
    """The float32 model of a case on its device, with fixed fresh weights.

    Queries and keys are twice as large as fresh ones: else all attention is so even that it hardly matters which
    patches are kept, and no check of the result could tell.
    """
    torch.manual_seed(0)
    frames = 2 * (case.tokens - extra_tokens(case.subject))  # 8 patches for 16 frames
    model = pruneattn.create_model(case.subject, frames=frames, **arguments).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= 2
    return model.to(case.device)


def at_keep_rate(model, keep_rate, *inputs):
    """Run a model of ours at a keep-rate. (A model is shared by all rates: setting one costs a microsecond.)"""
    model.set_keep_rate(keep_rate)
    return model(*inputs)


class Subject:
    """A model in one precision, for inference.

    Attributes:
        model: float32, the source of all others.
        fbank: its input, float32; ``input`` is the same in the case's precision.
        plain: the model in the case's precision.
        fast: the same, optimized where it can be; ``fast_backend`` says which, "optimized" or "eager".
    """

    def __init__(self, case, **arguments):
        self.case, self.arguments = case, arguments
        self.model = make_model(case, **arguments)
        self.plain = copy.deepcopy(self.model).to(case.torch_dtype)
        self.use_input(torch.randn(case.batch, self.model.frames, 128, device=case.device))

    def use_input(self, fbank):
        """Take another input ``[B, frames, 128]``, float32."""
        self.fbank, self.input = fbank, fbank.to(self.case.torch_dtype)
        self._expected = {}

    @property
    def fast_backend(self):
        return "optimized" if pruneattn.runtime.inference.can_optimize(self.case.device, self._amp) else "eager"

    @property
    def _amp(self):
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.case.torch_dtype]

    @cached_property
    def fast(self):
        return self.made_fast(self.model)

    def copy_at(self, keep_rate):
        """A copy of ``plain`` with a keep-rate of its own."""
        model = copy.deepcopy(self.plain)
        model.set_keep_rate(keep_rate)
        return model

    def made_fast(self, model):
        """A copy of a float32 model that is as fast as it gets, in the case's precision."""
        model = copy.deepcopy(model)
        if self.fast_backend == "optimized":
            return pruneattn.optimize_for_inference(model, self.case.torch_dtype)
        return model.to(self.case.torch_dtype)

    def with_score(self, score):
        """The float32 model with another score."""
        other = make_model(self.case, score=score, **self.arguments)
        other.load_state_dict(self.model.state_dict())
        return other

    def expected(self, keep_rate):
        """The reference's ``pruneattn.trace`` at a keep-rate."""
        if keep_rate not in self._expected:
            self.model.set_keep_rate(keep_rate)
            with torch.inference_mode(), pruneattn.use_backend("reference"):
                self._expected[keep_rate] = pruneattn.trace(self.model, self.fbank)
        return self._expected[keep_rate]

    def check(self, keep_rate=1.0, kept=None):
        """A check of logits against the reference at a keep-rate.

        ``kept``, a function of the input, gives the patches that were kept; it is asked in float32 only, since near
        scores change places in half precision.
        """
        return partial(self._check, keep_rate, kept)

    def _check(self, keep_rate, kept, logits):
        dtype, expected = self.case.torch_dtype, self.expected(keep_rate)
        tolerance = TOLERANCE[dtype] if keep_rate == 1 else PRUNED_TOLERANCE[dtype]
        check_close("logits", logits, expected.logits, tolerance)
        if keep_rate < 1 and kept is not None and dtype == torch.float32:
            check_kept(kept(self.input), expected)

    def check_shape(self, logits):
        """For providers that select otherwise by design: numbers of the right shape, but not the unpruned ones."""
        dense = self.expected(1.0).logits
        if logits.shape != dense.shape or not logits.isfinite().all():
            raise WrongResult(f"logits are not {list(dense.shape)} finite numbers")
        if torch.allclose(logits.float(), dense, rtol=0, atol=1e-4 * dense.abs().max().item()):
            raise WrongResult("nothing was pruned")

    def work(self, keep_rate=1.0, macs_computed=None, macs_paper=None):
        """`Work` of a call: weights and input have to be read at least. MACs, if given, are those of one clip."""
        self.model.set_keep_rate(keep_rate)
        count = pruneattn.count_macs(self.model)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in self.plain.parameters())
        return Work(
            self.case.batch * (macs_paper or count.paper),
            self.case.batch * (macs_computed or count.computed),
            weights + self.input.numel() * self.input.element_size(),
        )
