import pytest
import torch

import pruneattn


def hot_fbank(time, mel, frames=256):
    fbank = torch.zeros(1, frames, 128)
    fbank[:, 16 * time : 16 * time + 16, 16 * mel : 16 * mel + 16] = torch.rand(16, 16) + 5
    return fbank


@pytest.mark.parametrize("score", ["intensity", "variation"])
@pytest.mark.parametrize(
    ("family", "number"),
    [("audiomae", 2 * 8 + 5), ("ast", 5 * 16 + 2)],  # 16 time columns, 8 mel rows; the hot patch at (2, 5)
)
def test_the_one_hot_patch_is_kept(make_model, family, score, number):
    model = make_model(family, frames=256, score=score, keep_rate=0.001)
    trace = pruneattn.trace(model, hot_fbank(2, 5))
    assert [kept.tolist() for kept in trace.kept] == [[[number]]] * 3
    assert trace.scores[0].argmax() == number
    assert [scores.shape for scores in trace.scores] == [(1, 128), (1, 1), (1, 1)]


@pytest.mark.parametrize(("family", "number"), [("audiomae", 2 * 8 + 5), ("ast", 5 * 16 + 2)])
def test_the_hot_patch_is_that_token(make_model, family, number):
    model = make_model(family, frames=256)
    with torch.no_grad():
        moved = (model.embed(hot_fbank(2, 5)) - model.embed(torch.zeros(1, 256, 128))).abs().sum(-1)
    assert moved.nonzero().tolist() == [[0, number]]


@pytest.mark.parametrize("family", ["audiomae", "ast"])
@pytest.mark.parametrize("score", ["column_mean", "cls", "intensity"])
def test_the_best_scores_of_the_remaining_patches_are_kept(make_model, family, score):
    model = make_model(family, score=score, keep_rate=(0.7, 1.0, 0.4))
    trace = pruneattn.trace(model, torch.randn(3, 128, 128))
    numbers = torch.arange(64).expand(3, -1)
    for kept, scores in zip(trace.kept, trace.scores, strict=True):
        assert kept.dtype == torch.int64 and scores.shape == numbers.shape
        best = scores.topk(kept.shape[1]).indices.sort().values
        assert torch.equal(kept, numbers.gather(1, best))
        numbers = kept
    assert [kept.shape[1] for kept in trace.kept] == [45, 45, 18]


@pytest.mark.parametrize("score", ["intensity", "variation", "random"])
def test_input_scores_stay_with_their_patch(make_model, score):
    trace = pruneattn.trace(make_model("ast", score=score, keep_rate=0.5), torch.randn(2, 128, 128))
    for kept, scores in zip(trace.kept[:-1], trace.scores[1:], strict=True):
        assert torch.equal(scores, trace.scores[0].gather(1, kept))


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_unpruned_scores_are_shares_of_attention(make_model, family):
    model = make_model(family)
    fbank = torch.randn(2, 128, 128)
    trace = pruneattn.trace(model, fbank)
    assert all(torch.equal(kept, torch.arange(64).expand(2, -1)) for kept in trace.kept)
    for scores in trace.scores:
        assert (scores > 0).all() and (scores.sum(1) < 1).all()
    torch.testing.assert_close(trace.logits, model(fbank), rtol=1e-4, atol=1e-4)


def test_given_patches_keep_their_numbers(make_model):
    model = make_model("audiomae", score="intensity", keep_rate=0.001)
    patches = torch.tensor([[3, 20, 21, 60]])
    assert pruneattn.trace(model, hot_fbank(2, 5, frames=128), patches).kept[2].tolist() == [[21]]
    # A hot patch that is not among the given patches is never kept.
    assert pruneattn.trace(model, hot_fbank(4, 0, frames=128), patches).kept[2].tolist() == [[3]]
