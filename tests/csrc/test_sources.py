"""The structure of csrc/: one header separates the CUDA kernels from their emulation."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
DEVICE = CSRC / "cuda/device.cuh"
FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))


def names_of(folder):
    """The primitives that the headers of a folder define in pruneattn::cuda."""
    text = "".join(path.read_text() for path in sorted(folder.iterdir()))
    return set(re.findall(r"^(?:__device__ )?(?:inline )?(?:[\w:]+[ *]+)+(\w+)(?:<\w+>)?\(", text, re.MULTILINE))


def test_only_device_cuh_includes_native_and_emulated_headers():
    including = {path for path in FILES if re.search(r'#include ".*(native|emulated)/', path.read_text())}
    assert including == {DEVICE}


def test_only_device_cuh_depends_on_the_compiler():
    depending = {path for path in FILES if "__CUDACC__" in path.read_text()}
    assert depending == {DEVICE, CSRC / "tokens.h"}  # tokens.h defines the annotation of host and device functions


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CSRC)) for path in FILES])
def test_no_source_names_the_tests(path):
    assert not re.search(r"\btests?/|\bshim\b|\bpytest\b", path.read_text())


def test_each_primitive_has_a_native_and_an_emulated_version():
    documented = set(re.findall(r"^//   [\w*]+ (\w+)(?:<\w+>)?\(", DEVICE.read_text(), re.MULTILINE))
    assert len(documented) >= 13
    for folder in ("native", "emulated"):
        assert documented <= names_of(CSRC / "cuda" / folder), folder
