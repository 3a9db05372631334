"""Properties of every family, on a model that needs no library."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

import pruneattn
from pruneattn import adapters


@pytest.fixture
def tokens():
    return torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(1))  # and a class token


def counts(model, tokens):
    """How many tokens leave each block."""
    found = []
    hooks = [block.register_forward_hook(lambda m, args, out: found.append(out.shape[1])) for block in model.blocks]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def test_prunes_the_given_blocks_at_the_given_rates(plain_vit, tokens):
    assert counts(pruneattn.prune(plain_vit, 0.5, (0, 2)), tokens) == [6, 6, 4, 4]  # 5 of 10, 3 of 5
    assert counts(pruneattn.prune(plain_vit, (0.7, 1, 0.3), (0, 2, 3)), tokens) == [8, 8, 8, 4]  # 7, 7, ceil(2.1)
    pruneattn.set_keep_rate(plain_vit, (1, 0.55, 0.01))
    assert counts(plain_vit, tokens) == [11, 11, 7, 2]  # 10, ceil(5.5), at least 1
    pruneattn.set_keep_rate(plain_vit, 0.9)
    assert counts(plain_vit, tokens) == [10, 10, 10, 10]  # 9, ceil(8.1), ceil(8.1)
    assert counts(pruneattn.unprune(plain_vit), tokens) == [11] * 4


def test_defaults(plain, random_weights, tokens):
    model = pruneattn.prune(random_weights(plain.ViT(depth=12)))
    assert counts(model, tokens) == [11] * 3 + [8] * 3 + [6] * 3 + [5] * 3  # 7 of 10, ceil(4.9), ceil(3.5)


def test_blocks_is_an_alias_of_prune_blocks(plain_vit, tokens):
    for arguments in ({"prune_blocks": (0, 2)}, {"blocks": (0, 2)}, {"prune_blocks": None, "blocks": (0, 2)}):
        pruneattn.prune(pruneattn.unprune(plain_vit), 0.5, **arguments)
        assert counts(plain_vit, tokens) == [6, 6, 4, 4]


def test_a_family_can_have_its_own_default_blocks(plain_vit, tokens):
    def find(model):
        if model is plain_vit:
            return dataclasses.replace(adapters.timm.find(model), prune_blocks=(1,))
        return None

    adapters.register_family(find)
    try:
        assert counts(pruneattn.prune(plain_vit, 0.5), tokens) == [11, 6, 6, 6]
        assert counts(pruneattn.prune(plain_vit, 0.5, (2,)), tokens) == [11, 11, 6, 6]
    finally:
        adapters.families._families.remove(find)


def test_the_score_decides(plain_vit, tokens):
    def last(q, k, v, extra_tokens):
        assert [part.shape for part in (q, k, v)] == [(2, 3, 11, 8)] * 3
        return torch.arange(k.shape[2] - extra_tokens, dtype=torch.float32).expand(len(k), -1)

    def first(q, k, v, extra_tokens):
        return -last(q, k, v, extra_tokens)

    block = plain_vit.blocks[0]
    x = torch.cat([plain_vit.cls_token.expand(2, -1, -1), tokens], 1)
    dense = block(x)
    for score, rows in ((last, [0, 6, 7, 8, 9, 10]), (first, [0, 1, 2, 3, 4, 5])):
        pruneattn.prune(plain_vit, 0.5, (0,), score)
        torch.testing.assert_close(block(x), dense[:, rows])


def test_ties_go_to_the_lower_position(plain_vit, tokens):
    equal = tokens[:, :1].expand(-1, 10, -1)
    pruneattn.prune(plain_vit, 0.5, (0,), lambda q, k, v, extra: k.new_zeros(2, 10))
    out = plain_vit(equal)
    assert torch.equal(out, plain_vit(equal))
    assert out.shape == (2, 6, 24)


def test_a_block_runs_unpruned_if_it_would_drop_no_patch(plain_vit, tokens):
    pruneattn.prune(plain_vit, 0.9, (1,))
    x = torch.randn(2, 6, 24)
    dense = copy.deepcopy(plain_vit)
    pruneattn.unprune(dense)
    for few in (1, 2, 6):  # the class token and 0, 1 or 5 patches, all of which are kept
        assert torch.equal(plain_vit.blocks[1](x[:, :few]), dense.blocks[1](x[:, :few]))


def test_the_block_stays_the_same_object_and_class(plain, plain_vit, tokens):
    block = plain_vit.blocks[1]
    calls = []
    block.register_forward_hook(lambda *_: calls.append("block"))
    block.norm2.register_forward_hook(lambda *_: calls.append("norm2"))
    parameters = list(plain_vit.parameters())
    pruneattn.prune(plain_vit, 0.5, (1,))
    assert plain_vit.blocks[1] is block and isinstance(block, plain.Block) and type(block).__name__ == "PlainBlock"
    assert all(map(lambda a, b: a is b, parameters, plain_vit.parameters()))
    assert "keep_rate=0.5" in repr(block) and "keep_rate" not in repr(plain_vit.blocks[0])
    calls.clear()
    plain_vit(tokens)
    assert calls == ["norm2", "block"]
    assert type(pruneattn.unprune(plain_vit).blocks[1]) is plain.Block


def test_a_copy_is_another_model(plain_vit, tokens):
    pruneattn.prune(plain_vit, 0.5, (1,))
    expected = plain_vit(tokens)
    other = copy.deepcopy(plain_vit)
    assert torch.equal(other(tokens), expected)
    pruneattn.set_keep_rate(other, 0.2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(plain_vit(tokens), expected)
    without_weights = torch.cat(
        [torch.zeros(2, 1, 24), tokens[:, :2]], 1
    )  # all scores are equal: the lower positions are kept
    assert torch.equal(other(tokens), without_weights)


def test_parameters_replaced_after_pruning_are_used(plain, plain_vit, random_weights, tokens):
    pruneattn.prune(plain_vit, 0.5, (1,))
    other = random_weights(plain.ViT(), seed=7)
    plain_vit.blocks[1].attn, plain_vit.blocks[1].mlp = other.blocks[1].attn, other.blocks[1].mlp
    expected = copy.deepcopy(plain_vit)
    pruneattn.prune(pruneattn.unprune(expected), 0.5, (1,))
    assert torch.equal(plain_vit(tokens), expected(tokens))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"keep_rate": 0}, "keep_rate: must be above 0 and at most 1, got 0"),
        ({"keep_rate": 1.5}, "keep_rate: .* got 1.5"),
        ({"keep_rate": "half"}, "keep_rate: .* got 'h'"),
        ({"keep_rate": (0.5, 0.7, 0.9)}, "keep_rate: 3 values for 2 pruning blocks"),
        ({"prune_blocks": (1, 4)}, r"prune_blocks: \(1, 4\) must be within depth 4"),
        ({"prune_blocks": (-1,)}, "prune_blocks: .* must be within depth 4"),
        ({"prune_blocks": (2, 1)}, r"prune_blocks: must ascend without repeats, got \(2, 1\)"),
        ({"prune_blocks": (2, 2)}, "prune_blocks: must ascend without repeats"),
        ({"prune_blocks": ()}, "needs pruning blocks"),
        ({"prune_blocks": None}, r"prune_blocks: \(3, 6, 9\) must be within depth 4"),
        ({"blocks": (1, 3)}, "prune_blocks: cannot be used together with its alias blocks: use only prune_blocks"),
        ({"score": "intensity"}, "score: 'intensity' ranks by the spectrogram"),
        ({"score": "variation"}, "score: 'variation' ranks by the spectrogram"),
        ({"score": "random"}, "score: 'random' ranks by the spectrogram"),
        ({"score": "best"}, "score: expected a function, a Pruning or one of"),
    ],
)
@pytest.mark.parametrize("pruned", [False, True])
def test_invalid_arguments_change_nothing(plain_vit, tokens, arguments, message, pruned):
    if pruned:
        pruneattn.prune(plain_vit, 0.5, (0,))
    before = counts(plain_vit, tokens)
    with pytest.raises(pruneattn.UserError, match=message):
        pruneattn.prune(plain_vit, **{"keep_rate": 0.5, "prune_blocks": (1, 2)} | arguments)
    assert counts(plain_vit, tokens) == before


@pytest.mark.parametrize("undo, number", [(False, 1), (False, 2), (False, 3), (True, 2), (True, 3)])
def test_a_replaced_forward_changes_nothing(plain_vit, tokens, undo, number):
    """The replaced forward of one block, pruned or to be pruned, leaves all blocks unchanged."""
    pruneattn.prune(plain_vit, 0.5, (0, 2, 3))
    block = plain_vit.blocks[number]
    block.forward = partial(type(block).forward, block)
    before = counts(plain_vit, tokens)
    with pytest.raises(pruneattn.UserError, match=rf"blocks\[{number}\].forward was replaced on the object"):
        pruneattn.unprune(plain_vit) if undo else pruneattn.prune(plain_vit, 0.3, (0, 1, 2))
    assert counts(plain_vit, tokens) == before


def test_without_a_class_token(plain_vit, tokens):
    plain_vit.cls_token, plain_vit.num_prefix_tokens = None, 0
    with pytest.raises(pruneattn.UserError, match="'cls' needs a class token.*'column_mean'"):
        pruneattn.prune(plain_vit, 0.5, (1,), "cls")
    assert pruneattn.prune(plain_vit, 0.5, (1,)).blocks[1](tokens).shape == (2, 5, 24)


def test_invalid_keep_rates_change_nothing(plain_vit, tokens):
    pruneattn.prune(plain_vit, 0.5, (0, 1))
    for rate in (0, -1, 2, float("nan"), (0.5, 0), (0.5, 0.5, 0.5), "0.5"):
        with pytest.raises(pruneattn.UserError, match="keep_rate"):
            pruneattn.set_keep_rate(plain_vit, rate)
    assert counts(plain_vit, tokens) == [6, 4, 4, 4]


def test_a_model_that_is_not_pruned(plain_vit, tokens):
    expected = plain_vit(tokens)
    with pytest.raises(pruneattn.UserError, match="no block of this PlainViT prunes: call pruneattn.prune first"):
        pruneattn.set_keep_rate(plain_vit, 0.5)
    assert torch.equal(pruneattn.unprune(plain_vit)(tokens), expected)


def test_models_of_this_package_are_not_pruned_again():
    sizes = {"frames": 64, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 5}
    model = pruneattn.create_model("ast_tiny", prune_blocks=(1, 2), **sizes)
    pruneattn.set_keep_rate(model, (0.5, 0.25))
    assert model.keep_rates == (0.5, 0.25)
    with pytest.raises(
        pruneattn.UserError, match="already has pruning blocks: change its keep-rate with set_keep_rate"
    ):
        pruneattn.prune(model)
    with pytest.raises(pruneattn.UserError, match=r"model.set_keep_rate\(1\)"):
        pruneattn.unprune(model)


def test_models_with_a_decoder_are_rejected(plain_vit, tokens):
    plain_vit.decoder = nn.Linear(24, 24)
    with pytest.raises(pruneattn.UserError, match="PlainViT has a decoder, .* prune the encoder alone"):
        pruneattn.prune(plain_vit, 0.5, (1,))
    assert counts(plain_vit, tokens) == [11] * 4


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential, lambda model: None])
def test_models_of_unknown_families_are_rejected(plain_vit, wrap):
    for function in (pruneattn.prune, pruneattn.unprune):
        with pytest.raises(pruneattn.UserError, match="no known list of blocks: .* not a wrapper"):
            function(wrap(plain_vit))
