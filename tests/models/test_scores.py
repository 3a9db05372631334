import pytest
import torch

import pruneattn
from pruneattn.models.scores import make_pruning, mean, random_numbers, standard_deviation


def test_statistics_are_those_of_the_cells():
    cells = torch.randn(4, 7, 256, dtype=torch.float64) * 3 + 100
    torch.testing.assert_close(mean(cells), cells.mean(-1))
    torch.testing.assert_close(standard_deviation(cells), cells.std(-1, correction=0))


def test_constant_patches_tie_exactly():
    cells = torch.randn(1, 1000, 1).expand(-1, -1, 256)
    assert torch.equal(mean(cells), cells[..., 0])
    assert (standard_deviation(cells) == 0).all()


@pytest.mark.parametrize("score", ["intensity", "variation"])
@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_padding_is_dropped_first_from_its_end(make_model, family, score):
    """Patches of one constant tie; ties go to the lower patch number."""
    model = make_model(family, score=score, prune_blocks=(3,), keep_rate=0.75)
    fbank = torch.full((1, 128, 128), -1.3)
    live = model.patches_from_grid((torch.arange(4), torch.tensor([6, 1, 5, 1])))
    for time, mel in zip(*model.patch_position(live), strict=True):
        fbank[0, 16 * time : 16 * time + 16, 16 * mel : 16 * mel + 16] = torch.randn(16, 16).abs()
    constant = sorted(set(range(64)) - set(live.tolist()))
    expected = sorted(live.tolist() + constant[:44])
    assert pruneattn.trace(model, fbank).kept[0][0].tolist() == expected


def test_input_statistics_are_float32_in_half_precision(make_model):
    model = make_model("audiomae", score="intensity").to(torch.bfloat16)
    fbank = torch.randn(2, 128, 128, dtype=torch.bfloat16)
    scores = pruneattn.trace(model, fbank).scores[0]
    expected = fbank.float().view(2, 8, 16, 8, 16).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-7)


def test_random_numbers_are_uniform_and_unrelated():
    cells = torch.randn(400, 64, 256)
    numbers = random_numbers(cells)
    assert numbers.dtype == torch.float32 and numbers.shape == (400, 64)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 16, 0, 1)
    assert ((counts - 1600).square() / 1600).sum() < 37.7  # chi-squared, 15 degrees: above in 1 of 1000 draws
    # No correlation with neighboring patches, with the same patch of neighboring clips, or with the level of the patch.
    flat = numbers - 0.5
    for other in (flat.roll(1, 1), flat.roll(1, 0), cells.mean(-1)):
        assert torch.corrcoef(torch.stack([flat.flatten(), other.flatten()]))[0, 1].abs() < 4 / 25600**0.5


def test_random_numbers_depend_on_the_clip_and_the_position():
    cells = torch.randn(5, 64, 256)
    numbers = random_numbers(cells)
    assert torch.equal(random_numbers(cells[3:]), numbers[3:])
    assert numbers.unique().numel() == numbers.numel()
    changed = cells.clone()
    changed[0, 0, 0] = torch.nextafter(changed[0, 0, 0], torch.tensor(torch.inf))
    others = random_numbers(changed)
    assert (others[0] != numbers[0]).sum() >= 60 and torch.equal(others[1:], numbers[1:])
    silence = random_numbers(torch.full((1, 64, 256), -1.5))  # constant patches do not tie
    assert silence.unique().numel() == 64


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_random_ranking_ignores_the_patch(make_model, family):
    """A loud patch is kept as often as any other patch, and traces are reproducible."""
    model = make_model(family, score="random", keep_rate=0.5, depth=2, prune_blocks=(0,))
    fbank = torch.randn(600, 128, 128)
    fbank[:, 16:32, 32:48] += 10
    with torch.inference_mode():
        kept = pruneattn.trace(model, fbank).kept[0]
        assert torch.equal(pruneattn.trace(model, fbank[7:9]).kept[0], kept[7:9])
    loud = model.patches_from_grid((torch.tensor(1), torch.tensor(2)))
    assert abs((kept == loud).any(1).float().mean() - 0.5) < 4 * (0.25 / 600) ** 0.5


def test_random_pruning_by_a_function(make_model):
    def anything(q, k, v, extra_tokens):
        return torch.rand(k.shape[0], k.shape[2] - extra_tokens)

    model = make_model("ast", score=anything, keep_rate=0.5)
    fbank = torch.randn(2, 128, 128)
    first, second = (pruneattn.trace(model, fbank) for _ in range(2))
    assert [kept.shape[1] for kept in first.kept] == [32, 16, 8]
    assert not torch.equal(first.kept[0], second.kept[0])


def test_function_gets_all_heads_and_is_not_differentiated(make_model):
    shapes = []

    def score(q, k, v, extra_tokens):
        shapes.append((q.shape, k.shape, v.shape, extra_tokens))
        return (q * k).sum(dim=(1, 3))[:, extra_tokens:].double()

    model = make_model("ast", score=score, keep_rate=0.5)
    trace = pruneattn.trace(model, torch.randn(2, 128, 128))
    assert [shape[0] for shape in shapes] == [(2, 3, 66, 8), (2, 3, 34, 8), (2, 3, 18, 8)]
    assert all(q == k == v and extra == 2 for q, k, v, extra in shapes)
    assert all(scores.dtype == torch.float32 and not scores.requires_grad for scores in trace.scores)


def test_bad_scores():
    with pytest.raises(pruneattn.UserError, match="score.*column_mean, cls, intensity, variation, random.*'sum'"):
        make_pruning("sum")
    model = pruneattn.create_model("ast_tiny", frames=32, keep_rate=0.5, score=lambda q, k, v, extra: k.sum((1, 3)))
    with pytest.raises(ValueError, match=r"score.*\[1, 16\].*\[1, 18\]"):
        model(torch.randn(1, 32, 128))
