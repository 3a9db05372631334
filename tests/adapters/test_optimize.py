"""`optimize_for_inference` of models of other libraries, against the same models before it."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models.optimize import can_pack

KINDS = ["ast", "whisper", "whisper_decoder", "whisper_classifier", "timm", "timm_parts", "plain", "registered"]
PICKLED = KINDS[:6]  # the classes of the others are defined in files that pickle cannot import
LAYERS = {
    "timm": 4,
    "timm_parts": 4,
    "plain": 4,
    "registered": 3,
}  # of a block; nn.MultiheadAttention has none for q, k, v
DEPTH, BLOCKS, RATES = 4, (1, 2), (0.5, 0.7)

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this PyTorch has no oneDNN")
needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="oneDNN has no bfloat16 on this machine"
)


def position(q, k, v, extra_tokens):
    """A score that is the same in every precision: the number of the patch."""
    return torch.arange(k.shape[2] - extra_tokens, dtype=torch.float32).expand(len(k), -1)


PRUNINGS = {"dense": (), "default": (None,), "column_mean": ("column_mean",), "function": (position,)}


@pytest.fixture(params=KINDS)
def subject(request, make_subject):
    return make_subject(request.param)


@pytest.fixture(params=PICKLED)
def saved_subject(request, make_subject):
    return make_subject(request.param)


@pytest.mark.parametrize("pruning", PRUNINGS.values(), ids=PRUNINGS)
def test_same_output_at_any_keep_rate(subject, pruning, packed, assert_close):
    if pruning:
        subject.prune(RATES, BLOCKS, *pruning)
    fast = subject.copy()
    assert optimize_for_inference(fast.model) is fast.model and not fast.model.training
    split = len(BLOCKS) if pruning == (None,) and subject.kind in ("timm", "timm_parts", "plain") else 0  # "q", "kv"
    assert len(packed(fast.model)) == DEPTH * LAYERS.get(subject.kind, 6) + split
    with torch.no_grad():
        assert_close(fast.call(), subject.call())
        if not pruning:
            return
        for rate in (1.0, 0.3, (0.9, 0.5)):
            for model in (subject.model, fast.model):
                pruneattn.set_keep_rate(model, rate)
            assert_close(fast.call(), subject.call())
        pruneattn.unprune(subject.trunk)
        with pruneattn.at_keep_rate(fast.model, 1.0):
            assert_close(fast.call(), subject.call())


@needs_bf16
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(make_subject, kind, pruned, packed):
    """As close to float32 as the same model cast to bfloat16 without packing. Inputs are float32."""
    subject = make_subject(kind, batch=16)  # the error of a few outputs depends on chance
    if pruned:
        subject.prune(RATES, BLOCKS, position)
    cast = copy.deepcopy(subject.model).bfloat16()
    fast = optimize_for_inference(copy.deepcopy(subject.model), torch.bfloat16)
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in subject.inputs.items()}
    with torch.no_grad():
        truth, given, expected = subject.call(), subject.call(fast), subject.call(cast, **inputs)
    assert given.dtype == torch.bfloat16 and len(packed(fast)) >= DEPTH * 3
    assert (given - truth).norm() <= 1.5 * (expected - truth).norm()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["ast", "whisper"])
def test_attention_implementations_of_transformers(make_subject, kind, implementation, assert_close):
    subject = make_subject(kind, attn_implementation=implementation)
    expected = subject.call()
    assert_close(subject.call(optimize_for_inference(subject.model)), expected.detach())


@pytest.mark.parametrize("kind", ["ast", "whisper", "timm"])
def test_every_block_runs_our_attention_and_fused_steps(make_subject, kind):
    subject = make_subject(kind)
    fast = optimize_for_inference(pruneattn.prune(subject.model, 0.5, BLOCKS, "column_mean"))
    with torch.no_grad(), torch.profiler.profile() as profile:
        subject.call(fast)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["pruneattn::attention"] == 2 and calls["pruneattn::pruned_attention"] == 2
    assert calls["mkldnn::_linear_pointwise"] == DEPTH * LAYERS.get(kind, 6)
    tokens = torch.randn(2, 12, 24)
    with torch.no_grad(), torch.profiler.profile() as profile:
        subject.blocks[0](tokens)
    names = {event.key for event in profile.key_averages()}
    assert "mkldnn::_linear_pointwise" in names
    assert not names & {"aten::gelu", "aten::linear", "aten::add", "aten::scaled_dot_product_attention"}


def test_weights_names_and_copies(saved_subject, tmp_path, packed):
    model = saved_subject.prune(RATES, BLOCKS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = optimize_for_inference(model)
    after = fast.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    expected = saved_subject.call(fast)
    torch.save(fast, tmp_path / "model.pt")
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    for again in (*copies, torch.load(tmp_path / "model.pt", weights_only=False)):
        assert packed(again) == packed(fast)
        assert torch.equal(saved_subject.call(again), expected)
        with pytest.raises(UserError, match="cannot be moved or cast"):
            again.double()
        pruneattn.set_keep_rate(again, 1.0)
        assert not torch.equal(saved_subject.call(again), expected)
        assert torch.equal(saved_subject.call(fast), expected)


@pytest.mark.parametrize("kind", ["ast", "whisper", "whisper_decoder"])
def test_save_pretrained(make_subject, kind, tmp_path, assert_close):
    subject = make_subject(kind)
    subject.model.save_pretrained(tmp_path / "before")
    expected = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    fast = optimize_for_inference(subject.model)
    fast.save_pretrained(tmp_path / "after")
    config = [(tmp_path / folder / "config.json").read_text() for folder in ("before", "after")]
    assert config[0] == config[1]
    loaded = type(subject.model).from_pretrained(tmp_path / "after").eval()
    state = loaded.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in expected.items()) and not state
    assert_close(subject.call(fast), subject.call(loaded).detach())


@pytest.mark.parametrize("kind", ["timm", "timm_parts", "plain", "registered"])
def test_saved_weights_load_into_a_plain_model(make_subject, kind, assert_close):
    subject = make_subject(kind)
    plain = copy.deepcopy(subject.model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(optimize_for_inference(subject.model).state_dict())
    assert_close(subject.call(), subject.call(plain).detach())


def test_layers_without_bias_get_none(make_subject):
    model = optimize_for_inference(make_subject("whisper").model)
    names = [name for name in model.state_dict() if "k_proj" in name]
    assert names == [f"layers.{i}.self_attn.k_proj.weight" for i in range(DEPTH)]
    model = optimize_for_inference(make_subject("timm_parts").model)
    assert not [name for name in model.state_dict() if "qkv.bias" in name]


# Rejected changes -----------------------------------------------------------------------------------------------------


def move_part(subject):
    subject.blocks[0].double()


def load_in_a_holder(subject):
    holder = nn.ModuleDict({"m": subject.model})
    holder.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in holder.state_dict().items()})


def load(subject):
    subject.model.load_state_dict({name: torch.zeros_like(x) for name, x in subject.model.state_dict().items()})


def run_with_gradients(subject):
    subject.call(**{name: x.clone().requires_grad_() for name, x in subject.inputs.items() if x.is_floating_point()})


def run_in_training_mode(subject):
    try:
        subject.call(subject.model.train())
    finally:
        subject.model.eval()


def run_in_autocast(subject):
    with torch.autocast("cpu", torch.bfloat16):
        subject.call()


def optimize_again(subject):
    optimize_for_inference(subject.model, torch.bfloat16)


@pytest.mark.parametrize(
    "action, message",
    [
        (lambda subject: subject.model.double(), "cannot be moved or cast: move or cast it first"),
        (lambda subject: subject.model.to("meta"), "cannot be moved or cast"),
        (lambda subject: subject.trunk.half(), "cannot be moved or cast"),
        (lambda subject: nn.Sequential(subject.model).bfloat16(), "cannot be moved or cast"),
        (move_part, "cannot be moved or cast"),
        (load, "accepts no new weights: load them first"),
        (load_in_a_holder, "accepts no new weights: load them first"),
        (run_with_gradients, "has no gradients: load it again to train it"),
        (run_in_training_mode, r"training: .* call eval\(\), or load it again"),
        (run_in_autocast, "autocast: the model was optimized for inference"),
        (optimize_again, "already packed in torch.float32: load it again"),
        (lambda subject: optimize_for_inference(subject.model, torch.float16), "got torch.float16"),
    ],
)
@pytest.mark.parametrize("kind", ["ast", "whisper_decoder", "timm"])
def test_rejected_uses_change_nothing(make_subject, kind, action, message):
    subject = make_subject(kind)
    optimize_for_inference(subject.model)
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    expected = subject.call()
    with pytest.raises(UserError, match=message):
        action(subject)
    after = subject.model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].dtype == x.dtype and torch.equal(after[name], x) for name, x in before.items())
    assert torch.equal(subject.call(), expected)


def test_models_that_cannot_be_packed_do_not_change(make_subject, plain, packed):
    for model in (nn.Linear(2, 2), nn.Sequential(make_subject("plain").model)):
        with pytest.raises(UserError, match="optimize_for_inference: .* has no known list of blocks"):
            optimize_for_inference(model)
    model = make_subject("plain").model.train()
    model.blocks[3].norm3 = nn.LayerNorm(24)
    with pytest.raises(UserError, match=r"blocks\[3\] \(PlainBlock\) has 'norm3'"):
        optimize_for_inference(model, torch.bfloat16)
    assert model.training and not packed(model)
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, True)}
    assert {type(block) for block in model.blocks} == {plain.Block} and not model._forward_pre_hooks


def test_a_second_call_returns_the_model(subject, packed):
    fast = optimize_for_inference(subject.model)
    expected, names = subject.call(), packed(fast)
    assert optimize_for_inference(fast) is fast and optimize_for_inference(fast, torch.float32) is fast
    assert torch.equal(subject.call(), expected) and packed(fast) == names
    assert len(subject.trunk._forward_pre_hooks) <= 2


# With pruning ---------------------------------------------------------------------------------------------------------


def test_pruning_after_optimizing(subject, assert_close):
    plain, dense = subject.copy(), subject.call().detach()
    fast = optimize_for_inference(subject.model)
    for score in (None, "column_mean"):
        plain.prune(RATES, BLOCKS, score)
        subject.prune(RATES, BLOCKS, score)
        assert_close(subject.call(), plain.call().detach())
    assert pruneattn.unprune(subject.trunk) is subject.trunk
    assert_close(subject.call(fast), dense)
    with pytest.raises(UserError, match="no block"):
        pruneattn.set_keep_rate(fast, 0.5)
    with pytest.raises(UserError, match="cannot be moved or cast"):
        fast.double()


def test_the_joint_projection_is_packed_in_the_parts_of_the_score(make_subject):
    model = optimize_for_inference(make_subject("timm").model)

    def groups():
        return [tuple(block.attn.qkv.packed) for block in model.blocks]

    assert groups() == [("qkv",)] * 4
    assert [tuple(b.attn.qkv.packed) for b in pruneattn.prune(model, 0.5, (1,), "cls").blocks][1] == ("q", "kv")
    pruneattn.prune(model, 0.5, (2,), "column_mean")
    assert groups() == [("qkv",)] * 4
    pruneattn.prune(model, 0.5, (2,), "cls")
    assert groups() == [("qkv",)] * 2 + [("q", "kv")] + [("qkv",)]
    pruneattn.unprune(model)
    assert groups() == [("qkv",)] * 4


def test_masks_and_attention_weights(make_subject, assert_close):
    """Only pruning needs all tokens. Masks need the block's own attention, which then runs packed layers."""
    subject = make_subject("timm")
    mask = torch.rand(17, 17, generator=torch.Generator().manual_seed(0)) > 0.5
    mask.fill_diagonal_(True)
    expected = subject.call(attn_mask=mask).detach()
    fast = optimize_for_inference(subject.model)
    assert_close(subject.call(attn_mask=mask), expected)
    assert fast.forward_intermediates(**subject.inputs)[1][-1].shape == (2, 24, 4, 4)
    pruneattn.prune(fast, 0.5, BLOCKS)
    with pytest.raises(UserError, match=r"blocks\[1\]: a pruned model takes no attention mask .* got attn_mask"):
        subject.call(attn_mask=mask)
    with pytest.raises(UserError, match="no complete grid"):
        fast.forward_intermediates(**subject.inputs)


