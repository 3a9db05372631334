"""A training step: forward, backward and AdamW, with weights in float32 and half precision by autocast."""

import copy
from functools import partial

import torch
import torch.nn.functional as F

import pruneattn
from bench.harness import peers
from bench.harness.case import TRAINING, Provider, Work, left_out
from bench.harness.guards import TOLERANCE, check_close
from bench.harness.subject import PRUNED_TOLERANCE, make_model
from pruneattn.constants import MEL_BINS

LEVELS = (TRAINING,)


class Step:
    """Training steps of a model. The learning rate is 0, so that every step does all the work but starts from the same
    weights, and its result can be checked.
    """

    def __init__(self, case, model, fbank, targets):
        self.case, self.model, self.fbank, self.targets = case, model.train(), fbank, targets
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        self.embedding = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))

    def __call__(self):
        """Return the loss, and the gradient of the patch embedding, which depends on the gradients of all blocks."""
        self.optimizer.zero_grad(set_to_none=True)
        dtype = self.case.torch_dtype
        with torch.autocast(self.case.device, dtype, enabled=dtype != torch.float32):
            logits = self.model(self.fbank)
        loss = F.binary_cross_entropy_with_logits(logits.float(), self.targets)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), self.embedding.weight.grad


def providers(case, sizes):
    model = make_model(case, num_classes=50)
    fbank = torch.randn(case.batch, model.frames, MEL_BINS, device=case.device)
    step = partial(Step, case, fbank=fbank, targets=torch.rand(case.batch, 50, device=case.device).round())
    name, make = peers.library_model(model)
    why_not = peers.why_not(name)
    result = [left_out(name, why_not)] if why_not else []
    for rate in sizes.keep_rates:
        model.set_keep_rate(rate)
        with pruneattn.use_backend("reference"):
            check = partial(_check, case, rate, step(copy.deepcopy(model))())
        published = peers.PapersViT(model, rate)
        macs = pruneattn.count_macs(model)
        models = [
            ("ours", "eager", copy.deepcopy(model), macs.computed),
            (peers.PAPER, "eager", published, published.macs()),
        ]
        if not why_not and (rate == 1 or rate in sizes.peer_rates):
            theirs = make(model)
            if rate < 1:
                pruneattn.prune(theirs.model, rate, score=model.score)
            models.append((name, "eager" if rate == 1 else "pruneattn.prune", theirs, macs.computed))
        for who, how, other, computed in models:
            # The backward pass has two matrix products for each product of the forward pass.
            work = Work(3 * case.batch * macs.paper, 3 * case.batch * computed)
            result.append(Provider(who, step(other), check, how, rate, work))
    return result


def _check(case, keep_rate, expected, result):
    dtype = case.torch_dtype
    tolerance = TOLERANCE[dtype] if keep_rate == 1 else PRUNED_TOLERANCE[dtype]
    check_close("losses", result[0], expected[0], tolerance)
    check_close("gradients of the patch embedding", result[1], expected[1], 10 * tolerance)


def test_training_step(measure, case, sizes):
    measure(case, providers(case, sizes))
