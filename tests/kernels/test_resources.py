"""The Triton kernels compile for all supported GPUs, without spills on NVIDIA's, with the resources of the table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tools.resource_table import MOST_SHARED, read
from tools.triton_resources import COLUMNS, OUTPUT, matrix_instruction

INSTRUCTIONS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "mfma"}


# In a process without the interpreter. Two of the cases, because all take minutes; float32 where memory is scarcest.
COMPILE = """
import sys, torch
from tools.triton_resources import COLUMNS, table, write

write(sys.argv[1], COLUMNS, table([(torch.bfloat16, 64, 514)]) + table([(torch.float32, 64, 513)], ["sm_80"]))
"""


def check(rows):
    for row in rows:
        assert row["spilled_bytes"] == "0" or row["architecture"] == "gfx942", row
        assert int(row["shared_bytes"]) <= MOST_SHARED[row["architecture"]], row
        if row["kernel"] == "cls_weights":
            assert row["matrix_instruction"] == "fma", row
        elif row["dtype"] == "float32":
            assert row["matrix_instruction"] != "fma", row
        else:
            assert row["matrix_instruction"] == INSTRUCTIONS[row["architecture"]], row


@pytest.mark.harness
def test_the_table_meets_the_limits():
    rows = read(OUTPUT)
    assert tuple(rows[0]) == COLUMNS and {row["architecture"] for row in rows} == set(INSTRUCTIONS)
    assert {int(row["tokens"]) for row in rows} == {65, 257, 513, 514}
    assert {int(row["head_size"]) for row in rows} == {32, 64, 80, 96, 128}
    assert {row["dtype"] for row in rows} == {"float32", "float16", "bfloat16"}
    check(rows)


@pytest.mark.harness
@pytest.mark.slow
def test_kernels_compile_as_the_table_says(tmp_path):
    output = tmp_path / "resources.csv"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE, output]
    subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, check=True)
    rows, table = read(output), read(OUTPUT)
    check(rows)
    if table[0]["triton"] == rows[0]["triton"]:
        assert all(row in table for row in rows), "write the table again: python -m tools.triton_resources"


@pytest.mark.harness
def test_matrix_instruction():
    assert matrix_instruction("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16") == "wgmma.mma_async"
    assert matrix_instruction("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32") == "mma.sync"
    assert matrix_instruction("fma.rn.f32 %f1, %f2, %f3, %f4;") == "fma"