def test_hidden_states_and_attentions_of_an_ast(make_subject, assert_close):
    subject = make_subject("ast", attn_implementation="eager")
    expected = subject.model(**subject.inputs, output_hidden_states=True).hidden_states
    fast = optimize_for_inference(subject.model)

    def check():
        with pytest.raises(UserError, match="output_attentions: a pruned or optimized model takes no masks"):
            fast(**subject.inputs, output_attentions=True)

    for given, one in zip(fast(**subject.inputs, output_hidden_states=True).hidden_states, expected, strict=True):
        assert_close(given, one.detach())
    check()
    pruneattn.prune(fast, 0.5, BLOCKS)
    check()
    pruneattn.unprune(fast)
    check()


def test_the_model_itself_is_optimized_inside_the_wrapper_of_torch_compile(make_subject, packed):
    subject = make_subject("timm")
    compiled = torch.compile(subject.model, backend="eager")
    assert optimize_for_inference(compiled) is subject.model and packed(subject.model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ast", "whisper", "timm"])
def test_compiled_models_run_packed_layers(make_subject, kind):
    torch._dynamo.reset()
    subject = make_subject(kind)
    fast = optimize_for_inference(pruneattn.prune(subject.model, 0.5, BLOCKS))
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        assert torch.equal(subject.call(compiled), subject.call(fast))
        pruneattn.set_keep_rate(compiled, 0.3)
        assert torch.equal(subject.call(compiled), subject.call(fast))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_without_onednn_the_model_runs_unpacked(subject, monkeypatch, dtype, packed):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = copy.deepcopy(subject.model).to(dtype=dtype).requires_grad_(False)
    inputs = {name: x.to(dtype) if x.is_floating_point() and dtype else x for name, x in subject.inputs.items()}
    expected = subject.call(plain, **inputs)
    for _ in range(2):
        assert optimize_for_inference(subject.model, dtype) is subject.model
        assert torch.equal(subject.call(), expected)
    assert not packed(subject.model) and not any(p.requires_grad for p in subject.model.parameters())
    assert len(subject.trunk._forward_pre_hooks) <= 1
