"""Reports and comparisons of made-up results, whose tables and figures are known."""

import math
import re
from pathlib import Path

import pytest

from bench.harness import report
from bench.harness.compare import compare, comparison_text
from bench.harness.fit import exponent, scaling_groups
from bench.harness.measure import Case, with_savings
from bench.harness.rows import ResultFile, read_result, row_of
from pruneattn.errors import UserError

ROOT = Path(__file__).parents[2]
MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123456789abcdef",
    "changed_files": False,
    "device_name": "a CPU",
    "driver": None,
    "threads": 2,
    "torch": "2.11.0",
    "triton": None,
    "peaks": {"copy": 1e10, "product": {"float32": 1e11}},
}


def timed(case, provider, ms, keep_rate=None, spread=0.01, **values):
    return row_of(
        **case._asdict(),
        provider=provider,
        keep_rate=keep_rate,
        status="ok",
        timing="wall clock",
        rounds=5,
        p50_ms=ms,
        p20_ms=ms * (1 - spread),
        p80_ms=ms * (1 + spread),
        clips_per_second=1e3 * case.batch / ms,
        **values,
    )


def model_rows():
    case = Case("model", "audiomae_base", "cpu", "float32", 1, 513)
    rows = [
        timed(case, "ours", 100.0, 1.0, macs_paper=10**10, macs_computed=10**10, peak_memory_mib=20.0),
        timed(case, "SDPA", 110.0, 1.0, macs_paper=10**10, macs_computed=10**10, peak_memory_mib=30.0),
        timed(case, "ours", 55.0, 0.5, macs_paper=5 * 10**9, macs_computed=4 * 10**9, peak_memory_mib=12.0),
        row_of(**case._asdict(), provider="timm ViT", status="left out: timm is not installed"),
    ]
    return with_savings(rows)


def all_rows():
    op = Case("op", "attention", "cpu", "float32", 1, 65)
    rows = [*model_rows(), *part_rows()]
    rows += [timed(op._replace(tokens=n), who, n / 10, floor_ms=n / 50) for n in (65, 513) for who in ("ours", "eager")]
    for n in (64, 128, 256, 512):
        case = Case("scaling by tokens", "column_mean_attention", "cpu", "float32", 1, n)
        rows.append(timed(case, "ours", 2e-4 * n**2, peak_memory_mib=n / 64))
        rows.append(timed(case, "eager", 1e-3 * n**2, peak_memory_mib=n**2 / 4096))
    return rows


def part_rows():
    case = Case("block parts", "audiomae_base", "cpu", "float32", 1, 513)
    dense = {"norm": (1, None), "mlp": (60, 60), "qkv": (39, 40), "whole": (100, 100)}
    pruned = {"norm": (1, None), "mlp": (45, 30), "qkv": (38, 40), "whole": (84, 70)}
    rows = []
    for rate, parts in ((1.0, dense), (0.5, pruned)):
        for part, (ms, macs) in parts.items():
            row = timed(case, "ours", ms, rate, part=part, macs_computed=macs)
            if rate < 1:
                row["saving"] = 1 - ms / dense[part][0]
                row["theory"] = 1 - macs / dense[part][1] if macs else None
            rows.append(row)
    return rows


def write(folder, rows, **machine):
    file = ResultFile(folder, "cpu", MACHINE | machine)
    file.add(rows)
    return file.path


