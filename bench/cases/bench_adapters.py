"""timm's image models, unpruned and with ``pruneattn.prune``. (`bench_model.py` has the audio models.)"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch

import pruneattn
from bench.harness import engines, peers
from bench.harness.case import Provider, Work, left_out
from bench.harness.guards import TOLERANCE, check_close, check_same
from bench.harness.subject import PRUNED_TOLERANCE
from pruneattn.constants import PATCH
from pruneattn.models.blocks import kept_patches
from pruneattn.models.macs import block_macs

LEVELS = ("adapters",)
PRUNE_BLOCKS = (3, 6, 9)


def providers(case, sizes, folder):
    why_not = peers.why_not(peers.TIMM)
    if why_not:
        yield left_out("timm", why_not)
        return
    import timm

    torch.manual_seed(0)
    torch.compiler.reset()
    source = timm.create_model(case.subject).eval()  # float32, on the CPU
    plain = copy.deepcopy(source).to(case.device, case.torch_dtype)
    images = torch.randn(case.batch, 3, 224, 224, device=case.device).to(case.torch_dtype)
    for rate in sizes.keep_rates:
        expected = _exact(source, images, rate)
        model, backend = plain, "eager"
        if rate < 1:
            model, backend = pruneattn.prune(copy.deepcopy(plain), rate, PRUNE_BLOCKS), "pruneattn.prune"
        tolerance = TOLERANCE[case.torch_dtype] if rate == 1 else PRUNED_TOLERANCE[case.torch_dtype]
        check = partial(check_close, "logits", expected=expected, tolerance=tolerance)
        work = Work(case.batch * _macs(source, rate))
        yield Provider("timm", partial(model, images), check, backend, rate, work)
        if rate == 1:
            untouched = pruneattn.prune(copy.deepcopy(plain), 1.0, PRUNE_BLOCKS)
            same = partial(_check_untouched, plain, images)
            yield Provider("timm", partial(untouched, images), same, "pruneattn.prune", rate, work)
            path = Path(folder, "dense.onnx")
            write = partial(pruneattn.export_model, source, path, "onnx", example=images.float())
            yield from engines.dense_providers(case, path, write, images, check, work)
        if case.device == "cpu":
            fast = pruneattn.optimize_for_inference(copy.deepcopy(model))
            how = "optimized" if rate == 1 else "pruneattn.prune, optimized"
            yield Provider("timm", partial(fast, images), check, how, rate, work)
        if sizes.compiles(case.batch) and (rate == 1 or sizes.all_ways):
            how = "compiled" if rate == 1 else "pruneattn.prune, compiled"
            yield Provider("timm", partial(peers.compiled(model, images), images), check, how, rate, work)


@torch.inference_mode()
def _exact(source, images, rate):
    """Logits of the float64 model, pruned by the reference ops. (Tests compare these with plain code.)"""
    model = copy.deepcopy(source).double().to(images.device)
    with pruneattn.use_backend("reference"):
        if rate < 1:
            pruneattn.prune(model, rate, PRUNE_BLOCKS)
        return model(images.double())


@torch.inference_mode()
def _check_untouched(plain, images, logits):
    check_same("logits at keep-rate 1", logits, plain(images))


def _macs(model, keep_rate):
    """Multiply-accumulates of one image by the paper's count."""
    dim, patches = model.embed_dim, model.patch_embed.num_patches
    total = patches * 3 * PATCH**2 * dim
    for number in range(len(model.blocks)):
        tokens = patches + model.num_prefix_tokens
        if number in PRUNE_BLOCKS:
            patches = kept_patches(patches, keep_rate)
        total += block_macs(tokens, patches + model.num_prefix_tokens, dim)
    return total


def test_adapters(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
