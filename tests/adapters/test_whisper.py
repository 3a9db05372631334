"""Whisper's encoder: pruned and optimized, alone and within its models."""

import copy
import inspect
import os
import pickle
from pathlib import Path

import pytest
import torch

import pruneattn
from pruneattn import UserError, optimize_for_inference
from pruneattn.models.optimize import can_pack

transformers = pytest.importorskip("transformers")

HEADS, BLOCKS, RATES = 3, (1, 2), (0.5, 0.7)  # 12 tokens, then 6, then 5
SIZES = [12, 12, 6, 5, 5]

needs_onednn = pytest.mark.skipif(not can_pack(torch.zeros(1, 1)), reason="this PyTorch has no oneDNN")


@pytest.fixture
def make(make_subject):
    """``make(...)``: an encoder with random weights, float64, and its input."""

    def make(**arguments):
        subject = make_subject("whisper", **arguments)
        return subject.model.double(), subject.inputs["input_features"].double()

    return make


def key_norms(q, k, v, extra_tokens):
    assert extra_tokens == 0
    return k.norm(dim=-1).mean(1)


def names_of(layer):
    """Names of the arguments of a layer's own forward."""
    return inspect.signature(getattr(layer, "own_class", type(layer)).forward).parameters


def settings(score, **more):
    return {
        "heads": HEADS,
        "extra": 0,
        "score": score,
        "eps": 1e-5,
        "rates": dict(zip(BLOCKS, RATES, strict=True)),
        **more,
    }


@pytest.mark.parametrize("score", [None, "column_mean", key_norms])
def test_equals_the_eager_model(make, eager, entering, record_kept, score):
    encoder, features = make()
    assert pruneattn.prune(encoder, RATES, BLOCKS, score) is encoder
    record_kept.clear()  # of the checks in prune
    with torch.no_grad():
        seen = entering(encoder.layers[0], lambda: encoder(features, output_hidden_states=True))
        tokens, kept = eager.run(seen.tokens, eager.blocks_of(encoder), **settings(score or "column_mean"))
        torch.testing.assert_close(seen.out.last_hidden_state, encoder.layer_norm(tokens[-1]), rtol=1e-9, atol=1e-9)
    assert [index.shape[1] for index in kept] == [6, 5]
    assert len(record_kept) == 2 and all(map(torch.equal, record_kept, kept))
    assert [state.shape[1] for state in seen.out.hidden_states] == SIZES


@pytest.mark.parametrize("score", ["column_mean", key_norms])
def test_training_draws_the_same_random_numbers_as_the_block(make, eager, score):
    encoder, _ = make(dropout=0.2, attention_dropout=0.3, activation_dropout=0.1)
    pruneattn.prune(encoder.train(), RATES, BLOCKS, score)
    x = tokens = torch.randn(2, 12, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(3)
        for layer in encoder.layers:  # the encoder of transformers 4 draws further numbers between them
            masks = [name for name in ("attention_mask", "layer_head_mask") if name in names_of(layer)]
            out = layer(x, **dict.fromkeys(masks))
            x = out[0] if isinstance(out, tuple) else out
        torch.manual_seed(3)
        run = settings(score, attn_drop=0.3, drop=0.2, hidden_drop=0.1)
        expected, _ = eager.run(tokens, eager.blocks_of(encoder), **run)
    torch.testing.assert_close(x, expected[-1], rtol=1e-9, atol=1e-9)


def test_gradients_equal_those_of_the_eager_model(make, eager, entering, gradients):
    encoder, features = make()
    pruneattn.prune(encoder, RATES, BLOCKS)
    given = gradients(encoder.layers, lambda: encoder(features).last_hidden_state)
    tokens = entering(encoder.layers[0], lambda: encoder(features)).tokens

    def expected():
        return encoder.layer_norm(eager.run(tokens, eager.blocks_of(encoder), **settings("column_mean"))[0][-1])

    for name, gradient in gradients(encoder.layers, expected).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)


