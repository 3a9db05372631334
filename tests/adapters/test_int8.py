"""`optimize_for_inference` with 8-bit weights, for models of other libraries."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models import quantize
from pruneattn.models.packed import Int8Linear, PackedLinear

KINDS = ["ast", "whisper", "whisper_decoder", "whisper_classifier", "timm", "timm_parts", "plain", "registered"]
PICKLED = KINDS[:6]  # the classes of the others are defined in files that pickle cannot import
LAYERS = {"timm": 4, "timm_parts": 4, "plain": 4, "registered": 3}  # of a block; 6 elsewhere
DEPTH, BLOCKS, RATES = 4, (1, 2), (0.5, 0.7)

pytestmark = [
    pytest.mark.skipif(bool(quantize.why_not_int8()), reason="8-bit weights are slow on this machine"),
    pytest.mark.filterwarnings("ignore:the model was optimized with dtype=torch.int8"),
]


def position(q, k, v, extra_tokens):
    """A score that is the same in every precision: the number of the patch."""
    return torch.arange(k.shape[2] - extra_tokens, dtype=torch.float32).expand(len(k), -1)


def count(model):
    return sum(isinstance(module, Int8Linear) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_float32(make_subject, monkeypatch, kind, pruned, dtype):
    if dtype == torch.bfloat16 and quantize.float_dtype() != dtype:
        pytest.skip("no products of bfloat16 on this machine")
    monkeypatch.setattr(quantize, "float_dtype", lambda: dtype)
    subject = make_subject(kind, batch=4)
    if pruned:
        subject.prune(RATES, BLOCKS, position)
    fast = subject.copy()
    assert optimize_for_inference(fast.model, torch.int8) is fast.model
    assert count(fast.model) == DEPTH * LAYERS.get(kind, 6)
    for rate in (RATES, 1.0) if pruned else (None,):
        if rate is not None:
            pruneattn.set_keep_rate(subject.model, rate)
            pruneattn.set_keep_rate(fast.model, rate)
        with torch.no_grad():
            truth, given = subject.call(), fast.call()
        assert given.dtype == dtype and 0 < (given - truth).norm() < 0.1 * truth.norm()
    assert fast.model.quantization.dtype == dtype and not fast.model.quantization.kept


@pytest.mark.parametrize("kind", KINDS)
def test_nan_changes_its_clip_only(make_subject, kind):
    subject = make_subject(kind, batch=3)
    optimize_for_inference(subject.prune(RATES, BLOCKS), torch.int8)
    expected = subject.call()
    name, x = next((name, x) for name, x in subject.inputs.items() if x.is_floating_point())
    x = x.clone()
    x[1].flatten()[7] = torch.nan
    given = subject.call(**{name: x})
    assert given[1].isnan().any() and torch.equal(given[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_with_any_number_of_threads(make_subject, kind):
    subject, threads = make_subject(kind, batch=3), torch.get_num_threads()
    optimize_for_inference(subject.prune(RATES, BLOCKS), torch.int8)
    try:
        results = []
        for number in (1, 2, 1):
            torch.set_num_threads(number)
            results.append(subject.call())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", PICKLED)
def test_copies_and_pickles(make_subject, kind):
    subject = make_subject(kind)
    fast = optimize_for_inference(subject.prune(RATES, BLOCKS), torch.int8)
    expected = subject.call()
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(subject.call(again), expected) and again.quantization == fast.quantization
        with pytest.raises(UserError, match="cannot be moved or cast"):
            again.double()
        pruneattn.set_keep_rate(again, 1.0)
        assert not torch.equal(subject.call(again), expected) and torch.equal(subject.call(), expected)


@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_save_pretrained_writes_dequantized_weights(make_subject, kind, tmp_path):
    subject = make_subject(kind)
    names = list(subject.model.state_dict())
    fast = optimize_for_inference(subject.model, torch.int8)
    with pytest.warns(UserWarning, match="its state_dict has dequantized weights"):
        fast.save_pretrained(tmp_path)
    loaded = type(fast).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert list(fast.state_dict()) == names
    for name, layer in fast.named_modules():
        if isinstance(layer, Int8Linear):
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight)
    expected = subject.call()
    assert (subject.call(loaded) - expected).norm() < 0.1 * expected.norm()


def test_pruning_after_optimizing(make_subject):
    """The joint projection is split into the parts of the score, and keeps its 8-bit weights."""
    for kind in ("timm", "ast", "whisper"):
        before, after = make_subject(kind), make_subject(kind)
        optimize_for_inference(before.prune(RATES, BLOCKS), torch.int8)
        dense = optimize_for_inference(after.model, torch.int8)
        expected = after.call()
        after.prune(RATES, BLOCKS)
        assert torch.equal(after.call(), before.call()) and not torch.equal(after.call(), expected)
        pruneattn.unprune(after.trunk)
        assert torch.equal(after.call(dense), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration(make_subject, kind):
    """An input channel of the first MLP is far larger than others, and does not matter for the output."""
    subject = make_subject(kind)
    paths = {"ast": "layernorm_after", "timm": "norm2", "timm_parts": "norm2", "plain": "norm2", "registered": "norm2"}
    norm = subject.blocks[1].get_submodule(paths.get(kind, "final_layer_norm"))
    first = next(
        m for m in list(subject.blocks[1].modules())[::-1] if getattr(m, "out_features", 0) > 24 and m.in_features == 24
    )
    with torch.no_grad():
        norm.bias[3] = 1e3
        first.weight[:, 3] = 0
    name = next(name for name, module in subject.model.named_modules() if module is first)
    subject.prune(RATES, BLOCKS)
    fast = optimize_for_inference(subject.model, torch.int8, [subject.inputs])
    errors = {error.layer: error for error in fast.quantization.errors}
    assert errors[name].of == "output" and name in [error.layer for error in fast.quantization.kept]
    assert type(fast.get_submodule(name)) is PackedLinear or type(fast.get_submodule(name)) is nn.Linear
    assert subject.call().isfinite().all()


def test_a_second_call(make_subject):
    subject = make_subject("timm")
    fast = optimize_for_inference(subject.model, torch.int8)
    assert all(optimize_for_inference(fast, dtype) is fast for dtype in (None, "auto", torch.int8))
    with pytest.raises(UserError, match="already packed in torch.int8: load it again"):
        optimize_for_inference(fast, torch.bfloat16)


@pytest.mark.parametrize("kind", ["ast", "whisper", "timm"])
def test_memory(make_subject, kind):
    subject = make_subject(kind)

    def matrices():
        tensors = [tensor for block in subject.blocks for tensor in (*block.parameters(), *block.buffers())]
        return sum(tensor.nbytes for tensor in tensors if tensor.dim() > 1)

    before = matrices()
    optimize_for_inference(subject.model, torch.int8)
    assert matrices() <= 0.5 * before  # 24 channels are padded to 32


def test_machines_on_which_8_bits_are_slow(make_subject, monkeypatch):
    subject = make_subject("timm")
    monkeypatch.setattr(quantize, "why_not_int8", lambda: "it has no instructions")
    with pytest.warns(UserWarning, match="slower on this machine: it has no instructions") as caught:
        optimize_for_inference(subject.model, torch.int8)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert not count(subject.model) and subject.call().dtype == quantize.float_dtype()