def test_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = write(tmp_path, all_rows())
    assert report.main([str(path), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "out" / f"{path.stem}.md").read_text().strip() == text.strip()
    assert (
        "a CPU, 2 threads" in text and "commit 0123456789ab," in text and "copy 10.0 GB/s, float32 100 GFLOP/s" in text
    )
    table = text.partition("### model: audiomae_base, cpu, float32, batch 1, 513 tokens")[2].partition("###")[0]
    line = cells_of(next(line for line in table.splitlines() if "ours, 0.5" in line))
    assert line == ["ours, 0.5", "55", "54.5", "55.5", "18.2", "5", "4", "12", "45.0%", "50.0%", "90%"]
    assert "- timm ViT: left out: timm is not installed" in table and "floor" not in table
    figures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert len(figures) == 6 and all((tmp_path / "out" / name).stat().st_size > 5000 for name in figures)


#: Names in docs/results.md: provider and backend in the result file.
IMPLEMENTATIONS = {
    "pruneattn, optimized": ("ours", "optimized"),
    "pruneattn, eager": ("ours", "eager"),
    "SDPA, eager": ("SDPA", "eager"),
    "SDPA, compiled": ("SDPA", "compiled"),
    "eager attention": ("the paper's way", "eager"),
    "SDPA with a separate score": ("SDPA, separate score", "eager"),
    "timm ViT": ("timm ViT", "eager"),
    "timm ViT with `pruneattn.prune`": ("timm ViT", "pruneattn.prune"),
    "Hugging Face AST": ("Hugging Face AST", "eager"),
    "Hugging Face AST with `pruneattn.prune`": ("Hugging Face AST", "pruneattn.prune"),
    "token merging, optimized": ("token merging", "optimized"),
    "random drop, optimized": ("random drop", "optimized"),
    "stride drop, optimized": ("stride drop", "optimized"),
}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documented_speeds_are_those_of_the_result_file():
    """All models of the result file are in the table of docs/results.md, with these numbers."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    section = text.partition("\n## Speed on a CPU\n")[2].partition("\n### ")[0]
    machine, rows = read_result(ROOT / re.search(r"`(bench/results/[\w.-]+\.json)`", section)[1])
    assert not machine["changed_files"] and f"commit {machine['commit'][:12]}" in section
    assert f"{machine['peaks']['copy'] / 1e9:.1f} GB/s" in section
    assert f"{machine['peaks']['product']['float32'] / 1e9:.0f} GFLOP/s" in section
    measured = {}
    for row in rows:
        if row["level"] == "model" and row["status"] == "ok":
            saving, theory = (f"{100 * row[name]:.1f} %" if row[name] else "-" for name in ("saving", "theory"))
            realized = f"{100 * row['realised']:.0f} %" if row["realised"] else "-"
            key = row["provider"], row["backend"], f"{row['keep_rate']:g}"
            measured.setdefault(key, {})[row["subject"]] = [f"{row['p50_ms']:.0f}", saving, realized], theory
    documented = [cells_of(line) for line in section.splitlines() if line.startswith("|")][2:]
    assert {(*IMPLEMENTATIONS[name], rate) for name, rate, *_ in documented} == measured.keys()
    for name, rate, theory, *cells in documented:
        models = measured[(*IMPLEMENTATIONS[name], rate)]
        for subject, shown in (("audiomae_base", cells[:3]), ("ast_base", cells[3:])):
            assert shown == models.get(subject, [["-"] * 3])[0], (name, rate, subject)
        assert theory in [theory for _, theory in models.values()], (name, rate)


def test_summary():
    lines = report.summary_lines(all_rows())
    assert lines[0] == "cpu, float32, batch 1, 512 patches:" and len(lines) == 7
    assert cells_of(lines[6]) == ["ours, 0.5", "50.0%", "55", "45.0%", "90%"]


def test_figures_show_the_measurements():
    pytest.importorskip("matplotlib")
    from bench.harness.figures import FIGURES

    rows = all_rows()
    (axis,) = FIGURES["realised"](rows).axes
    line = next(line for line in axis.lines if line.get_label() == "ours")
    assert line.get_xydata().tolist() == [[0.5, pytest.approx(90)]]
    (axis,) = FIGURES["time-macs"](rows).axes
    ideal = next(line for line in axis.lines if "proportional" in line.get_label())
    assert ideal.get_xydata().tolist() == [[0, 0], [10, 100]]
    assert sorted(map(tuple, next(line for line in axis.lines if line.get_label() == "ours").get_xydata())) == [
        (4, 55),
        (10, 100),
    ]
    many = [row | {"provider": f"provider {i}"} for row in rows[:3] for i in range(25)]
    looks = [(line.get_color(), line.get_marker()) for line in FIGURES["time-macs"](many).axes[0].lines]
    assert len(looks) == len(set(looks)) == 26
    (axis,) = FIGURES["ops-floor"](rows).axes
    assert axis.lines[0].get_ydata().tolist() == [5, 5]
    (axis,) = FIGURES["clips-per-second"](rows).axes
    assert len(axis.patches) == 3 and axis.patches[-1].get_width() == pytest.approx(1000 / 55)
    (axis,) = FIGURES["memory"](rows).axes
    assert axis.patches[-1].get_width() == 12
    time, memory = FIGURES["scaling"](rows).axes
    assert [line.get_label() for line in memory.lines] == ["eager: 2.00 ± 0.00", "ours: 1.00 ± 0.00"]
    assert time.get_ylabel() == "ms"
    assert [draw([rows[3]]) for draw in FIGURES.values()] == [None] * 6


def test_lost_savings():
    (line,) = report.lost_savings(part_rows())
    # 84 ms instead of 70: the MLP takes 15 ms more than half of its 60, qkv 1 ms less than 39, norm 0.3 more than 0.7.
    assert (
        "53% of the saving in computed MACs; +14.00 ms of 84.00 ms above it: mlp +15.00 ms, norm +0.30 ms, qkv -1.00 ms"
        in line
    )
    assert report.lost_savings(model_rows()) == []


def test_exponents():
    sizes = [64, 128, 256, 512, 1024]
    assert exponent(sizes, [3 * n**1.5 for n in sizes]) == (pytest.approx(1.5), pytest.approx(0, abs=1e-9))
    # Computed by hand: logarithms 0, 1, 3 at 0, 1, 2 have slope 1.5 and residuals 1/6, -1/3, 1/6.
    slope, error = exponent([1, math.e, math.e**2], [1, math.e, math.e**3])
    assert slope == pytest.approx(1.5) and error == pytest.approx(math.sqrt((1 / 6) / 1 / 2))
    for values in ([1.0, 2.0], [1.0, 0.0, 2.0], [1.0, None, 2.0]):
        assert exponent(range(1, len(values) + 1), values) == (None, None)
    assert exponent([8, 8, 8], [1.0, 2.0, 3.0]) == (None, None)


def test_scaling_groups():
    groups = scaling_groups(all_rows()[::-1], "scaling by tokens")
    assert [(group[0]["provider"], [row["tokens"] for row in group]) for group in groups] == [
        ("eager", [64, 128, 256, 512]),
        ("ours", [64, 128, 256, 512]),
    ]
    assert scaling_groups(all_rows(), "scaling by batch") == []
    lines = report.scaling_lines(all_rows())
    assert len(lines) == 4 and "64 to 512 | 2.00 ± 0.00 | 1.00 ± 0.00" in lines[3]


def scaled(rows, spread=0.01, **factors):
    """The rows with scaled times: ``ours=1.1``, or ``all=0.5``."""
    times = {"p20_ms": 1 - spread, "p50_ms": 1, "p80_ms": 1 + spread}
    return [
        row
        if row["p50_ms"] is None
        else row
        | {name: row["p50_ms"] * factors.get(row["provider"], factors.get("all", 1)) * t for name, t in times.items()}
        for row in rows
    ]


@pytest.mark.parametrize("machine", [1.0, 1.4, 0.6])
@pytest.mark.parametrize(
    "factor, spread, changed",
    [
        (1.0, 0.01, 0),
        (1.04, 0.001, 0),  # less than `LEAST_CHANGE`
        (1.08, 0.01, 2),
        (0.9, 0.01, 2),
        (1.20, 0.06, 0),  # less than three spreads of 0.085
        (1.30, 0.06, 2),
    ],
)
def test_changes_beyond_the_noise(factor, spread, changed, machine):
    """If the machine was slower during one run, its times have not changed."""
    rows = scaled(model_rows(), spread)
    result = compare((MACHINE, rows), (MACHINE, scaled(rows, spread, ours=factor * machine, all=machine)))
    if (factor - 1) * (machine - 1) < 0:
        changed = 0  # the time itself changed in the opposite direction
    assert result.compared == 3 and len(result.changes) == changed
    assert all(change.ratio == pytest.approx(factor) for change in result.changes)
    assert [ratio for _, ratio in result.shifts] == ([] if machine == 1 else [pytest.approx(machine)])
    text = "\n".join(comparison_text(result))
    assert text.startswith(f"3 times compared within their cases: {changed or 'none'} changed")
    assert (f"audiomae_base, cpu, float32, batch 1, 513 tokens: {100 * machine - 100:+.1f} %" in text) == (machine != 1)


def test_a_row_has_at_least_the_median_spread_of_its_file():
    """The rounds of one row can be equal by chance."""
    rows = scaled(model_rows(), 0.06)
    new = scaled(rows, 0.06, ours=1.15)
    new[0] = new[0] | {"p20_ms": new[0]["p50_ms"], "p80_ms": new[0]["p50_ms"]}
    assert not compare((MACHINE, rows), (MACHINE, new)).changes


def test_parts_are_compared_with_the_other_parts_of_their_case():
    rows = part_rows()
    times = ("p20_ms", "p50_ms", "p80_ms")
    slower = [row | {name: row[name] * (3 if row["part"] == "mlp" else 1.2) for name in times} for row in rows]
    result = compare((MACHINE, rows), (MACHINE, slower))
    assert [change.row["part"] for change in result.changes] == ["mlp", "mlp"]
    # The part takes 3 times as long, while all parts take 1.2 times as long.
    assert result.changes[0].ratio == pytest.approx(2.5)


def test_rows_without_a_counterpart_are_listed():
    old = model_rows()
    wrong = old[0] | {"status": "wrong: logits differ", "p50_ms": None}
    result = compare((MACHINE, old), (MACHINE, [wrong, old[1], *old[3:], timed(Case(*"abcd", 1, 2), "new", 1.0)]))
    assert result.compared == 1 and not result.changes
    text = "\n".join(comparison_text(result))
    assert "ours, 1: was ok, is wrong: logits differ" in text
    assert "Only in the old file: 1" in text and "Only in the new file: 1" in text


def test_compare_command(tmp_path, capsys):
    old, other = write(tmp_path / "a", model_rows()), write(tmp_path / "b", model_rows(), device_name="another CPU")
    assert report.main(["--compare", str(old), str(old)]) == 0
    assert capsys.readouterr().out == "3 times compared within their cases: none changed beyond the noise.\n"
    with pytest.raises(UserError, match="a CPU, 2 threads; another CPU, 2 threads.*--different-devices"):
        report.main(["--compare", str(old), str(other)])
    assert report.main(["--compare", "--different-devices", str(old), str(other)]) == 0
    with pytest.raises(UserError, match="needs two results"):
        report.main(["--compare", str(old)])
