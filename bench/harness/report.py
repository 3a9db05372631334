"""Tables and figures of result files, and comparisons of two result files: ``python -m bench.harness.report``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.harness.compare import compare, comparison_text
from bench.harness.figures import FIGURES
from bench.harness.fit import exponent, scaling_groups
from bench.harness.grid import extra_tokens
from bench.harness.rows import CASE, Row, case_name, name_of, read_result
from pruneattn.cli import run_command
from pruneattn.errors import UserError
from pruneattn.files import make_folder
from pruneattn.plot import save_figure
from pruneattn.report import markdown_lines


def digits(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


COLUMNS = [
    ("ms", "p50_ms", digits),
    ("p20", "p20_ms", digits),
    ("p80", "p80_ms", digits),
    ("clips/s", "clips_per_second", digits),
    ("GMACs paper", "macs_paper", lambda macs: digits(macs / 1e9)),
    ("computed", "macs_computed", lambda macs: digits(macs / 1e9)),
    ("floor ms", "floor_ms", digits),
    ("of floor", "floor_share", "{:.0%}".format),
    ("peak MiB", "peak_memory_mib", digits),
    ("saving", "saving", "{:.1%}".format),
    ("theory", "theory", "{:.1%}".format),
    ("realized", "realised", "{:.0%}".format),
]


def case_tables(rows: Iterable[Row]) -> list[str]:
    """Markdown tables, one for each case, without empty columns."""
    lines: list[str] = []
    for group in _cases(rows):
        named = [{**row, "name": name_of(row)} for row in group if row["status"] == "ok"]
        filled = [column for column in COLUMNS if any(row[column[1]] is not None for row in named)]
        lines += ["", f"### {group[0]['level']}: {case_name(group[0])}", ""]
        lines += markdown_lines([("", "name", str), *filled], named) if named else []
        lines += [f"- {name_of(row)}: {row['status']}" for row in group if row["status"] != "ok"]
    return lines


def summary_lines(rows: Iterable[Row]) -> list[str]:
    """Markdown tables of whole models, one for each precision, batch and number of patches; models are columns."""

    def case_of(row: Row) -> tuple[str, str, int, int]:
        return row["device"], row["dtype"], row["batch"], row["tokens"] - extra_tokens(row["subject"])

    rows = [row for row in rows if row["level"] == "model" and row["status"] == "ok"]
    lines: list[str] = []
    for case, grouped in groupby(sorted(rows, key=case_of), case_of):
        group = list(grouped)
        subjects = list(dict.fromkeys(row["subject"] for row in group))
        columns = [("", "name", str), ("theory", "theory", "{:.1%}".format)]
        for subject in subjects:
            columns += [(f"{subject}, ms", f"{subject} p50_ms", digits)]
            columns += [
                (name, f"{subject} {key}", show) for name, key, show in COLUMNS if key in ("saving", "realised")
            ]
        table: dict[str, dict[str, Any]] = {}
        for row in group:
            entry = table.setdefault(name_of(row), {key: None for _, key, _ in columns})
            entry |= {"name": name_of(row), "theory": row["theory"]}
            entry |= {f"{row['subject']} {name}": row[name] for name in ("p50_ms", "saving", "realised")}
        lines += ["", "{}, {}, batch {}, {} patches:".format(*case), "", *markdown_lines(columns, list(table.values()))]
    return lines[1:]


def _cases(rows: Iterable[Row]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(rows, key=lambda row: [row[name] for name in CASE])]


def lost_savings(rows: Iterable[Row]) -> list[str]:
    """Lines that name the parts of a pruning block whose time falls less than their MACs do, the worst part first.

    A part without multiply-accumulates is compared with those of the whole block.
    """
    lines: list[str] = []
    for group in _cases([row for row in rows if row["level"] == "block parts"]):
        dense = {row["part"]: row for row in group if row["keep_rate"] == 1}
        pruned = {row["part"]: row for row in group if row["keep_rate"] != 1}
        whole = pruned["whole"]
        lost: dict[str, float] = {}
        for part, row in pruned.items():
            share = 1 - (whole["theory"] if row["theory"] is None else row["theory"])
            lost[part] = row["p50_ms"] - share * dense[part]["p50_ms"]
        worst = sorted((part for part in lost if part != "whole"), key=lost.__getitem__, reverse=True)
        parts = ", ".join(f"{part} {lost[part]:+.2f} ms" for part in worst if abs(lost[part]) >= 0.005)
        share = whole["saving"] / whole["theory"]
        lines.append(
            f"- {case_name(whole)}, keep-rate {whole['keep_rate']:g}: {share:.0%} of the saving in computed MACs; "
            f"{lost['whole']:+.2f} ms of {whole['p50_ms']:.2f} ms above it: {parts}"
        )
    return lines


def scaling_lines(rows: Iterable[Row]) -> list[str]:
    """Markdown table of the exponents of time and memory by tokens and by batch."""
    rows = list(rows)
    table: list[dict[str, Any]] = []
    for level, size in (("scaling by tokens", "tokens"), ("scaling by batch", "batch")):
        for group in scaling_groups(rows, level):
            entry: dict[str, Any] = {
                "what": f"{group[0]['subject']}, {group[0]['dtype']}: {name_of(group[0])}",
                "by": size,
            }
            entry["range"] = f"{group[0][size]} to {group[-1][size]}"
            for name, column in (("time", "p50_ms"), ("memory", "peak_memory_mib")):
                entry[name] = exponent([row[size] for row in group], [row[column] for row in group])
            table.append(entry)

    def show(fit: tuple[float | None, float | None]) -> str:
        return "-" if fit[0] is None else f"{fit[0]:.2f} ± {fit[1]:.2f}"

    columns = [("", "what", str), ("by", "by", str), ("from to", "range", str), ("time", "time", show)]
    return markdown_lines([*columns, ("memory", "memory", show)], table) if table else []


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Machine, versions, commit and peak speeds of a result."""
    peaks = machine["peaks"]
    products = ", ".join(f"{dtype} {speed / 1e9:.0f} GFLOP/s" for dtype, speed in peaks["product"].items())
    changed = " with changed files" if machine["changed_files"] else ""
    line = (
        f"{machine['device_name']}, {machine['threads']} threads, driver {machine['driver'] or '-'}, "
        f"torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit'][:12]}{changed}, "
        f"{machine['date']}. Peaks: copy {peaks['copy'] / 1e9:.1f} GB/s, {products}."
    )
    return [line]


