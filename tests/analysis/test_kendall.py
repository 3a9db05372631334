import csv
import math

import pytest
import torch

import pruneattn
from pruneattn.analysis import kendall as module
from pruneattn.analysis.clusters import STATISTICS, Clusters, load_clusters
from pruneattn.analysis.kendall import kendall, measure_kendall, scoring_twin
from pruneattn.data.loader import eval_batches
from pruneattn.errors import UserError


def by_definition(x, y):
    """``(paper's coefficient, tau-b)`` of two lists, pair by pair."""
    concordant = discordant = ties = ties_x = ties_y = 0
    for i in range(len(x)):
        for j in range(i):
            sign = (x[i] - x[j]) * (y[i] - y[j])
            concordant += sign > 0
            discordant += sign < 0
            ties += sign == 0
            ties_x += x[i] == x[j]
            ties_y += y[i] == y[j]
    pairs = concordant + discordant + ties
    rest = (pairs - ties_x) * (pairs - ties_y)
    tau_b = (concordant - discordant) / math.sqrt(rest) if rest else math.nan
    return (concordant + ties - discordant) / pairs, tau_b


def test_one_pair_of_each_kind():
    x, y = (
        torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[2, 3], [3, 2], [2, 3], [1, 1]]),
    )
    found = kendall(x, y)
    assert found.paper.tolist() == [1, -1, 1, 1] and found.tied.tolist() == [0, 0, 1, 1]
    assert found.tau_b[:2].tolist() == [1, -1] and found.tau_b[2:].isnan().all()


@pytest.mark.parametrize("rows_at_once", [1, 7, 64])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_against_the_definition_and_scipy(monkeypatch, levels, rows_at_once):
    stats = pytest.importorskip("scipy.stats")
    monkeypatch.setattr(module, "_PAIRS_AT_ONCE", 6 * 33 * rows_at_once)
    generator = torch.Generator().manual_seed(levels)
    x = torch.rand(6, 33, generator=generator)
    x[1] = x[1].round(decimals=1)  # ties on both sides
    y = torch.randint(levels, (6, 33), generator=generator)
    y[2] = (x[2] * 5).long()  # mostly concordant
    found = kendall(x, y)
    for row in range(6):
        paper, tau_b = by_definition(x[row].tolist(), y[row].tolist())
        assert found.paper[row].item() == pytest.approx(paper, abs=1e-12)
        pairs = [(i, j) for i in range(33) for j in range(i)]
        tied = sum(bool(x[row, i] == x[row, j] or y[row, i] == y[row, j]) for i, j in pairs)
        assert found.tied[row].item() == pytest.approx(tied / len(pairs), abs=1e-12)
        assert found.tau_b[row].item() == pytest.approx(tau_b, abs=1e-12)
        assert found.tau_b[row].item() == pytest.approx(stats.kendalltau(x[row], y[row]).statistic, abs=1e-12)


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_the_twin_scores_every_block_and_computes_the_same(family):
    torch.manual_seed(0)
    model = pruneattn.create_model(
        f"{family}_tiny",
        embed_dim=32,
        depth=4,
        num_heads=2,
        frames=128,
        score="variation",
        keep_rate=0.5,
        prune_blocks=(1,),
    )
    torch.nn.init.normal_(model.head.weight)
    fbank = torch.randn(2, 128, 128)
    with torch.no_grad():
        found = pruneattn.trace(scoring_twin(model.eval()), fbank)
        model.set_keep_rate(1.0)
        torch.testing.assert_close(found.logits, model(fbank))
        # The score of the third block, computed directly from the tokens that enter it.
        x = model.prepend_extra_tokens(model.embed(fbank))
        for block in model.blocks[:2]:
            x = block.finish(x, block.attn(block.norm1(x)))
        q, k, _ = model.blocks[2].attn.project(model.blocks[2].norm1(x), "qkv")
        weights = (q @ k.transpose(-2, -1) / 4).softmax(-1).mean(1)  # [B, N, N], heads of 16
    extra = model.num_extra_tokens
    rows = weights[:, 0, extra:] if family == "ast" else weights[:, extra:, extra:].mean(1)
    assert len(found.scores) == 4
    torch.testing.assert_close(found.scores[2], rows)


