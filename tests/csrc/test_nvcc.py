"""The CUDA sources compile for the GPUs that are promised, within the limits of a block, and as the table says."""

import pytest

from bench.cuda_resources import (
    COLUMNS, OUTPUT, SOURCES, compile_all, find_nvcc, known_to, parse_resources, rows_of, serialized, short,
)  # fmt: skip
from bench.resource_table import MOST_SHARED, read

REPORT = """ptxas info    : Compiling entry function 'k1' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function 'k1'
ptxas info    : Function properties for k1
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 8 bytes cumulative stack size, 8320 bytes smem
ptxas info    : Compiling entry function 'k2' for 'sm_80'
ptxas info    : Function properties for k2
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 392 bytes cmem[0]
"""


def test_parse_resources():
    assert parse_resources(REPORT) == [("sm_90a", "k1", 48, 8320, 8, 32), ("sm_80", "k2", 10, 0, 0, 0)]


def test_products_that_wait_for_each_other_are_found():
    assert [line[:23] for line in serialized(REPORT)] == ["ptxas info    : (C7510)"]
    assert serialized(REPORT.replace("(C7510) ", "").replace("serialized", "run")) == []


@pytest.mark.parametrize("name,expected", [
    ("void a::b::(anonymous namespace)::k_kernel<a::b::Half, (int)48>(a::b::Rows, float*, int)", "k_kernel<Half, 48>"),
    ("void a::k<unsigned short, -1>(int)", "k<unsigned short, -1>"),
    ("a::(anonymous namespace)::k(a::Rows<4>)", "k"),
])  # fmt: skip
def test_short_names(name, expected):
    assert short(name) == expected


def check(row):
    kernel, registers = row["kernel"], int(row["registers"])
    static, dynamic = int(row["static_shared_bytes"]), int(row["dynamic_shared_bytes"])
    most = MOST_SHARED[row["architecture"].rstrip("a")]
    if dynamic > most:
        assert row["architecture"] == "sm_80", row  # never launched there: cuda_most_tokens says so
        return
    assert (row["stack_bytes"], row["spilled_bytes"]) == ("0", "0"), row
    if kernel.startswith("column_mean_attention_kernel"):
        # 256 threads, of which the smallest one has two blocks on a multiprocessor: 64K registers.
        blocks = 2 if ", 48>" in kernel else 1
        assert registers <= (128 if blocks == 2 else 255) and blocks * (static + dynamic + 1024) <= most + 1024, row
    else:
        # Four blocks of 256 threads fit one multiprocessor: 64K registers, and 100 KB shared on the smallest.
        assert registers <= 64 and static <= 25 << 10 and dynamic == 0, row


def test_the_table_keeps_the_promises():
    rows = read(OUTPUT)
    assert tuple(rows[0]) == COLUMNS and {row["architecture"] for row in rows} == {"sm_80", "sm_90a", "sm_100"}
    assert {row["source"] for row in rows} == {source.name for source in SOURCES}
    for row in rows:
        check(row)


@pytest.fixture(scope="module")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    return found


@pytest.fixture(scope="module")
def reports(nvcc):
    futures = compile_all(nvcc)
    yield futures
    for future in sum(futures.values(), []):
        future.cancel()


@pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])
def test_compiles_within_the_limits_and_as_the_table_says(nvcc, reports, source):
    texts = [report.result() for report in reports[source]]
    assert [line for text in texts for line in serialized(text)] == []
    rows = [dict(zip(COLUMNS, map(str, row))) for row in rows_of(nvcc, source, texts)]
    assert {row["architecture"] for row in rows} == set(known_to(nvcc))
    for row in rows:
        check(row)
    table = [row for row in read(OUTPUT) if row["source"] == source.name and row["architecture"] in known_to(nvcc)]
    if table and table[0]["nvcc"] == rows[0]["nvcc"]:
        assert rows == table, "write the table again: python -m bench.cuda_resources"
