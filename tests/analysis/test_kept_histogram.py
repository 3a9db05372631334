import csv
import dataclasses
import math

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.analysis.clusters import Clusters
from pruneattn.analysis.kept_histogram import (
    bin_edges,
    measure_histograms,
    open_second,
    plot_histograms,
    ratio_of_means,
)
from pruneattn.data import FeatureConfig, FeatureExtractor
from pruneattn.errors import UserError

FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0, padding="min")  # the features of ``analysis_run``
LABELS = ["buzz", "siren", "tone"]
SMALL = dict(num_classes=3, frames=128, embed_dim=32, depth=2, num_heads=2)


def test_ratio_of_small_counts():
    pairs = torch.tensor([[3.0, 1.0], [1.0, 1.0], [4.0, 2.0], [2.0, 2.0]])
    ratio, se = ratio_of_means(pairs)
    assert ratio == pytest.approx(10 / 6)
    residual = np.array([3 - 10 / 6, 1 - 10 / 6, 4 - 20 / 6, 2 - 20 / 6])
    assert se == pytest.approx(residual.std(ddof=1) / 1.5 / 2)
    assert ratio_of_means(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))[0] == math.inf
    assert all(math.isnan(x) for x in ratio_of_means(torch.zeros(3, 2)))
    alone, unknown = ratio_of_means(torch.tensor([[3.0, 2.0]]))
    assert alone == 1.5 and math.isnan(unknown)


def test_standard_error_of_the_ratio_equals_that_of_resampling():
    generator = torch.Generator().manual_seed(0)
    second = torch.rand(400, 1, generator=generator) * 10 + 5
    pairs = torch.cat([2 * second + torch.randn(400, 1, generator=generator) * 3, second], 1)
    ratios = []
    for _ in range(400):
        drawn = pairs[torch.randint(400, (400,), generator=generator)]
        ratios.append((drawn[:, 0].mean() / drawn[:, 1].mean()).item())
    ratio, se = ratio_of_means(pairs)
    assert ratio == pytest.approx(2, abs=0.05) and se == pytest.approx(np.std(ratios), rel=0.15)


def make_clusters(features, boundaries=(-0.9, -0.5, 0.0, 0.4)):
    return Clusters("intensity", boundaries, (0.0,) * 5, (0.2,) * 5, features.mean, features.std, 7, 7 * 64, "")