@pytest.mark.parametrize("frames, stride", [(121, (10, 10)), (100, (10, 16))])
def test_every_patch_is_ranked_at_any_stride(analysis_run, frames, stride):
    run = analysis_run("ast", frames=frames, stride=stride)
    clusters = Clusters("intensity", (-0.9, -0.5, 0.0, 0.4), (0.0,) * 5, (0.2,) * 5, -11.0, 3.0, 7, 7, "")
    rows = measure_kendall(run.analysis(limit=2), [clusters])
    twin, expected = scoring_twin(run.model), []
    assert twin.stride == run.model.stride
    for index in eval_order(run, 2):
        fbank = run.fbanks()[index]
        with torch.no_grad():
            scores = pruneattn.trace(twin, fbank[None]).scores[1][0]
        values = [fbank[frame : frame + 16, mel : mel + 16].mean().item() for frame, mel in run.corners()]
        numbers = [sum(value > edge for edge in clusters.boundaries) for value in values]
        expected.append(by_definition(scores.tolist(), numbers))
    for position, variant in enumerate(("paper", "tau_b")):
        (row,) = [row for row in rows if (row["block"], row["variant"]) == (2, variant)]
        assert row["coefficient"] == pytest.approx(sum(pair[position] for pair in expected) / 2, abs=1e-6)


def eval_order(run, limit):
    return [index for batch in eval_batches(len(run.paths), 3, limit=limit) for index in batch]


def test_the_command_averages_over_clips(analysis_run, analyze, tmp_path):
    """Coefficients and errors of the CSV against a loop over clips and pairs."""
    run = analysis_run("audiomae")
    fbanks, files = torch.stack(run.fbanks()), []
    for name, statistic in STATISTICS.items():
        edges = run.model.patch_values(fbanks, statistic).quantile(torch.tensor([0.2, 0.4, 0.6, 0.8]))
        files.append(tmp_path / f"{name}.json")
        Clusters(name, tuple(edges.tolist()), (0.0,) * 5, (0.2,) * 5, -11.0, 3.0, 7, 7 * 64, "").save(files[-1])
    analyze("kendall", *run.options(tmp_path / "out"), "--clusters", *files)
    with open(tmp_path / "out" / "kendall.csv", newline="") as file:
        rows = {(row["statistic"], int(row["block"]), row["variant"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * 4 * 2
    twin, clusters = scoring_twin(run.model), load_clusters(files[1], run.model.features)
    expected = []
    for fbank in fbanks:
        with torch.no_grad():
            scores = pruneattn.trace(twin, fbank[None]).scores[2][0]
        cells = fbank.view(8, 16, 8, 16).transpose(1, 2).reshape(64, 256)  # time-major
        numbers = [sum(value > edge for edge in clusters.boundaries) for value in cells.std(1, correction=0).tolist()]
        expected.append(by_definition(scores.tolist(), numbers))
    for position, variant in enumerate(("paper", "tau_b")):
        values = torch.tensor([pair[position] for pair in expected], dtype=torch.float64)
        row = rows["variation", 3, variant]
        assert int(row["clips"]) == 7 and float(row["coefficient"]) == pytest.approx(values.mean().item(), abs=2e-3)
        assert float(row["se"]) == pytest.approx((values.std() / 7**0.5).item(), abs=2e-3)
    assert (tmp_path / "out" / "kendall.png").stat().st_size > 10000 and (tmp_path / "out" / "kendall.pdf").exists()
    with pytest.raises(UserError, match="two files have clusters by intensity"):
        analyze("kendall", *run.options(tmp_path / "out"), "--clusters", files[0], files[0])
