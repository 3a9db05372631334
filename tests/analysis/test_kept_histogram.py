import csv
import math

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.analysis.clusters import Clusters
from pruneattn.analysis.kept_histogram import measure_histograms, ratio_of_means
from pruneattn.data import FeatureConfig
from pruneattn.errors import UserError


def test_ratio_by_hand():
    pairs = torch.tensor([[3.0, 1.0], [1.0, 1.0], [4.0, 2.0], [2.0, 2.0]])
    ratio, se = ratio_of_means(pairs)
    assert ratio == pytest.approx(10 / 6)
    residual = np.array([3 - 10 / 6, 1 - 10 / 6, 4 - 20 / 6, 2 - 20 / 6])
    assert se == pytest.approx(residual.std(ddof=1) / 1.5 / 2)
    assert ratio_of_means(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))[0] == math.inf


def test_its_error_is_that_of_resampling():
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


def test_script_model_against_model(analysis_run, analysis_script, tmp_path, capsys):
    run, other = analysis_run("audiomae"), analysis_run("ast")
    clusters = make_clusters(run.model.features)
    clusters.save(tmp_path / "clusters.json")
    command = [*run.options(tmp_path / "out"), "--against", str(other.folder), "--clusters", str(tmp_path / "clusters.json")]
    analysis_script("kept_histogram").main([*command, "--keep-rate", "0.3"])
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
        assert [float(row["share"]) for row in last] == pytest.approx(shares[number].mean(0).tolist(), abs=1e-6)
        errors = shares[number].std(0) / 7**0.5
        assert [float(row["se"]) for row in last] == pytest.approx(errors.tolist(), abs=1e-6)
        first = [float(row["share"]) for row in rows if row["model"] == name and row["stage"] == "input"]
        assert first == pytest.approx([float(row["share"]) for row in rows[:5]]) and sum(first) == pytest.approx(1)
    ratio = kept_low[0].sum() / kept_low[1].sum()
    assert f"audiomae_tiny keeps {ratio:.2f} ±" in capsys.readouterr().out
    assert (tmp_path / "out" / "kept_histogram.png").stat().st_size > 10000


def test_histograms_count_every_patch_once(analysis_run):
    run = analysis_run("ast")
    from pruneattn.analysis.command import make_parser, open_analysis

    args = make_parser("x", "x").parse_args(run.options(run.folder / "out"))
    analysis = open_analysis(args)
    analysis.model.set_keep_rate(0.5)
    histograms, _, ratio = measure_histograms(analysis, [analysis.model], make_clusters(run.model.features))
    assert histograms.sum((1, 2)).tolist() == [7 * 64, 7 * 8] and ratio is None
    assert (histograms[1] <= histograms[0]).all()
    means = torch.stack([run.model.patch_values(fbank[None], lambda cells: cells.mean(-1))[0] for fbank in run.fbanks()])
    column = histograms[0].sum(1)  # 90 bins of the mean from -1.5 to 1.5
    expected = torch.histc(means.clamp(-1.5, 1.5), 90, -1.5, 1.5)
    assert np.abs(column - expected.numpy()).sum() <= 4  # values on an edge may fall to either side


def test_models_with_another_input_are_refused(analysis_run, analysis_script, tmp_path):
    run, other = analysis_run("audiomae"), analysis_run("ast")
    make_clusters(run.model.features).save(tmp_path / "clusters.json")
    features = FeatureConfig(frames=128, mean=-4.0, std=3.0, padding="min")
    pruneattn.save_pretrained(
        other.model, other.folder / "best.safetensors", features=features, labels=["buzz", "siren", "tone"], multilabel=False
    )
    command = [*run.options(tmp_path / "out"), "--clusters", str(tmp_path / "clusters.json")]
    with pytest.raises(UserError, match="--against .*different input .mean -11.0 and -4.0"):
        analysis_script("kept_histogram").main([*command, "--against", str(other.folder)])