def test_the_command_compares_two_models(analysis_run, analyze, tmp_path, capsys):
    run, other = analysis_run("audiomae"), analysis_run("ast")
    clusters = make_clusters(run.model.features)
    clusters.save(tmp_path / "clusters.json")
    command = [*run.options(tmp_path / "out"), "--clusters", str(tmp_path / "clusters.json"), "--keep-rate", "0.3"]
    analyze("kept_histogram", *command, "--against", other.folder)
    kept_low, shares = [], []
    for one in (run, other):
        one.model.set_keep_rate(0.3)
        counts = torch.zeros(7, 5)
        for clip, fbank in enumerate(one.fbanks()):
            time, mel = one.model.patch_position(pruneattn.trace(one.model, fbank[None]).kept[-1][0])
            for t, m in zip(time.tolist(), mel.tolist()):
                value = fbank[16 * t : 16 * t + 16, 16 * m : 16 * m + 16].mean().item()
                counts[clip, sum(value > edge for edge in clusters.boundaries)] += 1
        kept_low.append(counts[:, :2].sum(1))
        shares.append(counts / counts.sum(1, keepdim=True))
    with open(tmp_path / "out" / "kept_histogram.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 5 and {row["clips"] for row in rows} == {"7"}
    for number, name in enumerate(("audiomae_tiny", "ast_tiny")):
        last = [row for row in rows if row["model"] == name and row["stage"] == "after block 3"]
        assert {row["patches"] for row in last} == {"2"}  # of 64, 0.3 three times, rounded up: 20, 6, 2
        assert [float(row["share"]) for row in last] == pytest.approx(shares[number].mean(0).tolist(), abs=1e-6)
        errors = shares[number].std(0) / 7**0.5
        assert [float(row["se"]) for row in last] == pytest.approx(errors.tolist(), abs=1e-6)
        first = [float(row["share"]) for row in rows if row["model"] == name and row["stage"] == "input"]
        assert first == pytest.approx([float(row["share"]) for row in rows[:5]]) and sum(first) == pytest.approx(1)
    ratio = kept_low[0].sum() / kept_low[1].sum()
    assert f"audiomae_tiny keeps {ratio:.2f} ±" in capsys.readouterr().out
    with open(tmp_path / "out" / "kept_ratio.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["ratio"]) == pytest.approx(ratio.item()) and row["clips"] == "7"
    assert float(row["kept_by_first"]) == pytest.approx(kept_low[0].mean().item())
    assert float(row["kept_by_second"]) == pytest.approx(kept_low[1].mean().item())
    residual = (kept_low[0] - ratio * kept_low[1]).std() / kept_low[1].mean() / 7**0.5
    assert float(row["se"]) == pytest.approx(residual.item(), rel=1e-5)
    assert (tmp_path / "out" / "kept_histogram.png").stat().st_size > 10000


@pytest.mark.parametrize("frames, stride", [(128, 16), (121, (10, 10)), (100, (10, 16))])
def test_histograms_count_every_patch_once(analysis_run, frames, stride):
    run = analysis_run("ast", frames=frames, stride=stride)
    corners = run.corners()
    analysis = run.analysis()
    analysis.model.set_keep_rate(0.5)
    histograms, _, ratio = measure_histograms(analysis, [analysis.model], make_clusters(run.model.features))
    kept = len(corners)
    for _ in range(3):
        kept = math.ceil(kept / 2)
    assert histograms.sum((1, 2)).tolist() == [7 * len(corners), 7 * kept] and ratio is None
    assert (histograms[1] <= histograms[0]).all()
    run.model.set_keep_rate(0.5)
    for histogram, pruned in zip(histograms, (False, True)):
        means, deviations = [], []
        for fbank in run.fbanks():
            kept = pruneattn.trace(run.model, fbank[None]).kept[-1][0] if pruned else torch.arange(len(corners))
            for patch in kept.tolist():  # row by row of mel bands
                frame, mel = corners[patch]
                cells = fbank.double()[frame : frame + 16, mel : mel + 16]
                means.append(cells.mean().item())
                deviations.append(cells.std(correction=0).item())
        for axis, values, edges in ((1, means, bin_edges(FEATURES)[0]), (0, deviations, bin_edges(FEATURES)[1])):
            expected, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            assert np.abs(histogram.sum(axis) - expected).sum() <= 4  # values on an edge may be in either bin


@pytest.mark.parametrize("features", [FEATURES, FeatureConfig(frames=128, mean=-6.37, std=3.074, padding="zero")])
def test_bins_contain_every_sound_in_any_normalization(features):
    """Digital silence, padding, and full-scale noise that starts or stops within a patch, the largest deviation."""
    extract = FeatureExtractor(features)
    wave = torch.randn(16000, generator=torch.Generator().manual_seed(0)).sign()
    wave[4000:8000] = 0
    cells = extract(wave[None])[0].unfold(0, 16, 1).unfold(1, 16, 16).flatten(2)  # a patch at every frame
    means, deviations = bin_edges(features)
    assert means[0] - 1e-6 <= cells.mean(2).min() and cells.mean(2).max() < means[-1]
    assert cells.std(2, correction=0).max() < deviations[-1]


def test_a_model_that_never_prunes_keeps_its_input(analysis_run):
    run = analysis_run("audiomae")
    analysis = run.analysis(limit=1)
    model = pruneattn.create_model("ast_tiny", **SMALL, prune_blocks=())
    model.features = FEATURES
    histograms, rows, _ = measure_histograms(analysis, [model], make_clusters(FEATURES))
    assert np.array_equal(histograms[0], histograms[1]) and histograms.sum() == 2 * 64
    assert len(rows) == 5 and {row["stage"] for row in rows} == {"input"}
    assert sum(row["share"] for row in rows) == pytest.approx(1) and all(math.isnan(row["se"]) for row in rows)


def test_figure(analysis_run):
    """The same colors in all panels, the clusters' boundaries, and each panel's own shares of C1 to C5."""
    analysis_run("ast")  # skips if matplotlib is not installed
    edges, clusters = bin_edges(FEATURES), make_clusters(FEATURES)
    histograms = np.zeros((3, 90, 80), dtype=np.int64)
    histograms[0, 10:60, 3] = 2
    histograms[1, 20, 3], histograms[2, 59, 3] = 10, 10
    rows = [
        {"number": number, "stage": stage, "cluster": f"C{i + 1}", "share": share[i]}
        for number, stages in ((1, ("input", "after block 4")), (2, ("input", "after block 5", "after block 6")))
        for stage in stages
        for share in [np.eye(5)[{"input": 4, "after block 4": 0, "after block 5": 1, "after block 6": 2}[stage]]]
        for i in range(5)
    ]
    figure = plot_histograms(histograms, rows, clusters, edges, ["one", "two"], "title")
    panels = figure.axes[:3]
    shown = [[text.get_text().split("\n") for text in axis.texts] for axis in panels]
    assert [[name for name, _ in panel] for panel in shown] == [["C1", "C2", "C3", "C4", "C5"]] * 3
    assert [[share for _, share in panel].index("100%") for panel in shown] == [4, 0, 2]
    for axis in panels:
        assert [line.get_xdata()[0] for line in axis.lines] == list(clusters.boundaries)
        assert axis.collections[0].norm is panels[0].collections[0].norm
    first, second = (np.asarray(axis.collections[0].get_array()).reshape(80, 90) for axis in panels[1:])
    assert first[3, 20] == second[3, 59] == 1  # deviation up, mean across
    assert np.isnan(first).sum() == 80 * 90 - 1
    assert panels[0].get_xlim()[0] <= edges[0][10] and panels[0].get_xlim()[1] >= edges[0][60]


def test_a_second_model_of_another_project_gets_the_input_of_the_first(analysis_run, tmp_path):
    run = analysis_run("audiomae")
    analysis = run.analysis()
    torch.manual_seed(2)
    theirs = pruneattn.create_model("ast_tiny", num_classes=3, frames=128)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    second = open_second(analysis, tmp_path / "theirs.pth", "ast_tiny")
    assert second.name == "ast_tiny" and second.features == FEATURES and not second.training
    fbank = torch.randn(1, 128, 128)
    torch.testing.assert_close(second(fbank), theirs.eval()(fbank))


def test_the_score_option_applies_to_both_models(analysis_run, analyze, tmp_path, capsys):
    """Ranked by intensity, both families keep the same patches."""
    run, other = analysis_run("audiomae"), analysis_run("ast")
    make_clusters(run.model.features).save(tmp_path / "clusters.json")
    command = [*run.options(tmp_path / "out"), "--clusters", tmp_path / "clusters.json", "--score", "intensity"]
    analyze("kept_histogram", *command, "--against", other.folder)
    assert "audiomae_tiny keeps 1.00 ± 0.00 times as many C1 and C2 patches as ast_tiny" in capsys.readouterr().out


def test_models_with_another_input_are_rejected(analysis_run, analyze, tmp_path):
    run, other = analysis_run("audiomae"), analysis_run("ast")
    make_clusters(run.model.features).save(tmp_path / "clusters.json")
    features = FeatureConfig(frames=128, mean=-4.0, std=3.0, padding="min")
    path = other.folder / "best.safetensors"
    pruneattn.save_pretrained(other.model, path, features=features, labels=LABELS, multilabel=False)
    command = [*run.options(tmp_path / "out"), "--clusters", str(tmp_path / "clusters.json")]
    with pytest.raises(UserError, match="--against .*different input .mean -11.0 and -4.0"):
        analyze("kept_histogram", *command, "--against", other.folder)


def test_models_with_another_stride_are_rejected(analysis_run, analyze, tmp_path):
    """The numbers of patches that the two models keep could not be compared."""
    run, other = analysis_run("audiomae"), analysis_run("ast", stride=(10, 16))
    make_clusters(run.model.features).save(tmp_path / "clusters.json")
    command = [*run.options(tmp_path / "out"), "--clusters", str(tmp_path / "clusters.json")]
    with pytest.raises(UserError, match=r"--against .*different strides \(16 and 10,16\).*: use models with the same"):
        analyze("kept_histogram", *command, "--against", other.folder)


def test_the_stride_option_applies_to_both_models(analysis_run, tmp_path):
    run, other = analysis_run("ast"), analysis_run("audiomae").folder / "theirs.pth"
    theirs = pruneattn.create_model("ast_tiny", num_classes=3, frames=128, stride=10)
    torch.save(theirs.state_dict(), other)
    with pytest.raises(UserError, match="different strides .16 and 10.*choose it with --stride"):
        open_second(run.analysis(), other, "ast_tiny")
    with pytest.warns(UserWarning, match="resampled to 8 x 8"):
        assert open_second(run.analysis(), other, "ast_tiny", stride=(16, 16)).stride == (16, 16)


def test_clusters_by_variation_are_rejected(analysis_run, analyze, tmp_path):
    run = analysis_run("audiomae")
    clusters = dataclasses.replace(make_clusters(run.model.features), statistic="variation")
    clusters.save(tmp_path / "clusters.json")
    with pytest.raises(UserError, match="has clusters by variation: use clusters by intensity"):
        analyze("kept_histogram", *run.options(tmp_path / "out"), "--clusters", tmp_path / "clusters.json")
