import copy
import inspect
import json
import pickle

import pytest
import torch

import pruneattn

transformers = pytest.importorskip("transformers")

DIM, HEADS, BLOCKS, RATES = 24, 3, (1, 2), (0.5, 0.7)  # 2 x 6 patches, then 6, then 5
SIZES = [2 + 12, 2 + 12, 2 + 6, 2 + 5, 2 + 5]


@pytest.fixture
def make(random_weights):
    def make(head=True, **arguments):
        config = transformers.ASTConfig(
            hidden_size=DIM,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            intermediate_size=4 * DIM,
            num_mel_bins=32,
            max_length=96,
            frequency_stride=16,
            time_stride=16,
            layer_norm_eps=1e-6,
            num_labels=5,
            **arguments,
        )
        torch.manual_seed(0)
        kind = transformers.ASTForAudioClassification if head else transformers.ASTModel
        return random_weights(kind(config)).double()

    return make


@pytest.fixture
def spectrograms():
    return torch.randn(2, 96, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layers_of(model):
    trunk = model.base_model
    return trunk.layers if hasattr(trunk, "layers") else trunk.encoder.layer


def mask_name(forward):
    names = [name for name in ("attention_mask", "head_mask") if name in inspect.signature(forward).parameters]
    return names[0] if names else pytest.skip("this version takes no mask there")


def key_norms(q, k, v, extra_tokens):
    return k[:, :, extra_tokens:].norm(dim=-1).mean(1)


def output(model, tokens):
    """The model's output for the last block's tokens, in plain steps."""
    pooled = model.base_model.layernorm(tokens)[:, :2].mean(1)
    return model.classifier(pooled) if hasattr(model, "classifier") else pooled


def result(outputs):
    return outputs.logits if hasattr(outputs, "logits") else outputs.pooler_output


def settings(score, **more):
    return {
        "heads": HEADS,
        "extra": 2,
        "score": score,
        "eps": 1e-6,
        "rates": dict(zip(BLOCKS, RATES, strict=True)),
        **more,
    }


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("score", [None, "column_mean", key_norms])
def test_equals_the_eager_model(make, eager, entering, record_kept, spectrograms, head, score):
    model = make(head)
    assert pruneattn.prune(model, RATES, BLOCKS, score) is model
    record_kept.clear()  # of the checks in prune
    with torch.no_grad():
        seen = entering(layers_of(model)[0], lambda: model(spectrograms, output_hidden_states=True))
        tokens, kept = eager.run(seen.tokens, eager.blocks_of(model), **settings(score or "cls"))
        torch.testing.assert_close(result(seen.out), output(model, tokens[-1]), rtol=1e-9, atol=1e-9)
    assert [index.shape[1] for index in kept] == [6, 5]
    assert len(record_kept) == 2 and all(map(torch.equal, record_kept, kept))
    assert [state.shape[1] for state in seen.out.hidden_states] == SIZES
    # Without the last entry, which some versions normalize.
    for state, expected in zip(seen.out.hidden_states[:-1], tokens[:-1], strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["cls", "column_mean", key_norms])
def test_training_draws_the_same_random_numbers_as_the_block(make, eager, entering, spectrograms, score):
    model = make(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3).train()
    pruneattn.prune(model, RATES, BLOCKS, score)
    torch.manual_seed(3)
    with torch.no_grad():
        seen = entering(layers_of(model)[0], lambda: model(spectrograms))
        torch.set_rng_state(seen.random)
        run = settings(score, attn_drop=0.3, drop=0.2)
        tokens, _ = eager.run(seen.tokens, eager.blocks_of(model), **run)
    torch.testing.assert_close(seen.out.logits, output(model, tokens[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("score", ["cls", "column_mean"])
def test_gradients_equal_those_of_the_eager_model(make, eager, entering, gradients, spectrograms, score):
    model = pruneattn.prune(make(), RATES, BLOCKS, score)
    layers = layers_of(model)
    given = gradients(layers, lambda: model(spectrograms).logits)
    tokens = entering(layers[0], lambda: model(spectrograms)).tokens

    def expected():
        return output(model, eager.run(tokens, eager.blocks_of(model), **settings(score))[0][-1])

    for name, gradient in gradients(layers, expected).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)


def test_a_training_step(make, spectrograms):
    model, labels = pruneattn.prune(make().train(), RATES, BLOCKS), torch.tensor([1, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        out = model(spectrograms, labels=labels)
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("head", [True, False])
def test_keep_rate_1_and_unprune_give_the_same_bits(make, spectrograms, head):
    model = make(head)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    dense = result(model(spectrograms))
    pruneattn.prune(model, 0.5, BLOCKS)
    assert not torch.equal(result(model(spectrograms)), dense)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    pruneattn.set_keep_rate(model, 1)
    assert torch.equal(result(model(spectrograms)), dense)
    pruneattn.set_keep_rate(model, 0.5)
    assert pruneattn.unprune(model) is model
    assert torch.equal(result(model(spectrograms)), dense)
    assert len(model(spectrograms, output_attentions=False, output_hidden_states=True).hidden_states) == 5
    assert {type(layer) for layer in layers_of(model)} == {type(layers_of(model)[0])}
    assert vars(model.base_model).keys() - vars(make(False)).keys() <= {"_output_capturing_hooks_installed"}


def test_earlier_recording_of_hidden_states_does_not_undo_pruning(make, spectrograms):
    """transformers 4.5x leaves a forward on every layer that has been recorded."""
    model = make()
    nothing, prune = lambda model: model, lambda model: pruneattn.prune(model, RATES, BLOCKS)
    for change, expected in ((nothing, [14] * 5), (prune, SIZES), (pruneattn.unprune, [14] * 5)):
        change(model)
        for _ in range(2):
            out = model(spectrograms, output_hidden_states=True)
            assert [state.shape[1] for state in out.hidden_states] == expected
        assert copy.deepcopy(model).base_model(spectrograms).last_hidden_state.shape[1] == expected[-1]


def test_attentions_are_rejected(make, spectrograms):
    model = pruneattn.prune(make(), RATES, BLOCKS)
    with pytest.raises(pruneattn.UserError, match="output_attentions.*pruneattn.unprune"):
        model(spectrograms, output_attentions=True)
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(pruneattn.UserError, match="output_attentions"):
        model(spectrograms)
    model(spectrograms, output_attentions=False)
    pruneattn.unprune(model)
    assert [weights.shape for weights in model(spectrograms).attentions] == [(2, HEADS, 14, 14)] * 4


def test_masks_are_rejected(make, spectrograms):
    model = make(False)
    name = mask_name(type(model).forward)
    pruneattn.prune(model, 0.5, BLOCKS)
    mask = torch.ones(2, 14) if name == "attention_mask" else torch.ones(HEADS)
    for arguments, named in (((mask,), {}), ((), {name: mask})):
        with pytest.raises(pruneattn.UserError, match=f"{name}: a pruned or optimized model takes no masks"):
            model(spectrograms, *arguments, **named)
    expected = model(spectrograms).pooler_output
    assert torch.equal(model(spectrograms, None).pooler_output, expected)
    assert torch.equal(model(spectrograms, **{name: None}).pooler_output, expected)


@pytest.mark.parametrize("by_name", [True, False])
def test_masks_that_hide_nothing_are_dropped(make, spectrograms, by_name):
    """transformers creates such masks itself, in torch.compile and for some attention backends."""
    model = pruneattn.prune(make(), 0.5, (1,))
    name = mask_name(type(layers_of(model)[0]).forward)
    mask = torch.ones(1, HEADS, 14, 14, dtype=torch.float64)

    def give_mask(layer, args, kwargs):
        return (args[:1], kwargs | {name: mask}) if by_name else ((args[0], mask), kwargs)

    for layer in layers_of(model):
        # Before the hooks of pruning: the model's own arguments exist before any hook runs.
        layer.register_forward_pre_hook(give_mask, prepend=True, with_kwargs=True)
    expected = pruneattn.prune(make(), 0.5, (1,))(spectrograms).logits
    torch.testing.assert_close(model(spectrograms).logits, expected)


@pytest.mark.parametrize("score", ["cls", "column_mean"])
def test_only_kept_rows_are_projected(make, spectrograms, score):
    model = pruneattn.prune(make(), 0.5, (1,), score)
    rows = []
    for name, module in layers_of(model)[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            last = name.split(".")[-1]
            module.register_forward_hook(lambda m, args, _, last=last: rows.append((last, args[0].shape[1])))
    model(spectrograms)
    short = {"query": "q", "q_proj": "q", "key": "k", "k_proj": "k", "value": "v", "v_proj": "v"}
    projected = sorted((short[name], count) for name, count in rows if name in short)
    queries = [("q", 1), ("q", 8)] if score == "cls" else [("q", 14)]
    assert projected == sorted([("k", 14), ("v", 14), *queries])
    assert [count for name, count in rows if name not in short] == [8, 8, 8]  # projection and the MLP's two


def test_saved_and_loaded(make, spectrograms, tmp_path):
    model = make()
    dense = model(spectrograms).logits
    model.save_pretrained(tmp_path / "before")
    expected = pruneattn.prune(model, RATES, BLOCKS)(spectrograms).logits
    model.save_pretrained(tmp_path / "after")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("before", "after"))
    assert after.pop("pruneattn") == {"keep_rate": list(RATES), "blocks": list(BLOCKS), "score": "cls"}
    assert after == before
    loaded = type(model).from_pretrained(tmp_path / "after").eval().double()
    assert torch.equal(loaded(spectrograms).logits, dense)
    assert torch.equal(pruneattn.prune(loaded, **loaded.config.pruneattn)(spectrograms).logits, expected)
    loaded.load_state_dict(model.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(make, gradients, spectrograms, reentrant):
    model = pruneattn.prune(make(hidden_dropout_prob=0.2).train(), RATES, BLOCKS)

    def run():
        torch.manual_seed(5)
        return model(spectrograms).logits

    plain = gradients(model, run)
    calls = []
    layers_of(model)[1].layernorm_after.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(model, run).items():
        torch.testing.assert_close(gradient, plain[name])
    assert len(calls) == 2  # forward, and again in the backward pass


def test_autocast(make, spectrograms):
    model = pruneattn.prune(make(), 0.5, BLOCKS).float()
    with torch.no_grad():
        exact = model(spectrograms.float()).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(spectrograms.float()).logits
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_copies_prune_independently(make, spectrograms):
    model = make()
    dense = model(spectrograms).logits
    expected = pruneattn.prune(model, 0.5, BLOCKS)(spectrograms).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(other(spectrograms).logits, expected)
        with pytest.raises(pruneattn.UserError):
            other(spectrograms, output_attentions=True)
        pruneattn.set_keep_rate(other, 1)
        assert torch.equal(other(spectrograms).logits, dense)
        pruneattn.unprune(other)
        other(spectrograms, output_hidden_states=True)
    assert torch.equal(model(spectrograms).logits, expected)


def test_compiles_in_one_graph(make, spectrograms):
    torch.compiler.reset()
    model = pruneattn.prune(make(), 0.5, (1,))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(spectrograms).logits, model(spectrograms).logits)


def test_other_models_are_rejected():
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,),
        conv_stride=(5,),
        conv_kernel=(10,),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    with pytest.raises(pruneattn.UserError, match="Wav2Vec2Model has no known list of blocks"):
        pruneattn.prune(transformers.Wav2Vec2Model(config), 0.5, (0,))