def test_defaults(make):
    encoder, features = make()
    pruneattn.prune(encoder)
    states = encoder(features, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [12, 12, 9, 9, 9]  # ceil(0.7 * 12) after the second block
    assert encoder.config.pruneattn == {"keep_rate": [0.7], "blocks": [1], "score": "column_mean"}
    with pytest.raises(UserError, match="'cls' needs a class token"):
        pruneattn.prune(encoder, score="cls")


def test_keep_rate_1_and_unprune_give_the_same_bits(make):
    encoder, features = make()
    before, names = encoder(features).last_hidden_state, vars(encoder).keys()
    pruneattn.prune(encoder, 0.5, BLOCKS)
    assert not torch.equal(encoder(features).last_hidden_state, before)
    pruneattn.set_keep_rate(encoder, 1)
    assert torch.equal(encoder(features).last_hidden_state, before)
    pruneattn.set_keep_rate(encoder, 0.5)
    assert pruneattn.unprune(encoder) is encoder
    assert torch.equal(encoder(features).last_hidden_state, before)
    assert vars(encoder).keys() == names and not encoder._forward_pre_hooks
    assert {type(layer) for layer in encoder.layers} == {type(encoder.layers[0])}


def test_copies_prune_independently(make):
    encoder, features = make()
    dense = encoder(features).last_hidden_state
    expected = pruneattn.prune(encoder, 0.5, BLOCKS)(features).last_hidden_state
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(features).last_hidden_state, expected)
        pruneattn.unprune(other)
        assert torch.equal(other(features).last_hidden_state, dense)
    assert torch.equal(encoder(features).last_hidden_state, expected)


def test_the_mask_that_the_encoder_ignores_is_accepted(make):
    encoder, features = make()
    expected = pruneattn.prune(encoder, 0.5, BLOCKS)(features).last_hidden_state
    mask = torch.zeros(2, features.shape[-1], dtype=torch.long)
    assert torch.equal(encoder(features, attention_mask=mask).last_hidden_state, expected)


@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_attentions_need_every_token(make, how):
    encoder, features = make(attn_implementation="eager")
    encoder.config.output_attentions = how == "configuration"
    asked = {"output_attentions": True} if how == "argument" else {}
    expected = encoder(features, **asked).attentions
    pruneattn.prune(encoder, 0.5, BLOCKS)
    with pytest.raises(
        UserError, match=r"layers\[1\]: a pruned model takes no .* returns no attentions, but got output_attent"
    ):
        encoder(features, **asked)
    assert encoder(features, output_attentions=False).last_hidden_state.shape[1] == 3
    pruneattn.unprune(encoder)
    assert all(map(torch.equal, encoder(features, **asked).attentions, expected))


@needs_onednn
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_an_optimized_encoder_returns_attentions(make, how):
    """Whisper's word timestamps request them."""
    encoder, features = make(attn_implementation="eager")
    encoder.float()
    encoder.config.output_attentions = how == "configuration"
    asked = {"output_attentions": True} if how == "argument" else {}
    expected = encoder(features.float(), **asked)
    given = optimize_for_inference(encoder)(features.float(), **asked)
    torch.testing.assert_close(given.last_hidden_state, expected.last_hidden_state)
    assert len(given.attentions) == 4
    torch.testing.assert_close(given.attentions, expected.attentions)


def test_float16_is_clamped_as_in_the_block(make):
    encoder, features = make()
    features = features.half()
    with torch.no_grad():
        encoder.half().layers[1].fc2.bias[0] = 65504
        encoder.layers[1].final_layer_norm.bias += 100
        states = encoder(features, output_hidden_states=True).hidden_states
        assert states[2].max() == 64504
        pruned = pruneattn.prune(encoder, 0.5, (1,))(features, output_hidden_states=True).hidden_states
        assert pruned[2].shape[1] == 6 and pruned[2].max() == 64504


