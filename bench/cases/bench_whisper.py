"""Whisper's encoder, dense and pruned by ``pruneattn.prune``, compared with other engines."""

import copy
import os
import tempfile
from functools import partial
from pathlib import Path

import torch

import pruneattn
from bench.harness import engines, peers
from bench.harness.case import Provider, Work, left_out
from bench.harness.guards import TOLERANCE, check_close
from bench.harness.machine import ROOT, version
from bench.harness.subject import PRUNED_TOLERANCE
from pruneattn.models.blocks import kept_patches
from pruneattn.models.macs import block_macs

LEVELS = ("whisper",)
PRUNE_BLOCKS = (1,)
TRANSFORMERS = "transformers"


def providers(case, sizes, folder):
    source = weights(case.subject)
    if source is None:
        yield left_out(case.subject, f"no folder {case.subject} in PRUNEATTN_MODELS")
        return
    if version("transformers") is None:
        yield left_out(TRANSFORMERS, "transformers is not installed")
        return
    torch.compiler.reset()
    exact = encoder_of(source, torch.float32)
    plain = copy.deepcopy(exact).to(case.device, case.torch_dtype)
    config = exact.config
    mels = torch.randn(case.batch, config.num_mel_bins, 2 * case.tokens, device=case.device)
    inputs = mels.to(case.torch_dtype)
    for rate in sizes.keep_rates:
        work = Work(case.batch * macs(config, case.tokens, rate))
        variant = {"keep_rate": rate, "work": work, "check": check_at(exact, mels, rate, case.torch_dtype)}
        pruned = copy.deepcopy(plain)
        if rate < 1:
            pruneattn.prune(pruned, rate, PRUNE_BLOCKS)
            yield Provider(TRANSFORMERS, call(pruned, inputs), backend="pruneattn.prune", **variant)
        else:
            yield Provider(TRANSFORMERS, call(plain, inputs), backend="eager", **variant)
            compiled = peers.compiled(plain, inputs)
            yield Provider(TRANSFORMERS, call(compiled, inputs), backend="compiled", **variant)
            yield from dense_engines(case, source, exact, mels, folder, variant)
        if case.device == "cpu":
            fast = pruneattn.optimize_for_inference(copy.deepcopy(pruned), case.torch_dtype)
            yield Provider("ours", call(fast, inputs), backend="optimized", **variant)


def weights(name):
    """Folder of the model's weights; None if there is none."""
    folders = (os.environ.get("PRUNEATTN_MODELS"), ROOT.parent / "shared" / "models")
    return next((Path(folder, name) for folder in folders if folder and Path(folder, name).is_dir()), None)


def encoder_of(source, dtype):
    import transformers

    model = transformers.WhisperForConditionalGeneration.from_pretrained(
        source, dtype=dtype, attn_implementation="sdpa"
    )
    return model.get_encoder().eval()


def call(encoder, inputs):
    return lambda: encoder(inputs).last_hidden_state


@torch.inference_mode()
def check_at(exact, mels, rate, dtype):
    """Check of hidden states against the float32 encoder, pruned by the reference ops."""
    model = copy.deepcopy(exact).to(mels.device)
    with pruneattn.use_backend("reference"):
        if rate < 1:
            pruneattn.prune(model, rate, PRUNE_BLOCKS)
        expected = model(mels).last_hidden_state
    if rate == 1 or dtype == torch.float32:
        return partial(check_close, "hidden states", expected=expected, tolerance=PRUNED_TOLERANCE[dtype])
    # In half precision the order of close scores changes, and with it the rows: their mean is compared.
    tolerance = TOLERANCE[dtype]
    return lambda out: check_close("means of hidden states", out.mean(1), expected.mean(1), tolerance)


def dense_engines(case, source, exact, mels, folder, variant):
    """The unpruned encoder in ONNX Runtime, OpenVINO and CTranslate2."""
    path = Path(folder, "encoder.onnx")
    write = partial(torch.onnx.export, exact, (mels.cpu(),), path, dynamo=True, external_data=False, verbose=False)
    yield from engines.dense_providers(case, path, write, mels, variant["check"], variant["work"])
    why_not = engines.why_not(engines.CTRANSLATE2, case.device, case.torch_dtype)
    if why_not:
        yield left_out(engines.CTRANSLATE2, why_not, keep_rate=1.0)
        return
    encode = engines.open_whisper(source, Path(folder, "ctranslate2"), case.torch_dtype)
    yield Provider(engines.CTRANSLATE2, partial(encode, mels), **variant)


def macs(config, tokens, keep_rate):
    """Multiply-accumulates of one clip's blocks by the paper's count, and of the two convolutions before them."""
    dim = config.d_model
    total = 3 * dim * (2 * tokens * config.num_mel_bins + tokens * dim)
    for number in range(config.encoder_layers):
        left = kept_patches(tokens, keep_rate) if number in PRUNE_BLOCKS else tokens
        total += block_macs(tokens, left, dim)
        tokens = left
    return total


def test_whisper(measure, case, sizes):
    with tempfile.TemporaryDirectory() as folder:
        measure(case, list(providers(case, sizes, folder)))
