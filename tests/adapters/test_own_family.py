"""A custom family and a custom score: the example python/prune_own_backbone.py against direct computation."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import pruneattn
from pruneattn import UserError, adapters

EXAMPLE = Path(__file__).parents[2] / "python" / "prune_own_backbone.py"
KEEP_RATES, BLOCKS, HEADS, DIM = (0.6, 0.5), (1, 2), 3, 24


@pytest.fixture(scope="module")
def example(load_file):
    known = list(adapters.families._families)
    yield load_file(EXAMPLE)
    adapters.families._families[:] = known


@pytest.fixture
def make(example, random_weights):
    def make(norm_first=True):
        model = example.SpectrogramEncoder(
            dim=DIM, depth=4, heads=HEADS, frames=64, num_classes=5, norm_first=norm_first
        )
        return random_weights(model)

    return make


@pytest.fixture
def fbank():
    return torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(1))


def scores_of(kind, weights, v):
    """Score of each patch, from the softmax matrix [B, H, N, N] and the values [B, H, N, D]."""
    if kind == "column_mean":
        return weights[:, :, 1:, 1:].mean((1, 2))
    scores = weights[:, :, 0, 1:].mean(1)
    return scores if kind == "cls" else scores * v[:, :, 1:].norm(dim=-1).mean(1)


def eager(model, fbank, kind):
    """The pruned model with PyTorch's layers and the whole softmax matrix."""
    x = model.patches(fbank[:, None]).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.positions
    rates = dict(zip(BLOCKS, KEEP_RATES, strict=True))
    for number, layer in enumerate(model.encoder.layers):
        y = layer.norm1(x) if layer.norm_first else x
        out, weights = layer.self_attn(y, y, y, average_attn_weights=False)
        v = nn.functional.linear(y, layer.self_attn.in_proj_weight[-DIM:], layer.self_attn.in_proj_bias[-DIM:])
        x = x + out
        if number in rates:
            keep = -int(-rates[number] * (x.shape[1] - 1) // 1)
            scores = scores_of(kind, weights, v.unflatten(-1, (HEADS, -1)).transpose(1, 2))
            rows = 1 + scores.topk(keep).indices.sort().values
            rows = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)
            x = torch.stack([clip[index] for clip, index in zip(x, rows, strict=True)])
        mlp = nn.Sequential(layer.linear1, nn.GELU(), layer.linear2)
        if layer.norm_first:
            x = x + mlp(layer.norm2(x))
        else:
            x = layer.norm1(x)
            x = layer.norm2(x + mlp(x))
    return model.head(x[:, 0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("kind", ["column_mean", "cls", "value"])
def test_equals_the_eager_model(example, make, fbank, norm_first, kind):
    model = make(norm_first)
    expected, unpruned = eager(model, fbank, kind), model(fbank)
    score = example.ValueScore() if kind == "value" else kind
    pruneattn.prune(model, KEEP_RATES, BLOCKS, score)
    torch.testing.assert_close(model(fbank), expected, rtol=1e-4, atol=1e-4)
    assert (unpruned - expected).abs().max() > 1e-2
    assert pruneattn.unprune(model) is model and torch.equal(model(fbank), unpruned)


def test_scores_differ(example, make, fbank):
    outputs = []
    for score in ("cls", example.ValueScore()):
        outputs.append(pruneattn.prune(make(), 0.5, BLOCKS, score)(fbank))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_trains(example, make, fbank):
    model = pruneattn.prune(make().train(), 0.5, BLOCKS, example.ValueScore())
    copy.deepcopy(model)(fbank).sum().backward()  # dropout is on
    model(fbank).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_masks_are_rejected(make):
    model, tokens = pruneattn.prune(make(), 0.5, BLOCKS), torch.zeros(1, 33, DIM)
    for mask in ({"mask": torch.zeros(33, 33)}, {"src_key_padding_mask": torch.zeros(1, 33, dtype=torch.bool)}):
        with pytest.raises(UserError, match=r"encoder.layers\[1\]: a pruned model takes no attention mask"):
            model.encoder(tokens, **mask)


def test_unsupported_layers_are_rejected(example, make):
    model = make()
    model.encoder.layers[1].self_attn.batch_first = False
    with pytest.raises(UserError, match="create it with batch_first=True"):
        pruneattn.prune(model, 0.5, BLOCKS)
    model = make()
    model.encoder.layers[1].self_attn.bias_k = nn.Parameter(torch.zeros(1, 1, DIM))
    with pytest.raises(UserError, match="bias_k"):
        pruneattn.prune(model, 0.5, BLOCKS)


def test_models_of_this_package_accept_the_score(example):
    torch.manual_seed(0)
    sizes = {"embed_dim": DIM, "depth": 4, "num_heads": HEADS, "num_classes": 5, "frames": 64, "prune_blocks": BLOCKS}
    model = pruneattn.create_model("ast_tiny", score=example.ValueScore(), keep_rate=0.5, **sizes).eval()
    plain = pruneattn.create_model("ast_tiny", score="cls", keep_rate=0.5, **sizes)
    assert pruneattn.count_macs(model) == pruneattn.count_macs(plain)
    fbank = torch.randn(2, 64, 128)
    with torch.no_grad():
        expected = model(fbank)
        torch.testing.assert_close(pruneattn.optimize_for_inference(model)(fbank), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no plain configuration"):
        _ = model.config

    class Free(pruneattn.Pruning):
        pass

    with pytest.raises(NotImplementedError, match="Free does not give its cost: implement attention_macs"):
        pruneattn.count_macs(pruneattn.create_model("ast_tiny", score=Free(), keep_rate=0.5, **sizes))


def test_families_are_tried_in_order(plain_vit, make):
    asked = []

    @adapters.register_family
    def first(model):
        asked.append(type(model).__name__)

    try:
        assert adapters.register_family(first) is first and adapters.families._families.count(first) == 1
        pruneattn.prune(plain_vit, 0.5, (1,))
        assert asked[0] == "PlainViT"
        with pytest.raises(UserError, match="register_family"):
            pruneattn.prune(nn.Linear(3, 3))
    finally:
        adapters.families._families.remove(first)


def test_script(example, capsys):
    example.main(["--frames", "64", "--batch-size", "1", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "unpruned",
        "class token's attention",
        "times length of value",
    ]
