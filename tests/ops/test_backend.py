import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pruneattn import UserError, backends, ops, use_backend
from pruneattn.ops import backend


@pytest.fixture(autouse=True)
def fresh_choices():
    """Changes of a test to the registry or the environment do not affect the next test."""
    caches = (backend.why_not, backend._resolve, backend._from_environment)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def calls(monkeypatch):
    """The calls of an op "twice" with two implementations for the CPU, on a machine without CUDA and Triton."""
    calls = []

    def implementation(name):
        return lambda x: (calls.append(name), x * 2)[1]

    names = ("reference", "cpu")
    monkeypatch.setitem(backend._kernels, "twice", {name: implementation(name) for name in names})
    monkeypatch.setattr(backend, "_C", FakeExtension())
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    return calls


class FakeExtension:
    def cpu_isas(self):
        return ["avx2", "baseline"]

    def cpu_isa(self):
        return "avx2"

    def build_info(self):
        return {"cuda": False, "cuda_reason": "nvcc was not found"}


def run(device="cpu"):
    return backend.choose("twice", device)(1)


def python(code, **environment):
    path = os.pathsep.join([str(Path(backend.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


def test_best_backend_by_default_and_the_forced_backend_inside(calls):
    run()
    with use_backend("reference"):
        run()
        with use_backend("cpu"):
            run()
        run()
    run()
    assert calls == ["cpu", "reference", "cpu", "reference", "cpu"]


def test_forced_backend_ends_with_an_error_inside(calls):
    with pytest.raises(RuntimeError, match="inside"), use_backend("reference"):
        raise RuntimeError("inside")
    run()
    assert calls == ["cpu"]


def test_op_without_the_forced_kernel_runs_the_reference(calls, monkeypatch):
    monkeypatch.delitem(backend._kernels["twice"], "cpu")
    with use_backend("cpu"):
        run()
    assert calls == ["reference"]


def test_kernel_runs_only_on_its_type_of_device(calls):
    for device in ("mps", "cuda"):
        run(device)
        with use_backend("cpu"):
            run(device)
    assert calls == ["reference"] * 4


def test_forced_backend_holds_in_other_threads(calls):
    """Autograd runs the backward pass in its own threads."""
    with use_backend("reference"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert calls == ["reference"]


def test_contexts_may_close_in_any_order(calls):
    first, second = use_backend("reference"), use_backend("cpu")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    run()
    second.__exit__(None, None, None)
    assert backend._forced is None and calls == ["cpu"]


def test_unknown_backend():
    with pytest.raises(UserError, match="unknown backend 'gpu'; choose one of reference, cpu, cuda, triton"):
        use_backend("gpu")


def test_unusable_backend_reports_the_reason(calls):
    with pytest.raises(UserError, match="backend 'triton' cannot be used here: Triton is not installed"):
        use_backend("triton")
    with pytest.raises(UserError, match="'cuda' cannot be used here: .* built without CUDA: nvcc was not found"):
        use_backend("cuda")


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80;90a;100", (8, 0), True),
        ("80;90a;100", (8, 9), True),
        ("80;90a;100", (12, 0), True),
        ("80;90a;100", (7, 5), False),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
    ],
)
def test_gpus_that_the_kernels_support(architectures, capability, runs):
    reason = backend._why_not_this_gpu(architectures.split(";"), capability)
    assert (reason == "") == runs
    if not runs:
        assert reason.endswith("PRUNEATTN_CUDA_ARCHS={}{}".format(*capability))


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    monkeypatch.setattr(backend, "_INTERPRETER", False)
    monkeypatch.setitem(backend.DEVICES, "triton", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.why_not("triton") == "PyTorch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    backend.why_not.cache_clear()
    assert "compute capability 8.0 or newer" in backend.why_not("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (12, 0))
    backend.why_not.cache_clear()
    assert backend.why_not("triton") == ""
    # A GPU runs all Triton kernels except the one that computes exactly what PyTorch's attention computes.
    functions = backend._kernels["attention_backward"], backend._kernels["attention"]
    assert [backend.choose(op, "cuda") for op in ("attention_backward", "attention")] == [
        functions[0]["triton"],
        functions[1]["reference"],
    ]
    assert backend._resolve("attention", "cuda", "triton") is functions[1]["triton"]


def test_the_interpreter_runs_only_if_it_is_forced(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    monkeypatch.setattr(backend, "_INTERPRETER", True)
    monkeypatch.setitem(backend.DEVICES, "triton", "cpu")
    functions = backend._kernels["cls_scores"]
    assert backend.choose("cls_scores", "cpu") is not functions["triton"]
    with use_backend("triton"):
        assert backend.choose("cls_scores", "cpu") is functions["triton"]


def test_environment_variable(calls, monkeypatch):
    monkeypatch.setenv("PRUNEATTN_BACKEND", "reference")
    run()
    with use_backend("cpu"):
        run()
    assert calls == ["reference", "cpu"]
    assert backends().forced == "reference"


def test_bad_environment_variable(monkeypatch):
    monkeypatch.setenv("PRUNEATTN_BACKEND", "fast")
    with pytest.raises(UserError, match="variable PRUNEATTN_BACKEND: unknown backend 'fast'; choose one of reference"):
        ops.select_tokens(torch.zeros(1, 3), 1)
    monkeypatch.setenv("PRUNEATTN_BACKEND", "triton")
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="variable PRUNEATTN_BACKEND: backend 'triton' cannot be used here"):
        backends()


def test_table(calls):
    table = backends()
    assert set(table) == set(backend._kernels) and {"select_tokens", "column_mean_attention"} < set(table)
    states = {name: status.state for name, status in table["twice"].items()}
    reference = "used" if torch.cuda.is_available() else "available"
    assert states == {"reference": reference, "cpu": "used", "cuda": "no kernel", "triton": "no kernel"}
    assert table["column_mean_attention"]["cpu"].state == "used"
    assert table["select_tokens"]["cuda"] == ("unusable", "pruneattn._C was built without CUDA: nvcc was not found")
    assert table["select_tokens"]["triton"] == ("no kernel", "select_tokens has no kernel for it yet")
    with use_backend("reference"):
        assert backends()["twice"]["reference"].state == "used" and backends()["twice"]["cpu"].state == "available"


def test_printed_table(calls):
    lines = str(backends()).splitlines()
    reference = "used" if torch.cuda.is_available() else "available"
    assert lines[0].split() == ["op", "reference", "cpu", "cuda", "triton"]
    row = next(line for line in lines if line.startswith("select_tokens"))
    assert row.split() == ["select_tokens", reference, "used", "unusable", "no", "kernel"]
    assert "cpu: attention kernels use avx2; available: avx2, baseline" in lines
    assert "cuda: pruneattn._C was built without CUDA: nvcc was not found" in lines
    assert "triton: Triton is not installed; it comes with PyTorch's builds for GPUs" in lines
    with use_backend("reference"):
        assert "forced: reference" in str(backends())


# This finder returns a file that is not a shared library in place of the extension.
BROKEN = """
import importlib.machinery, importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "pruneattn._C":
            loader = importlib.machinery.ExtensionFileLoader(name, {file!r})
            return importlib.util.spec_from_file_location(name, {file!r}, loader=loader)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("extension", ["missing", pytest.param("broken", marks=pytest.mark.slow)])
def test_all_ops_run_without_the_extension(extension, tmp_path):
    (tmp_path / "_C.so").write_text("no library")
    result = python(
        {
            "missing": "import sys; sys.modules['pruneattn._C'] = None\n",
            "broken": BROKEN.format(file=str(tmp_path / "_C.so")),
        }[extension]
        + "import torch, pruneattn\n"
        "from pruneattn.ops.backend import why_not\n"
        "assert why_not('cpu') and not why_not('reference')\n"
        "x = torch.ones(1, 4, 1)\n"
        "print(pruneattn.ops.prune_tokens(torch.tensor([[1., 3., 2.]]), x, x, 2, 1)[0])\n"
        "print(pruneattn.backends())\n"
        "pruneattn.use_backend('cpu')\n"
    )
    assert "tensor([[1, 2]])" in result.stdout
    assert "cpu: the compiled extension pruneattn._C cannot be imported" in result.stdout
    assert "pip install -e ." in result.stdout
    assert "UserError: use_backend: backend 'cpu' cannot be used here" in result.stderr.splitlines()[-1]


def test_instruction_set_from_the_environment(monkeypatch, use_isa):
    with use_isa(backend._C.cpu_isas()[0] if backend._C else ""):
        backend._use_isa_of_environment.cache_clear()
        monkeypatch.setenv("PRUNEATTN_CPU_ISA", "baseline")
        with use_backend("cpu"):
            assert "cpu: attention kernels use baseline; available: " in str(backends())
        backend._use_isa_of_environment.cache_clear()
        backend._resolve.cache_clear()
        monkeypatch.setenv("PRUNEATTN_CPU_ISA", "mmx")
        with pytest.raises(UserError, match="PRUNEATTN_CPU_ISA: instruction set 'mmx' is not supported"):
            backends()
    monkeypatch.delenv("PRUNEATTN_CPU_ISA")
    backend._use_isa_of_environment.cache_clear()


@pytest.mark.slow
def test_instruction_set_of_a_new_process():
    if backend._C is None:
        pytest.skip(backend.why_not("cpu"))
    code = "import pruneattn; print(pruneattn.backends())"
    assert "cpu: attention kernels use baseline; available: " in python(code, PRUNEATTN_CPU_ISA="baseline").stdout
    error = python(code, PRUNEATTN_CPU_ISA="mmx").stderr.splitlines()[-1]
    assert "UserError: environment variable PRUNEATTN_CPU_ISA: instruction set 'mmx' is not supported" in error


def test_extension_is_usable():
    if backend._C is None:
        pytest.skip(backend.why_not("cpu"))
    assert backend.why_not("cpu") == ""
    assert backends()["select_tokens"]["cpu"].state == "used"
    with pytest.raises(ValueError, match="keep"):  # the kernels check their arguments, too
        backend.launch("select_tokens", torch.zeros(1), 0, 1, 4, 4, 5, 0)


def test_choice_is_made_when_a_compiled_graph_runs(monkeypatch):
    calls = []
    functions = backend._kernels["select_tokens"]
    reference = functions["reference"]
    for name in ("reference", "cpu"):
        monkeypatch.setitem(functions, name, lambda *args, name=name: (calls.append(name), reference(*args))[1])
    monkeypatch.setattr(backend, "_C", FakeExtension())
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    compiled = torch.compile(ops.select_tokens, fullgraph=True, backend="aot_eager")
    scores = torch.randn(2, 6)
    compiled(scores, 3)
    with use_backend("reference"):
        compiled(scores, 3)
    compiled(scores, 3)
    assert calls == ["cpu", "reference", "cpu"]


def test_use_backend_inside_a_compiled_function_raises_an_error():
    @torch.compile(fullgraph=True, backend="eager")
    def inside(scores):
        with use_backend("reference"):
            return ops.select_tokens(scores, 2)

    with pytest.raises(Exception, match="put it around the compiled function"):
        inside(torch.zeros(1, 3))


def signatures(text, name, argument):
    """``{function: [argument, ...]}``; each function starts with a match of ``name``."""
    starts = list(re.finditer(name, text))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return {m[1]: re.findall(argument, text[m.end() : end]) for m, end in zip(starts, ends, strict=True)}


def test_stub_has_the_functions_of_the_extension():
    root = Path(__file__).parents[2]
    bindings = signatures((root / "csrc/bindings.cpp").read_text(), r'm\.def\(\s*"(\w+)"', r'\barg\("(\w+)"\)')
    stub = signatures((root / "pruneattn/_C.pyi").read_text(), r"def (\w+)\(", r"\b(\w+): (?!\.)")
    assert stub == bindings and stub["cpu_select_tokens"][0] == "scores_ptr"
    if backend._C is not None:
        public = {name for name in dir(backend._C) if not name.startswith("_")}
        constants = {"MAX_PATCHES", "MAX_TOKENS"}
        cuda = backend._C.build_info()["cuda"]
        assert public == constants | {name for name in stub if cuda or not name.startswith("cuda_")}
