"""Comparison of the precisions of `optimize_for_inference`."""

import csv

import numpy as np
import pytest
import torch

import pruneattn
from pruneattn.analysis import precision
from pruneattn.analysis.precision import measure_precision
from pruneattn.models import quantize
from pruneattn.models.packed import can_pack

pytest.importorskip("scipy")
pytestmark = [
    pytest.mark.skipif(bool(quantize.why_not_int8()), reason="8-bit weights are slow on this machine"),
    pytest.mark.skipif(not can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16 on this machine"),
]


@pytest.mark.parametrize("family", ["audiomae", "ast"])
def test_rows_equal_computing_clip_by_clip(analysis_run, family):
    run = analysis_run(family)
    rows, fast = measure_precision(run.analysis(), [1.0, (0.9, 0.5, 0.5)])
    assert [(row["keep_rate"], row["precision"]) for row in rows] == [
        (rate, name) for rate in (1.0, (0.9, 0.5, 0.5)) for name in ("fp32", "bf16", "int8")
    ]
    assert fast.quantization is not None and not run.model.optimized
    labels = torch.tensor([["buzz", "siren", "tone"].index(path.parent.name) for path in run.paths])
    fbanks = torch.stack(run.fbanks())
    half = pruneattn.optimize_for_inference(run.model, torch.bfloat16)
    exact = run.analysis()
    plain = pruneattn.load_pretrained(run.folder)
    for row in rows:
        model = {"fp32": plain, "bf16": half, "int8": fast}[row["precision"]]
        for one in (model, plain):
            one.set_keep_rate(row["keep_rate"])
        with torch.no_grad():
            given, expected = pruneattn.trace(model, fbanks), pruneattn.trace(plain, fbanks)
        right, reference = ((one.logits.argmax(1) == labels).float() for one in (given, expected))
        assert row["metric"] == pytest.approx(right.mean().item()) and row["metric_name"] == "top-1"
        assert row["difference"] == pytest.approx((right - reference).mean().item())
        error = (given.logits.float() - expected.logits).norm() / expected.logits.norm()
        assert row["logits_error"] == pytest.approx(error.item(), rel=0.1, abs=1e-4)
        pairs = zip(given.kept[-1].tolist(), expected.kept[-1].tolist(), strict=True)
        same = np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])
        assert row["same_patches"] == pytest.approx(same) and row["clips"] == 7
    assert all(row["same_patches"] == 1 for row in rows if row["keep_rate"] == 1 or row["precision"] == "fp32")
    assert all(row["logits_error"] > 1e-3 for row in rows if row["precision"] != "fp32")
    assert exact.failed == []


def test_patches_that_differ_are_counted():
    def trace(*kept):
        return precision.Trace(torch.zeros(2, 1), [torch.tensor([[0], [0]]), torch.tensor(kept)], [])

    assert precision._same_patches(trace([0, 1], [2, 3]), trace([0, 2], [2, 3])) == [0.5, 1.0]
    assert precision._same_patches(precision.Trace(torch.zeros(2, 1), [], []), trace([0], [0])) == [1.0, 1.0]


def test_command(analysis_run, analyze, tmp_path, capsys, monkeypatch):
    run = analysis_run("ast")
    analyze("precision", *run.options(tmp_path), "--keep-rates", 1, 0.5, "--limit", 4)
    printed = capsys.readouterr().out
    assert "keep-rate  0.5, int8: top-1 " in printed and "8-bit weights in 16 of 16 linear layers" in printed
    with open(tmp_path / "precision.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["clips"] for row in rows} == {"4"}
    seen = []
    monkeypatch.setattr("pruneattn.analysis.commands.precision.calibration_batches", lambda args, model: seen.append(1))
    analyze("precision", *run.options(tmp_path), "--keep-rates", 1, "--calibrate", 2, "--limit", 2)
    assert seen == [1]
