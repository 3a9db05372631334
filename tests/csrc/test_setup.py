"""How setup.py chooses nvcc and the architectures, and a build without CUDA."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A fake nvcc of CUDA 12.4 in CUDA_HOME."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho sm_80\necho sm_89\necho sm_90\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("PRUNEATTN_CUDA_ARCHS", raising=False)
    return str(nvcc)


def test_cuda_home_comes_first(setup_module, fake_nvcc):
    assert setup_module.find_nvcc() == fake_nvcc


@pytest.mark.parametrize("value", ["", "0", "none"])
def test_a_build_without_cuda_can_be_requested(setup_module, fake_nvcc, monkeypatch, value):
    monkeypatch.setenv("PRUNEATTN_CUDA_ARCHS", value)
    assert setup_module.choose_cuda() == (None, [], f"PRUNEATTN_CUDA_ARCHS={value}")


def test_without_nvcc_the_build_has_no_cuda(setup_module, monkeypatch):
    monkeypatch.delenv("PRUNEATTN_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(setup_module, "find_nvcc", lambda: None)
    assert setup_module.choose_cuda() == (None, [], "nvcc is not in CUDA_HOME, PATH or /usr/local/cuda")


def test_an_old_nvcc_builds_only_the_architectures_that_it_supports(setup_module, fake_nvcc, capsys):
    assert setup_module.choose_cuda() == (fake_nvcc, ["80", "90a"], "")
    assert (
        capsys.readouterr().out
        == f"pruneattn: {fake_nvcc} does not support sm_100: built without these architectures\n"
    )


def test_an_explicit_unknown_architecture_is_an_error(setup_module, fake_nvcc, monkeypatch):
    monkeypatch.setenv("PRUNEATTN_CUDA_ARCHS", "89; 100")
    with pytest.raises(setup_module.CompileError, match=r"does not support \['100'\]; it supports \['sm_80', 'sm_89'"):
        setup_module.choose_cuda()
    monkeypatch.setenv("PRUNEATTN_CUDA_ARCHS", "89; 90a")
    assert setup_module.choose_cuda() == (fake_nvcc, ["89", "90a"], "")


def test_only_architectures_without_suffix_include_ptx(setup_module):
    assert setup_module.gencode("80") == "-gencode arch=compute_80,code=[sm_80,compute_80]"
    assert setup_module.gencode("90a") == "-gencode arch=compute_90a,code=sm_90a"


@pytest.mark.slow
def test_build_without_cuda(tmp_path):
    """The build reports why it has no CUDA code, the module works without torch, and a second build has no work."""
    for package in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(package)
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "pruneattn").mkdir()
    (tmp_path / "pruneattn" / "__init__.py").touch()
    env = {**os.environ, "PRUNEATTN_CUDA_ARCHS": "none", "CXXFLAGS": "-O0", "PYTHONPATH": ""}

    def build():
        return subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=tmp_path,
            env=env,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout

    first = build()
    assert first.count("CUDA code") == 1
    assert "pruneattn: builds without CUDA code: PRUNEATTN_CUDA_ARCHS=none\n" in first
    assert "ninja: no work to do." in build()

    script = "import json, sys; from pruneattn import _C; print(json.dumps([_C.build_info(), dir(_C)]))"
    out = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, check=True, stdout=subprocess.PIPE)
    info, names = json.loads(out.stdout)
    assert info["cuda"] is False and info["cuda_architectures"] == ""
    assert info["cuda_reason"] == "PRUNEATTN_CUDA_ARCHS=none" and info["compiler"]
    assert "cpu_prune_tokens" in names and not [name for name in names if name.startswith("cuda_")]
