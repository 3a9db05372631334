"""Objects for different instruction sets share no function, because the linker keeps one copy of a shared function."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").rglob("isa_*.cpp"))


def shared_symbols(object_file):
    """The mangled names of an object's functions and data that other objects can also define."""
    lines = subprocess.run(["nm", object_file], capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for *_, kind, name in map(str.split, lines) if kind in "WVu"]


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
def test_shares_no_function(setup_module, tmp_path, source):
    if shutil.which("g++") is None or shutil.which("nm") is None:
        pytest.skip("g++ or nm is not on the PATH")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("only x86-64 has several instruction sets")
    output = tmp_path / "isa.o"
    flags = ["-std=c++17", "-fPIC", "-fopenmp", "-O0", *setup_module.isa_flags(source).split()]  # nothing is inlined
    subprocess.run(["g++", *flags, "-c", source, "-o", output], check=True)
    name = source.stem.removeprefix("isa_")
    own = re.compile(rf"_Z(GV)?Z?NK?9pruneattn3cpu{len(name)}{name}")
    symbols = shared_symbols(output)
    assert any(own.match(symbol) for symbol in symbols)
    assert [symbol for symbol in symbols if not own.match(symbol)] == []
