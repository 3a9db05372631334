import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pruneattn

timm = pytest.importorskip("timm")

PATCHES, DIM, HEADS, BLOCKS, RATES = 16, 24, 3, (1, 2), (0.5, 0.7)  # 16 patches, then 8, then 6
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "num_heads": HEADS, "depth": 4, "num_classes": 5}
KINDS = {  # model, its arguments, extra tokens, default score
    "vit": ("vit_tiny_patch16_224", {}, 1, "cls"),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 2, "cls"),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0, "column_mean"),
    "average_with_cls": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1, "cls"),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "init_values": 0.7, "qk_norm": True}, 4, "cls"),
    "registers_only": ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, 2, None),
    "pre_norm": ("vit_tiny_patch16_224", {"pre_norm": True, "qkv_bias": True}, 1, "cls"),
}


@pytest.fixture
def make(random_weights):
    def make(kind="vit", **arguments):
        name, own, _, _ = KINDS[kind]
        torch.manual_seed(0)
        return random_weights(timm.create_model(name, pretrained=False, **SMALL | own | arguments)).double()

    return make


def key_norms(q, k, v, extra_tokens):
    return k[:, :, extra_tokens:].norm(dim=-1).mean(1)


def head(model, kind, x):
    """timm's head in plain steps, on the tokens that left the last block."""
    x = model.norm(x)
    if kind == "distilled":
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    extra = KINDS[kind][2]
    pooled = x[:, extra:].mean(1) if model.global_pool == "avg" else x[:, 0]
    return model.head(model.fc_norm(pooled))


def images(batch=2, seed=1):
    return torch.randn(batch, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [None, "column_mean", key_norms])
def test_equals_the_eager_model(make, eager, entering, record_kept, kind, score):
    model, x, (_, _, extra, default) = make(kind), images(), KINDS[kind]
    assert pruneattn.prune(model, RATES, BLOCKS, score) is model
    record_kept.clear()  # of the checks in prune
    with torch.no_grad():
        seen = entering(model.blocks[0], lambda: model(x))
        settings = {"heads": HEADS, "extra": extra, "score": score or default or "column_mean", "eps": 1e-6}
        tokens, kept = eager.run(
            seen.tokens, eager.blocks_of(model), rates=dict(zip(BLOCKS, RATES, strict=True)), **settings
        )
        torch.testing.assert_close(seen.out, head(model, kind, tokens[-1]), rtol=1e-9, atol=1e-9)
        features = model.forward_features(x)
        assert torch.equal(model.forward_head(features), seen.out)
    assert features.shape == (2, extra + 6, DIM)
    assert [index.shape[1] for index in kept] == [8, 6]
    assert len(record_kept) == 4 and all(map(torch.equal, record_kept, kept + kept))


