"""One pruning block: the whole block of each provider, and the parts of our block."""

from functools import partial

import torch

import pruneattn
from bench.harness import peers
from bench.harness.block_parts import part_rows
from bench.harness.case import Provider, Work
from bench.harness.guards import TOLERANCE, WrongResult, check_close, check_same
from bench.harness.subject import Subject
from bench.harness.token_drop import DROPS
from bench.harness.token_merging import matching_macs, mergeable, merging_block
from pruneattn.models.blocks import kept_patches
from pruneattn.models.macs import block_macs
from pruneattn.runtime.timing import with_sdpa

LEVELS = ("block",)


def make_subject(case):
    """Make a model of one block, which prunes, and the block's input ``[B, N, C]``."""
    subject = Subject(case, depth=1, prune_blocks=(0,))
    return subject, torch.randn(case.batch, case.tokens, subject.model.embed_dim, device=case.device).to(
        case.torch_dtype
    )


def providers(case, sizes):
    subject, x = make_subject(case)
    return [*_exact(subject, x, sizes), *_approximate(subject, x, sizes)]


def _exact(subject, x, sizes):
    """Providers that keep the same patches as the reference."""
    sdpa = with_sdpa(subject.copy_at(1.0))
    yield Provider("SDPA", partial(sdpa.blocks[0], x, 1.0), _check(subject, x, 1.0), "eager", 1.0, _work(subject, 1.0))
    for rate in sizes.keep_rates:
        check, work = _check(subject, x, rate), _work(subject, rate)
        for model, backend in {subject.fast: subject.fast_backend, subject.plain: "eager"}.items():
            yield Provider("ours", partial(model.blocks[0], x, rate), check, backend, rate, work)
        for name, attention in PUBLISHED_ATTENTION.items():
            if attention is peers.PapersAttention or rate in sizes.peer_rates:
                block = peers.PapersViT(subject.plain, rate, attention).blocks[0]
                theirs = work._replace(macs_computed=subject.case.batch * block.macs(subject.model.num_patches)[0])
                yield Provider(name, partial(block, x), check, "eager", rate, theirs)


PUBLISHED_ATTENTION = {peers.PAPER: peers.PapersAttention, peers.SEPARATE_SCORE: peers.SeparateScoreAttention}


def _approximate(subject, x, sizes):
    """Providers that keep other patches or merge tokens; the number of remaining tokens is the same."""
    for rate in sizes.peer_rates:
        for name, score in DROPS.items():
            model = subject.made_fast(subject.with_score(score))
            call = partial(model.blocks[0], x, rate)
            yield Provider(
                name, call, _check_count(subject, rate), subject.fast_backend, rate, _work(subject, rate, model)
            )
        extra, patches = subject.model.num_extra_tokens, subject.model.num_patches
        r = mergeable(extra + patches, patches - kept_patches(patches, rate), extra)
        merging = partial(merging_block, subject.fast.blocks[0], x, None, r, extra)
        yield Provider(
            "token merging",
            merging,
            _check_count(subject, rate, r),
            subject.fast_backend,
            rate,
            _merging_work(subject, r),
        )


def _work(subject, keep_rate, model=None):
    paper, computed = pruneattn.count_macs(model or subject.model, keep_rate).blocks[0]
    return _block_work(subject, paper, computed)


def _merging_work(subject, r):
    dim, tokens = subject.model.embed_dim, subject.case.tokens
    paper = block_macs(tokens, tokens - r, dim)
    return _block_work(subject, paper, paper + matching_macs(tokens, dim // subject.model.num_heads))


def _block_work(subject, paper, computed):
    case, block = subject.case, subject.plain.blocks[0]
    weights = sum(parameter.numel() for parameter in block.parameters())
    tokens = case.batch * case.tokens * subject.model.embed_dim
    return Work(case.batch * paper, case.batch * computed, (weights + tokens) * case.torch_dtype.itemsize)


def _check(subject, x, keep_rate):
    """Make a check of the tokens and, if the block prunes, of the patches kept, in any order."""
    with torch.inference_mode(), pruneattn.use_backend("reference"):
        expected, index = subject.model.blocks[0](x.float(), keep_rate)[:2]
    return partial(_check_block, subject, keep_rate, expected, index)


def _check_block(subject, keep_rate, expected, index, result):
    x, places = result[:2] if isinstance(result, tuple) else (result, None)
    if index is not None:
        extra, dtype = subject.model.num_extra_tokens, subject.case.torch_dtype
        places, order = places.sort(1)
        x = torch.cat([x[:, :extra], x[:, extra:].gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))], 1)
        if dtype != torch.float32:  # the order of close scores changes
            _check_count(subject, keep_rate)(result)
            return
        check_same("the patches kept", places, index)
    check_close("the tokens", x, expected, TOLERANCE[subject.case.torch_dtype])


def _check_count(subject, keep_rate, r=None):
    """Make a check of the number of remaining tokens, of which `r` were merged."""
    extra, patches = subject.model.num_extra_tokens, subject.model.num_patches
    left = extra + kept_patches(patches, keep_rate) if r is None else extra + patches - r

    def check(result):
        x = result[0]
        if x.shape[1] != left or not x.isfinite().all():
            raise WrongResult(f"leaves {x.shape[1]} tokens instead of {left}, or values that are not finite")

    return check


def test_block(measure, case, sizes):
    measure(case, providers(case, sizes))


def test_parts(record, run, case, sizes):
    subject, x = make_subject(case)
    record(partial(part_rows, subject, x, sizes.keep_rates[-1], sizes.rounds, run.seen))
