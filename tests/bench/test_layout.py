"""Directions of imports: cases and tools use the harness, and the package uses none of them."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: It measures the providers of two other benchmarks.
REUSES_CASES = "bench_scaling.py"


def imports_of(path):
    """Dotted names of the modules that a file imports, wherever the import is."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.is_relative_to(ROOT / "pruneattn"), f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module else set()
    return names


def files(folder):
    found = sorted(ROOT.joinpath(folder).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("bench/harness", ("bench.cases", "tools")),
        ("bench/cases", ("bench.cases", "tools")),
        ("tools", ("bench.cases",)),
        ("pruneattn", ("bench", "tools")),
    ],
)
def test_imports_point_down(folder, forbidden):
    for path in files(folder):
        wrong = [
            name for name in imports_of(path) if f"{name}.".startswith(tuple(f"{package}." for package in forbidden))
        ]
        assert not wrong or path.name == REUSES_CASES, f"{path}: {wrong}"


def test_the_harness_has_no_circular_imports():
    """Modules can be sorted so that each module imports earlier modules only."""
    names = {f"bench.harness.{path.stem}": imports_of(path) for path in files("bench/harness")}
    below = {
        name: {other for other in names if any(f"{used}.".startswith(f"{other}.") for used in imports)}
        for name, imports in names.items()
    }
    while below:
        free = {name for name, imports in below.items() if not imports & below.keys()}
        assert free, f"circle in {sorted(below)}"
        below = {name: imports for name, imports in below.items() if name not in free}