@pytest.mark.parametrize("score", ["cls", "column_mean", key_norms])
def test_training_draws_the_same_random_numbers_as_the_block(make, eager, entering, score):
    rates = {"attn_drop": 0.3, "drop": 0.2, "hidden_drop": 0.2}
    model = make("registers", attn_drop_rate=0.3, proj_drop_rate=0.2, drop_path_rate=0.5).train()
    pruneattn.prune(model, RATES, BLOCKS, score)
    torch.manual_seed(3)
    x = images(6)
    with torch.no_grad():
        seen = entering(model.blocks[0], lambda: model(x))
        torch.set_rng_state(seen.random)
        paths = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
        assert paths == pytest.approx([0, 0.5 / 3, 1 / 3, 0.5])
        settings = {"heads": HEADS, "extra": 4, "score": score, "eps": 1e-6, "drop_paths": paths, **rates}
        tokens, _ = eager.run(
            seen.tokens, eager.blocks_of(model), rates=dict(zip(BLOCKS, RATES, strict=True)), **settings
        )
    torch.testing.assert_close(seen.out, head(model, "registers", tokens[-1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["distilled", "average"])
def test_gradients_equal_those_of_the_eager_model(make, eager, entering, gradients, kind):
    model, x, (_, _, extra, score) = make(kind), images(), KINDS[kind]
    pruneattn.prune(model, RATES, BLOCKS)
    given = gradients(model.blocks, lambda: model(x))
    tokens = entering(model.blocks[0], lambda: model(x)).tokens

    def expected():
        settings = {"heads": HEADS, "extra": extra, "score": score, "eps": 1e-6}
        run = eager.run(tokens, eager.blocks_of(model), rates=dict(zip(BLOCKS, RATES, strict=True)), **settings)
        return head(model, kind, run[0][-1])

    for name, gradient in gradients(model.blocks, expected).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("kind", ["distilled", "average"])
def test_keep_rate_1_and_unprune_give_the_same_bits(make, kind):
    model, x = make(kind), images()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    dense = model(x)
    pruneattn.prune(model, 0.5, BLOCKS)
    assert not torch.equal(model(x), dense)
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0] and torch.equal(tensor, before[name][1])
    pruneattn.set_keep_rate(model, 1)
    assert torch.equal(model(x), dense)
    pruneattn.set_keep_rate(model, 0.5)
    assert pruneattn.unprune(model) is model
    assert torch.equal(model(x), dense)
    assert vars(model).keys() == vars(make(kind)).keys()
    assert all(vars(block).keys() == vars(model.blocks[0]).keys() for block in model.blocks)
    assert {type(block) for block in model.blocks} == {type(model.blocks[0])}


def test_intermediate_layers_are_rejected_until_unpruned(make):
    model, x = pruneattn.prune(make(), 0.5, BLOCKS), images()
    for method in (model.forward_intermediates, model.get_intermediate_layers):
        with pytest.raises(pruneattn.UserError, match="pruneattn.unprune"):
            method(x)
    pruneattn.unprune(model)
    assert model.forward_intermediates(x)[1][-1].shape == (2, DIM, 4, 4)


def test_masks_are_rejected(make):
    model, x = pruneattn.prune(make(), 0.5, BLOCKS), images()
    with pytest.raises(pruneattn.UserError, match=r"blocks\[1\].*attn_mask"):
        model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(pruneattn.UserError, match="is_causal"):
        model(x, is_causal=True)


@pytest.mark.parametrize("score", ["cls", "column_mean"])
def test_only_kept_rows_are_projected(make, score):
    """Multiplications of a pruned block, counted by PyTorch, against the sum of its steps."""
    model = pruneattn.prune(make().float(), 0.5, (1,), score)
    tokens = torch.randn(1, 1 + PATCHES, DIM)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.blocks[1](tokens)
    n, m = 17, 9
    per_row, scored = DIM * DIM, n * DIM
    attention = {
        "cls": per_row + scored + 2 * n * per_row + m * per_row + 2 * m * n * DIM,  # score; keys, values; queries; both
        "column_mean": 3 * n * per_row + 2 * n * n * DIM,
    }
    assert counter.get_total_flops() == 2 * (attention[score] + m * per_row + 2 * m * 4 * per_row)


def test_a_layer_that_wraps_the_projection_is_called(make):
    """Libraries that add low-rank weights to the layers of a model wrap layers in this way."""

    class Doubled(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight
            self.in_features, self.out_features = linear.in_features, linear.out_features

        def forward(self, x):
            return 2 * self.linear(x)

    wrapped, expected = make(), make()
    with torch.no_grad():
        for i in BLOCKS:
            expected.blocks[i].attn.qkv.weight.mul_(2)
            expected.blocks[i].attn.qkv.bias.mul_(2)
    for model in (wrapped, expected):
        pruneattn.prune(model, 0.5, BLOCKS)
    for i in BLOCKS:
        wrapped.blocks[i].attn.qkv = Doubled(wrapped.blocks[i].attn.qkv)
    torch.testing.assert_close(wrapped(images()), expected(images()))
    torch.testing.assert_close(pruneattn.prune(wrapped, 0.5, BLOCKS)(images()), expected(images()))


def test_hooks_on_the_parts_are_called(make):
    model, calls = pruneattn.prune(make(), 0.5, (1,)), []
    expected = model(images())
    for name, part in model.blocks[1].named_modules():
        part.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
    torch.testing.assert_close(model(images()), expected)
    skipped = {"attn", "attn.attn_drop"}  # attention itself changed
    assert set(calls) == {name for name, _ in model.blocks[1].named_modules()} - skipped


def test_checkpointing_changes_nothing(make, gradients):
    model, x = pruneattn.prune(make(drop_path_rate=0.3).train(), RATES, BLOCKS), images()

    def run():
        torch.manual_seed(5)
        return model(x)

    plain = gradients(model, run)
    calls = []
    model.blocks[1].norm2.register_forward_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    for name, gradient in gradients(model, run).items():
        torch.testing.assert_close(gradient, plain[name])
    assert len(calls) == 2  # forward, and again in the backward pass


def test_autocast(make):
    model, x = pruneattn.prune(make(), 0.5, BLOCKS).float(), images().float()
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert half.dtype == torch.bfloat16
    assert (half - exact).norm() < 0.1 * exact.norm()


def test_copies_prune_independently(make):
    model, x = make(), images()
    dense = model(x)
    expected = pruneattn.prune(model, 0.5, BLOCKS)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert torch.equal(other(x), expected)
        with pytest.raises(pruneattn.UserError):
            other.forward_intermediates(x)
        pruneattn.set_keep_rate(other, 1)
        assert torch.equal(other(x), dense)
        pruneattn.unprune(other)
        other.forward_intermediates(x)
    assert torch.equal(model(x), expected)


def test_compiles_in_one_graph(make):
    torch.compiler.reset()
    model, x = pruneattn.prune(make(depth=1), 0.5, (0,)), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        pruneattn.set_keep_rate(model, 0.25)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    "name, message",
    [
        ("beit_base_patch16_224", r"blocks\[0\] \(Block\) has 'gamma_1'"),
        ("vit_relpos_small_patch16_224", r"blocks\[0\].attn \(RelPosAttention\) has 'rel_pos'"),
        ("vit_srelpos_small_patch16_224", r"blocks\[0\] takes shared_rel_pos"),
        ("vit_base_patch16_rpn_224", r"blocks\[0\] has the parts of a ViT's block, but"),  # a norm after each branch
        ("eva02_tiny_patch14_224", r"blocks\[0\].attn \(EvaAttention\) has 'q_bias'"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer has no known list of blocks"),
        ("samvit_base_patch16", "no 'num_prefix_tokens'"),
        ("resnet18", "ResNet has no known list of blocks"),
    ],
)
def test_other_architectures_are_rejected(name, message):
    with torch.device("meta"):
        model = timm.create_model(name, **({} if name.startswith(("swin", "resnet")) else {"depth": 1}))
    with pytest.raises(pruneattn.UserError, match=message):
        pruneattn.prune(model, 0.5, (0,))


def test_a_model_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        assert pruneattn.prune(model, 0.5, BLOCKS).forward_features(torch.empty(2, 3, 32, 32)).shape == (2, 1 + 4, DIM)
    assert all(parameter.is_meta for parameter in model.parameters())
