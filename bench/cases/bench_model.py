"""Whole models for inference: our models, pruned and unpruned, compared with the alternatives."""

import tempfile
from functools import partial
from pathlib import Path

import torch

import pruneattn
from bench.harness import engines, peers
from bench.harness.case import Provider, left_out
from bench.harness.cuda_clock import captured
from bench.harness.guards import WrongResult
from bench.harness.subject import Subject, call_at_keep_rate
from bench.harness.token_drop import DROPS
from bench.harness.token_merging import MergingViT, merging_for, merging_macs
from pruneattn.runtime.timing import attention_kernels, with_sdpa

LEVELS = ("model",)


def providers(case, sizes, folder):
    torch.compiler.reset()
    subject = Subject(case)
    return [
        *ours(subject, sizes),
        *dense(subject, sizes),
        *inference_engines(subject, folder),
        *published_attention(subject, sizes),
        *library_models(subject, sizes),
        *token_merging(subject, sizes),
        *token_drops(subject, sizes),
    ]


def ours(subject, sizes):
    """Our model in each variant."""
    fbank, fast = subject.input, subject.fast_backend
    for rate in sizes.keep_rates:
        variant = {"name": "ours", "keep_rate": rate, "work": subject.work(rate)}
        check = subject.check(rate)
        kept = partial(_kept, subject.fast, rate)
        yield Provider(
            call=partial(call_at_keep_rate, subject.fast, rate, fbank),
            check=subject.check(rate, kept),
            backend=fast,
            **variant,
        )
        if fast != "eager" and (rate == 1 or sizes.all_ways):
            yield Provider(
                call=partial(call_at_keep_rate, subject.plain, rate, fbank), check=check, backend="eager", **variant
            )
        if sizes.compiles_ours(subject.case.batch, rate):
            compiled = peers.compiled(subject.copy_at(rate), fbank)
            yield Provider(call=partial(compiled, fbank), check=check, backend="compiled", **variant)
        if fbank.is_cuda:
            model = subject.copy_at(rate)
            with torch.inference_mode():
                model(fbank)  # compiles and allocates, which cannot be captured
                replay = captured(partial(model, fbank))
            why_not = "" if replay else "the model cannot be captured"
            yield Provider(call=replay, check=check, backend="CUDA graph", why_not=why_not, **variant)


def _kept(model, keep_rate, fbank):
    with pruneattn.at_keep_rate(model, keep_rate):
        return pruneattn.trace(model, fbank).kept


def dense(subject, sizes):
    """The unpruned model with PyTorch's attention: with each of its kernels, and compiled."""
    model, fbank = with_sdpa(subject.copy_at(1.0)), subject.input
    variant = {"name": "SDPA", "keep_rate": 1.0, "work": subject.work(), "check": subject.check()}
    yield Provider(call=partial(model, fbank), backend="eager", **variant)
    if fbank.is_cuda:
        with torch.inference_mode():
            kernels = list(attention_kernels(model, fbank))
        for backend, forced, why_not in kernels:
            yield Provider(
                call=None if why_not else partial(forced, fbank), backend=backend, why_not=why_not, **variant
            )
    if sizes.compiles(subject.case.batch):
        yield Provider(call=partial(peers.compiled(model, fbank), fbank), backend="compiled", **variant)
    else:
        yield left_out("SDPA", "not compiled at this batch without --bench-full", backend="compiled", keep_rate=1.0)


def inference_engines(subject, folder):
    """The unpruned model in other engines."""
    path = Path(folder, "dense.onnx")
    write = partial(pruneattn.export_model, subject.model, path, "onnx")
    return engines.dense_providers(subject.case, path, write, subject.fbank, subject.check(), subject.work())


def published_attention(subject, sizes):
    """Published implementations, which compute the whole softmax matrix, and fused attention with a separate score."""
    ways = [(peers.PAPER, peers.PapersAttention, sizes.keep_rates)]
    ways.append((peers.SEPARATE_SCORE, peers.SeparateScoreAttention, sizes.peer_rates))
    for name, attention, rates in ways:
        for rate in rates:
            model = peers.PapersViT(subject.plain, rate, attention)
            work = subject.work(rate, macs_computed=model.macs())
            check = subject.check(rate, model.kept)
            yield Provider(name, partial(model, subject.input), check, "eager", rate, work)


def library_models(subject, sizes):
    """The other library's model: eager, compiled, with ``pruneattn.prune``, and also with our packed layers."""
    name, make = peers.library_model(subject.model)
    why_not = peers.why_not(name)
    if why_not:
        yield left_out(name, why_not)
        return
    fbank, work = subject.input, subject.work()
    model = make(subject.plain)
    yield Provider(name, partial(model, fbank), subject.check(), "eager", 1.0, work)
    if sizes.compiles(subject.case.batch):
        yield Provider(name, partial(peers.compiled(model, fbank), fbank), subject.check(), "compiled", 1.0, work)
    for rate in sizes.peer_rates:
        model = make(subject.plain)
        pruneattn.prune(model.model, rate, score=subject.model.score)
        yield Provider(name, partial(model, fbank), subject.check(rate), "pruneattn.prune", rate, subject.work(rate))
    if subject.fast_backend == "optimized":
        for rate in (1.0, *sizes.peer_rates):
            model = make(subject.plain)
            pruneattn.prune(model.model, rate, score=subject.model.score)
            pruneattn.optimize_for_inference(model.model)
            check, work = subject.check(rate), subject.work(rate)
            yield Provider(name, partial(model, fbank), check, "pruneattn.prune, optimized", rate, work)


def token_merging(subject, sizes):
    """Token merging on our layers, with as many MACs as pruning."""
    for rate in sizes.peer_rates:
        r = merging_for(subject.model, subject.work(rate).macs_paper // subject.case.batch)
        model = MergingViT(subject.fast, r)
        paper, computed = merging_macs(subject.model, r)
        work = subject.work(macs_paper=paper, macs_computed=computed)
        check = partial(_check_merging, subject, model)
        yield Provider("token merging", partial(model, subject.input), check, subject.fast_backend, rate, work)


def _check_merging(subject, model, logits):
    """Check that merging changes the logits, that the sizes add up, and that without merging the result is that of the
    unpruned model.
    """
    subject.check_shape(logits)
    subject.check()(MergingViT(model.model, 0)(subject.input))
    sizes = model.merge_features(subject.input)[1]
    if not torch.allclose(sizes.sum(1), sizes.new_tensor(float(subject.case.tokens))):
        raise WrongResult("the sizes of the remaining tokens do not add up to the number of input tokens")


def token_drops(subject, sizes):
    """A lower bound: the same blocks with a selection that needs no score."""
    for name, score in DROPS.items():
        model = subject.made_fast(subject.with_score(score))
        for rate in sizes.peer_rates:
            work = subject.work(rate, macs_computed=pruneattn.count_macs(model, rate).computed)
            check = partial(_check_drop, subject, model, rate)
            yield Provider(
                name, partial(call_at_keep_rate, model, rate, subject.input), check, subject.fast_backend, rate, work
            )


def _check_drop(subject, model, rate, logits):
    subject.check_shape(logits)
    kept, expected = _kept(model, rate, subject.input), subject.expected(rate).kept
    for block, (index, reference) in enumerate(zip(kept, expected, strict=True)):
        if index.shape != reference.shape or not (index.diff(dim=1) > 0).all():
            raise WrongResult(f"keeps other than {reference.shape[1]} different patches in pruning block {block}")


def test_model(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, providers(case, sizes, folder))
