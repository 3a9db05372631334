"""The CUDA sources compile for all supported GPUs, within the limits of a block, with the resources of the table."""

import fcntl
import hashlib
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tools.cuda_resources import (
    COLUMNS,
    OUTPUT,
    SOURCES,
    compile_source,
    find_nvcc,
    known_to,
    parse_resources,
    release_of,
    rows_of,
    serialized,
    short,
)
from tools.resource_table import MOST_SHARED, read

ROOT = Path(__file__).parents[2]
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


def test_serialized_products_are_found():
    assert [line[:23] for line in serialized(REPORT)] == ["ptxas info    : (C7510)"]
    assert serialized(REPORT.replace("(C7510) ", "").replace("serialized", "run")) == []


@pytest.mark.parametrize(
    "name,expected",
    [
        (
            "void a::b::(anonymous namespace)::k_kernel<a::b::Half, (int)48>(a::b::Rows, float*, int)",
            "k_kernel<Half, 48>",
        ),
        ("void a::k<unsigned short, -1>(int)", "k<unsigned short, -1>"),
        ("a::(anonymous namespace)::k(a::Rows<4>)", "k"),
    ],
)
def test_short_names(name, expected):
    assert short(name) == expected


def check(row):
    kernel, registers = row["kernel"], int(row["registers"])
    static, dynamic = int(row["static_shared_bytes"]), int(row["dynamic_shared_bytes"])
    most = MOST_SHARED[row["architecture"].rstrip("a")]
    if dynamic > most:
        assert row["architecture"] == "sm_80", row  # cuda_most_tokens excludes this kernel there
        return
    assert (row["stack_bytes"], row["spilled_bytes"]) == ("0", "0"), row
    if kernel.startswith("column_mean_attention_kernel"):
        # A block has 256 threads. The smallest instantiation has two blocks per multiprocessor with its 64K registers.
        blocks = 2 if ", 48>" in kernel else 1
        assert registers <= (128 if blocks == 2 else 255) and blocks * (static + dynamic + 1024) <= most + 1024, row
    else:
        # Four blocks of 256 threads fit a multiprocessor with 64K registers and at least 100 KB of shared memory.
        assert registers <= 64 and static <= 25 << 10 and dynamic == 0, row


def test_the_table_is_within_the_limits():
    rows = read(OUTPUT)
    assert tuple(rows[0]) == COLUMNS and {row["architecture"] for row in rows} == {"sm_80", "sm_90a", "sm_100"}
    assert {row["source"] for row in rows} == {source.name for source in SOURCES}
    for row in rows:
        check(row)


@pytest.fixture(scope="module")
def nvcc():
    found = find_nvcc()
    if found is None:
        pytest.skip("nvcc is not in CUDA_HOME, PATH or /usr/local/cuda")
    return found


@pytest.fixture(scope="module")
def reports(nvcc):
    """``{source: futures of the compilers' reports}``, one per architecture.

    Reports stay in build/. A change to a source, to nvcc or to the compiler's flags invalidates all of them.
    """
    code = [path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*")) if path.suffix in (".cu", ".cuh", ".h")]
    code += [release_of(nvcc).encode(), inspect.getsource(compile_source).encode()]
    folder = ROOT / "build" / "nvcc-reports" / hashlib.sha256(b"\0".join(code)).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)

    def report(source, name):
        file = folder / f"{source.name}.{name}.txt"
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # xdist workers share the reports
            if not file.exists():
                part = file.with_suffix(".part")
                part.write_text(compile_source(nvcc, source, name))
                part.replace(file)
        return file.read_text()

    pool = ThreadPoolExecutor(os.cpu_count())
    yield {source: [pool.submit(report, source, name) for name in known_to(nvcc)] for source in SOURCES}
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])
def test_sources_compile_with_the_resources_of_the_table(nvcc, reports, source):
    texts = [report.result() for report in reports[source]]
    assert [line for text in texts for line in serialized(text)] == []
    rows = [dict(zip(COLUMNS, map(str, row))) for row in rows_of(nvcc, source, texts)]
    assert {row["architecture"] for row in rows} == set(known_to(nvcc))
    for row in rows:
        check(row)
    table = [row for row in read(OUTPUT) if row["source"] == source.name and row["architecture"] in known_to(nvcc)]
    if table and table[0]["nvcc"] == rows[0]["nvcc"]:
        assert rows == table, "update the table with python -m tools.cuda_resources"
