"""Each op has one name, which its definition, kernels, test and benchmark share."""

from importlib import import_module
from pathlib import Path

import pytest

from pruneattn.ops import backend

ROOT = Path(__file__).parents[2]
OPS = sorted(backend._kernels)


@pytest.mark.parametrize("name", OPS)
def test_an_op_has_a_definition_and_a_benchmark(name):
    assert import_module(f"pruneattn.ops.{name}").reference is backend._kernels[name]["reference"]
    assert (ROOT / f"bench/cases/bench_{name}.py").is_file()


def test_every_file_of_the_ops_has_a_test():
    files = {path.stem for path in ROOT.glob("pruneattn/ops/[!_]*.py")}
    assert files >= {*OPS, "backend"}
    assert files <= {path.stem.removeprefix("test_") for path in ROOT.glob("tests/ops/test_*.py")}


@pytest.mark.parametrize(
    "pattern, shared",
    [
        ("pruneattn/kernels/[!_]*.py", {"launch", "tiles"}),
        ("csrc/cuda/*.cu", set()),
        ("csrc/cpu/*.cpp", {"average", "isa", *(path.stem for path in ROOT.glob("csrc/cpu/isa_*.cpp"))}),
    ],
)
def test_kernels_are_named_after_ops(pattern, shared):
    files = {path.stem for path in ROOT.glob(pattern)} - shared
    assert files and all(name.startswith(tuple(OPS)) for name in files)
