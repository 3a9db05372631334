"""Properties of token merging. By design its results differ from those of pruning, so they cannot be compared."""

import pytest
import torch

import pruneattn
from bench.harness.token_merging import MergingViT, match, merge, mergeable, merging_block, merging_for, merging_macs

pytestmark = pytest.mark.harness

FAMILIES = ("audiomae", "ast")


def make_model(family, **arguments):
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5, "frames": 64, "prune_blocks": ()}
    return pruneattn.create_model(f"{family}_tiny", **sizes | arguments).double().eval()


@pytest.mark.parametrize("family, stride", [("audiomae", 16), ("ast", 16), ("ast", 10)])
def test_without_merging_the_result_is_that_of_the_model(family, stride):
    model, fbank = make_model(family, stride=stride), torch.randn(2, 64, 128, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(MergingViT(model, 0)(fbank), model(fbank), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(MergingViT(model, 2)(fbank), model(fbank), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("extra", [1, 2])
def test_merging_equal_tokens_changes_nothing(extra):
    """Because attention adds log size to the logits, one token of size 2 has the same effect as two equal tokens."""
    block = make_model("audiomae").blocks[0]
    pairs = torch.randn(2, 5, 1, 24, dtype=torch.float64).expand(-1, -1, 2, -1).reshape(2, 10, 24)
    x = torch.cat([torch.randn(2, extra, 24, dtype=torch.float64), pairs], 1)
    with torch.inference_mode():
        merged, size = merging_block(block, x, None, 5, extra)
        assert size.flatten(1).tolist() == [[1.0] * extra + [2.0] * 5] * 2
        dense = block(x)
        torch.testing.assert_close(merged, one_of_each(dense, extra))
        again, _ = merging_block(block, merged, size, 0, extra)
        torch.testing.assert_close(again, one_of_each(block(dense), extra))


def one_of_each(x, extra):
    return torch.cat([x[:, :extra], x[:, extra::2]], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_over_patches_is_weighted_by_size(family):
    """A whole model on a clip in which each pair of neighboring patches is equal, with equal positional embeddings."""
    model = make_model(family, depth=1)
    with torch.no_grad():
        extra = model.num_extra_tokens
        model.pos_embed[:, extra + 1 :: 2] = model.pos_embed[:, extra::2]
        model.embed = lambda fbank: torch.randn(2, 16, 24, dtype=torch.float64).repeat_interleave(2, 1)
    fbank = torch.randn(2, 64, 128, dtype=torch.float64)
    with torch.inference_mode():
        torch.manual_seed(1)
        expected = model(fbank)
        torch.manual_seed(1)
        torch.testing.assert_close(MergingViT(model, 4)(fbank), expected)


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("tokens", range(3, 12))
def test_extra_tokens_stay_and_sizes_add_up(tokens, extra):
    r = mergeable(tokens, 100, extra)
    keys, x = torch.randn(3, tokens, 4), torch.randn(3, tokens, 4)
    assert r > 0 or tokens - extra < 2
    if r:
        removed, into = match(keys, r, extra)
        assert (removed >= extra).all() and (into >= extra).all()
        assert all(len(set(row)) == r for row in removed.tolist())
        merged, size = merge(x, None, (removed, into))
        assert merged.shape == (3, tokens - r, 4)
        torch.testing.assert_close(merged[:, :extra], x[:, :extra])
        torch.testing.assert_close((merged * size).sum(1), x.sum(1))
        assert (size.sum(1) == tokens).all()


def test_the_most_similar_pair_is_merged():
    keys = torch.tensor([[[1.0, 0], [0, 1], [9, 0.1], [9, 0], [0.5, 1], [-1, 0.3]]])
    removed, into = match(keys, 1, 1)
    assert (removed.item(), into.item()) == (2, 3)


def test_tokens_keep_their_order():
    x = torch.arange(6.0).reshape(1, 6, 1)
    merged, _ = merge(x, None, (torch.tensor([[4]]), torch.tensor([[1]])))
    assert merged.flatten().tolist() == [0, 2.5, 2, 3, 5]


@pytest.mark.parametrize("family, stride", [("audiomae", 16), ("ast", 16), ("ast", 10), ("ast", (10, 16))])
def test_macs_match_those_of_pruning(family, stride):
    model = make_model(family, stride=stride)
    paper = pruneattn.count_macs(model).paper
    assert merging_macs(model, 0)[0] == paper
    for share in (0.8, 0.5):
        assert merging_macs(model, merging_for(model, share * paper))[0] == pytest.approx(share * paper, rel=0.1)
    assert merging_macs(model, 3)[0] > merging_macs(model, 4)[0]
