"""The CUDA sources compile for the GPUs that are promised, without spills and within the limits of a block."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
ARCHS = ("80", "90a", "100")


def parse_resources(report):
    """{(architecture, kernel): (registers, shared bytes, stack bytes, spilled bytes)} from `ptxas -v`."""
    resources = {}
    for part in report.split("Compiling entry function '")[1:]:
        kernel, arch = re.match(r"(\w+)' for 'sm_(\w+)'", part).groups()
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups())
        shared = re.search(r"(\d+) bytes smem", part)
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        resources[arch, kernel] = registers, int(shared.group(1)) if shared else 0, stack, stores + loads
    return resources


def test_parse_resources():
    report = """ptxas info    : Compiling entry function 'k1' for 'sm_90a'
ptxas info    : Function properties for k1
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 8 bytes cumulative stack size, 8320 bytes smem
ptxas info    : Compiling entry function 'k2' for 'sm_80'
ptxas info    : Function properties for k2
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 392 bytes cmem[0]
"""
    assert parse_resources(report) == {("90a", "k1"): (48, 8320, 8, 32), ("80", "k2"): (10, 0, 0, 0)}


@pytest.mark.parametrize("source", SOURCES, ids=[source.name for source in SOURCES])
def test_compiles_without_spills(setup_module, tmp_path, source):
    nvcc = setup_module.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    archs = [arch for arch in ARCHS if f"sm_{arch.rstrip('af')}" in known]
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-Wall,-Wextra", "-Werror", "all-warnings", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    run = subprocess.run([nvcc, *flags, "-c", source, "-o", tmp_path / "x.o"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    resources = parse_resources(run.stdout + run.stderr)
    assert {arch for arch, _ in resources} == set(archs)
    for (arch, kernel), (registers, shared, stack, spilled) in resources.items():
        where = f"{kernel} for sm_{arch}"
        assert (stack, spilled) == (0, 0), f"{where} has {stack} bytes of stack and {spilled} bytes spilled"
        # Four blocks of 256 threads fit one multiprocessor: 64K registers, and 100 KB shared on the smallest.
        assert registers <= 64 and shared <= 25 << 10, f"{where}: {registers} registers, {shared} bytes shared"