def report(path: Path, output: Path) -> list[str]:
    """Write the figures of a result file to the folder `output` and return its tables as Markdown lines."""
    machine, rows = read_result(path)
    lines = [f"# {Path(path).stem}", "", *machine_lines(machine)]
    summary = summary_lines(rows)
    lines += ["", "### Whole models", "", *summary] if summary else []
    lines += case_tables(rows)
    for title, part in (("Lost savings", lost_savings(rows)), ("Exponents", scaling_lines(rows))):
        lines += ["", f"### {title}", "", *part] if part else []
    lines.append("")
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            place = output / f"{Path(path).stem}-{name}.png"
            save_figure(figure, place)
            lines.append(f"![{name}]({place.name})")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Report each result, or compare two of them; see ``--help``."""
    args = _parse(argv)
    if args.compare:
        if len(args.results) != 2:
            raise UserError(f"--compare needs two results, the old and the new result, not {len(args.results)}")
        results = [read_result(path) for path in args.results]
        print("\n".join(comparison_text(compare(*results, args.different_devices))))
        return 0
    make_folder(args.output)
    for path in args.results:
        lines = report(path, args.output)
        (args.output / f"{path.stem}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print("\n".join(lines))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.harness.report", description="Write tables and figures of benchmark results."
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="JSON file that `pytest bench/ --benchmark-only` wrote"
    )
    parser.add_argument(
        "--compare", action="store_true", help="compare two results, and print the changes beyond the noise"
    )
    parser.add_argument(
        "--different-devices", action="store_true", help="with --compare: also compare results of different devices"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("results/bench"),
        metavar="FOLDER",
        help="folder for figures and Markdown tables (default: results/bench)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