def test_an_audio_classifier(make_subject):
    subject = make_subject("whisper_classifier")
    pruneattn.prune(subject.model, 0.5, BLOCKS)
    encoder = subject.model.encoder
    assert encoder(**subject.inputs).last_hidden_state.shape[1] == 3 and subject.call().shape == (2, 5)
    assert subject.model.config.pruneattn == {"keep_rate": [0.5, 0.5], "blocks": [1, 2], "score": "column_mean"}
    weighted = make_subject("whisper_classifier", use_weighted_layer_sum=True)
    dense = weighted.call()
    pruneattn.prune(weighted.model, 0.5, BLOCKS)
    with pytest.raises(UserError, match="use_weighted_layer_sum: .* different numbers of tokens"):
        weighted.call()
    assert torch.equal(pruneattn.unprune(weighted.model) and weighted.call(), dense)


def test_models_with_a_decoder_are_pruned_in_their_encoder_only(make_subject):
    subject = make_subject("whisper_decoder")
    for model in (subject.model, subject.model.model):
        with pytest.raises(UserError, match=f"{type(model).__name__} has a decoder, .* prune the encoder alone"):
            pruneattn.prune(model)
    encoder = pruneattn.prune(subject.model.get_encoder(), 0.5)
    assert encoder(subject.inputs["input_features"]).last_hidden_state.shape[1] == 6


@pytest.mark.parametrize("kind", ["Qwen2AudioEncoder", "VoxtralEncoder"])
def test_other_encoders_with_the_same_blocks_are_rejected(kind):
    sizes = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 8}
    if kind == "VoxtralEncoder":
        from transformers.models.voxtral.modeling_voxtral import VoxtralEncoder

        encoder = VoxtralEncoder(transformers.VoxtralEncoderConfig(**sizes))
    else:
        from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

        encoder = Qwen2AudioEncoder(transformers.Qwen2AudioEncoderConfig(**sizes))
    for function in (pruneattn.prune, optimize_for_inference):
        with pytest.raises(UserError, match=f"{kind} has the parts of Whisper's encoder and 'avg_pooler'"):
            function(encoder)


# The released model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    """Folder of Whisper tiny.en; skips if it does not exist."""
    for folder in (os.environ.get("PRUNEATTN_MODELS"), Path(__file__).parents[3] / "shared" / "models"):
        if folder and (Path(folder) / "whisper-tiny.en" / "config.json").is_file():
            return Path(folder) / "whisper-tiny.en"
    pytest.skip("no Whisper: set PRUNEATTN_MODELS to the folder that holds whisper-tiny.en/")


@pytest.fixture(scope="module")
def speech(released, real_audio):
    """Features of a clip of speech."""
    from pruneattn.data import load_audio

    file = real_audio / "speech_en" / "jfk.flac"
    if not file.is_file():
        pytest.skip("no speech_en/jfk.flac")
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(released)
    return extractor(load_audio(file).numpy(), sampling_rate=16000, return_tensors="pt").input_features


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_released_model(released, speech, implementation):
    kind = transformers.WhisperForConditionalGeneration
    model = kind.from_pretrained(released, attn_implementation=implementation).float().eval()
    plain = copy.deepcopy(model)

    def states(model):
        return model.get_encoder()(speech).last_hidden_state

    def assert_close(given, expected):
        assert given.shape == expected.shape
        assert (given - expected).norm() <= 1e-5 * expected.norm()

    with torch.no_grad():
        dense, words = states(plain), plain.generate(speech)
        pruneattn.prune(plain.get_encoder(), 1.0)
        assert torch.equal(states(plain), dense)
        pruneattn.set_keep_rate(plain.get_encoder(), 0.5)
        half = states(plain)
        assert half.shape[1] == 750
        if can_pack(torch.zeros(1, 1)):
            optimize_for_inference(model)
            assert_close(states(model), dense)
            assert torch.equal(model.generate(speech), words)
            pruneattn.prune(model.get_encoder(), 0.5)
            assert_close(states(model), half)
