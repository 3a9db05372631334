"""Sizes of the benchmarks: cases, grids, and the options that replace sizes."""

from types import SimpleNamespace

import pytest
import torch

from bench.conftest import grid_of
from bench.harness import grid
from bench.harness.case import TRAINING, Case
from bench.harness.subject import make_model
from pruneattn.errors import UserError

pytestmark = pytest.mark.harness


def test_cases():
    sizes = grid.Sizes(("float32", "bfloat16"), (1, 4), (64,), 3, models=("ast_base", "audiomae_base"))
    cases = grid.cases("model", "cpu", sizes)
    assert len(cases) == len({str(case) for case in cases}) == 8
    assert {(case.subject, case.tokens) for case in cases} == {("ast_base", 66), ("audiomae_base", 65)}
    assert {case.tokens for case in grid.cases("op", "cpu", sizes, "attention")} == {64}


@pytest.mark.parametrize(
    "patches, frames, stride", [(64, 128, 16), (512, 1024, 16), (1212, 1024, 10), (36, 44, 10), (144, 288, 16)]
)
def test_the_number_of_patches_determines_the_stride(patches, frames, stride):
    """1212 patches are those of the published AST."""
    assert grid.input_of(patches) == (frames, stride)
    with torch.device("meta"):
        model = make_model(Case("model", "ast_base", "meta", "float32", 1, patches + 2))
    assert (model.num_patches, model.frames, model.stride) == (patches, frames, (stride, stride))


def test_other_numbers_of_patches_are_rejected():
    with pytest.raises(UserError, match="100 patches: must be a multiple of 8"):
        make_model(Case("model", "ast_tiny", "cpu", "float32", 1, 102))


def test_audiomae_has_no_cases_at_other_strides():
    sizes = grid.Sizes(("float32",), (1,), (512, 1212), 1, models=("ast_base", "audiomae_base"))
    tokens = {(case.subject, case.tokens) for case in grid.cases("model", "cpu", sizes)}
    assert tokens == {("ast_base", 514), ("ast_base", 1214), ("audiomae_base", 513)}


def test_options_replace_the_sizes_of_the_grid():
    def config(**given):
        return SimpleNamespace(getoption=lambda name: {"bench_device": "cpu", "bench_full": False, **given}.get(name))

    usual = grid_of(config())
    assert usual == grid.GRIDS["cpu", False]
    options = {"bench_patches": (512, 1212), "bench_batches": (1, 4), "bench_dtypes": ("float32", "bfloat16")}
    changed = grid_of(config(**options, bench_rounds=2))
    assert changed.keys() == usual.keys()
    for level, sizes in changed.items():
        of_patches = ("model", "block", "precision", TRAINING, "wav to label")
        lengths = (512, 1212) if level in of_patches else usual[level].lengths
        dtypes = usual[level].dtypes if level == "precision" else ("float32", "bfloat16")
        assert sizes == usual[level]._replace(lengths=lengths, batches=(1, 4), dtypes=dtypes, rounds=2)


@pytest.mark.parametrize("key", grid.GRIDS)
def test_grids(key):
    levels = grid.GRIDS[key]
    assert {"op", "block", "model", TRAINING, "wav to label", "scaling by tokens", "scaling by batch"} <= levels.keys()
    assert all(1.0 in sizes.keep_rates and set(sizes.peer_rates) <= set(sizes.keep_rates) for sizes in levels.values())
    assert levels["scaling by tokens"].lengths == (64, 128, 256, 512, 1024, 2048, 4096)
