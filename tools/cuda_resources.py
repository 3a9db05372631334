"""Resources of each CUDA kernel on a GPU, compiled ahead of time. Needs nvcc, but no GPU.

    python -m tools.cuda_resources

writes `bench/results/cuda-resources.csv`: registers, shared memory, stack and spilled bytes of each kernel of csrc/cuda
on every supported architecture.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.harness.machine import RESULTS, ROOT
from tools.resource_table import write

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
COLUMNS = (
    "nvcc",
    "source",
    "kernel",
    "architecture",
    "registers",
    "static_shared_bytes",
    "dynamic_shared_bytes",
    "stack_bytes",
    "spilled_bytes",
)
OUTPUT = RESULTS / "cuda-resources.csv"
#: Header and type of a block's dynamic shared memory, by the kernel's template arguments. Other kernels have none.
DYNAMIC = {"column_mean_attention_kernel": ("cuda/column_mean_attention.cuh", "pruneattn::cuda::AttentionMemory<{1}>")}


class Usage(NamedTuple):
    """Resources of one kernel as ptxas reports them. The name of the kernel is mangled."""

    architecture: str
    kernel: str
    registers: int
    shared: int
    stack: int
    spilled: int


def parse_resources(report: str) -> list[Usage]:
    """Parse a report of ``ptxas -v``."""
    usages = []
    for part in report.split("Compiling entry function '")[1:]:
        kernel, architecture = re.match(r"(\w+)' for '(\w+)'", part).groups()
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        shared = int((re.search(r"(\d+) bytes smem", part) or [0, 0])[1])
        usages.append(Usage(architecture, kernel, registers, shared, stack, stores + loads))
    return usages


def serialized(report: str) -> list[str]:
    """Lines of a report that say that ptxas serializes wgmma instructions: remarks C7500 to C7599."""
    return [line for line in report.splitlines() if re.search(r"\(C75\d\d\)|wgmma.*serialized", line)]


def short(name: str) -> str:
    """Remove return type, namespaces and parameters from a demangled name: cls_scores_kernel<Half, unsigned short>."""
    name = re.sub(r"\(anonymous namespace\)::|\b\w+::|\(\w+\)(?=-?\d)", "", name)
    return re.match(r"(?:void )?([^(]+)", name).group(1)


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Demangle names: dict of mangled name -> short name."""
    run = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return dict(zip(names, map(short, run.stdout.splitlines())))


def find_nvcc() -> str | None:
    """The nvcc that setup.py uses, or None."""
    spec = importlib.util.spec_from_file_location("pruneattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_nvcc()


def release_of(nvcc: str) -> str:
    """Version of nvcc: V13.0.88."""
    run = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return re.search(r"V[\d.]+", run.stdout).group()


def known_to(nvcc: str) -> list[str]:
    """The `ARCHITECTURES` that nvcc can compile for."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in ARCHITECTURES if name.rstrip("af") in known]


def compile_source(nvcc: str, source: Path, architecture: str) -> str:
    """Compile a source for an architecture and return the report of the compilers. Warnings are errors.

    The host code does not depend on the architecture, so it is compiled for sm_80 only.

    Raises:
        RuntimeError: the source does not compile.
    """
    flags = [
        "-std=c++17",
        "-O3",
        "-Xcompiler",
        "-Wall,-Wextra",
        "-Werror",
        "all-warnings",
        "-Xptxas",
        "-v",
        f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}",
    ]
    with tempfile.TemporaryDirectory() as folder:
        kind = "-c" if architecture == ARCHITECTURES[0] else "-cubin"
        run = subprocess.run([nvcc, *flags, kind, source, "-o", Path(folder, "x")], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{source} does not compile for {architecture}:\n{run.stdout}{run.stderr}")
    return run.stdout + run.stderr


def dynamic_shared(nvcc: str, kernels: Iterable[str]) -> dict[str, int]:
    """Bytes of dynamic shared memory of each kernel that has any, by a program that prints the sizes of the types."""
    types = {}
    for kernel in kernels:
        name, _, arguments = kernel.rstrip(">").partition("<")
        if name in DYNAMIC:
            types[kernel] = DYNAMIC[name][1].format(*arguments.split(", "))
    if not types:
        return {}
    includes = "".join(f'#include "{header}"\n' for header, _ in DYNAMIC.values())
    lines = "".join(f'  std::printf("%zu\\n", sizeof({type_}));\n' for type_ in types.values())
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "sizes.cu"), Path(folder, "sizes")
        source.write_text(f"#include <cstdio>\n{includes}int main() {{\n{lines}}}\n")
        subprocess.run([nvcc, "-std=c++17", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
        run = subprocess.run([program], capture_output=True, text=True, check=True)
    return dict(zip(types, map(int, run.stdout.split())))


def rows_of(nvcc: str, source: Path, reports: Iterable[str]) -> list[tuple]:
    """Make the table's rows of a source from its reports for all architectures."""
    usages = [usage for report in reports for usage in parse_resources(report)]
    names = demangled(list(dict.fromkeys(usage.kernel for usage in usages)))
    dynamic, release = dynamic_shared(nvcc, names.values()), release_of(nvcc)
    rows = [
        (
            release,
            source.name,
            names[usage.kernel],
            usage.architecture,
            usage.registers,
            usage.shared,
            dynamic.get(names[usage.kernel], 0),
            usage.stack,
            usage.spilled,
        )
        for usage in usages
    ]
    return sorted(rows, key=lambda row: (ARCHITECTURES.index(row[3]), len(row[2]), row[2]))


def compile_all(nvcc: str, sources: Sequence[Path] = SOURCES) -> dict[Path, list[Future[str]]]:
    """Compile sources on all cores: dict of source -> futures of its reports, one for each architecture."""
    pool, names = ThreadPoolExecutor(os.cpu_count()), known_to(nvcc)
    reports = {source: [pool.submit(compile_source, nvcc, source, name) for name in names] for source in sources}
    pool.shutdown(wait=False)
    return reports


def main(output: str | Path = OUTPUT) -> None:
    """Compile all sources and write the table."""
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("error: nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit")
    reports = compile_all(nvcc)
    rows = [rows_of(nvcc, source, [report.result() for report in some]) for source, some in reports.items()]
    write(output, COLUMNS, [row for some in rows for row in some])


if __name__ == "__main__":
    main(*sys.argv[1:])
