"""The compiled kernels as the tests see them: C++ on the CPU, CUDA C++ under the shim, CUDA C++ on a GPU."""

import fcntl
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SHIM = Path(__file__).parent / "shim"


class Memory:
    """Buffers in host memory."""

    def put(self, array):
        """A copy that lives as long as this object; returns (handle, pointer)."""
        array = np.array(array, copy=True)
        return array, array.ctypes.data

    def get(self, handle):
        return handle


class DeviceMemory(Memory):
    """Buffers in the memory of the GPU, allocated by torch."""

    def put(self, array):
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
        return tensor, tensor.data_ptr()

    def get(self, handle):
        return handle.cpu().numpy()


class Kernels:
    """The functions of one implementation over numpy arrays."""

    def __init__(self, module, prefix, last, memory):
        self.module, self.prefix, self.last, self.memory = module, prefix, last, memory

    def call(self, name, *arguments):
        getattr(self.module, f"{self.prefix}_{name}")(*arguments, *self.last)

    def select(self, scores, keep):
        scores_handle, scores_ptr = self.memory.put(scores)
        index, index_ptr = self.memory.put(np.full((len(scores), keep), -7, np.int64))
        self.call("select_tokens", scores_ptr, *scores.shape, scores.shape[1], keep, index_ptr)
        return self.memory.get(index)

    def copy(self, tensors, keep, extra_tokens, run, shift=0):
        """Calls ``run(rows)`` on [B, N, row_bytes] uint8 tensors that start `shift` bytes off alignment."""
        outputs, rows, alive = [], [], []
        for x in tensors:
            batch, tokens, row_bytes = x.shape
            source, pointer = self.memory.put(np.concatenate([np.zeros(shift, np.uint8), x.reshape(-1)]))
            size = batch * (extra_tokens + keep) * row_bytes
            out, out_ptr = self.memory.put(np.full(shift + size + 64, 0xEE, np.uint8))
            rows.append((pointer + shift, out_ptr + shift, tokens * row_bytes, row_bytes, row_bytes))
            outputs.append((out, size, (batch, extra_tokens + keep, row_bytes)))
            alive.append(source)
        run(rows)
        results = []
        for out, size, shape in outputs:
            out = self.memory.get(out)
            assert (out[:shift] == 0xEE).all() and (out[shift + size :] == 0xEE).all(), "wrote outside its output"
            results.append(out[shift : shift + size].reshape(shape))
        return results

    def gather(self, tensors, index, extra_tokens, shift=0):
        handle, index_ptr = self.memory.put(index)
        batch, keep = index.shape
        patches = tensors[0].shape[1] - extra_tokens
        return self.copy(tensors, keep, extra_tokens, lambda rows: self.call(
            "gather_tokens", index_ptr, batch, patches, keep, extra_tokens, rows), shift)

    def prune(self, scores, tensors, keep, extra_tokens, shift=0):
        handle, scores_ptr = self.memory.put(scores)
        index, index_ptr = self.memory.put(np.full((len(scores), keep), -7, np.int64))
        out = self.copy(tensors, keep, extra_tokens, lambda rows: self.call(
            "prune_tokens", scores_ptr, *scores.shape, scores.shape[1], keep, index_ptr, extra_tokens, rows), shift)
        return self.memory.get(index), out

    def prune_sums(self, partials, tensors, keep, extra_tokens, write=True):
        """``prune_epilogue`` of partial scores [B, R, P]: (scores, or None if not to write them; index; outputs)."""
        batch, rows, patches = partials.shape
        handle, pointer = self.memory.put(partials)
        scores, scores_ptr = self.memory.put(np.full((batch, patches), -7, np.float32))
        index, index_ptr = self.memory.put(np.full((batch, keep), -7, np.int64))
        strides = (rows * patches, patches)
        out = self.copy(tensors, keep, extra_tokens, lambda places: self.call(
            "prune_epilogue", pointer, batch, rows, patches, *strides, keep, scores_ptr if write else 0, index_ptr,
            extra_tokens, places))
        return self.memory.get(scores) if write else None, self.memory.get(index), out


@pytest.fixture(scope="session")
def setup_module():
    """setup.py as a module, without running it."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("pruneattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_shim(setup_module):
    """``build_shim(sources, output, *flags, own={}, race=...)``: sources compiled against tests/csrc/shim, a library.

    ``own``: further flags of some sources, by source; all else is shared by the libraries of a folder. Objects stay
    beside ``output``; what has not changed is not compiled again.

    ``race``: so that it finds races, too; by default where SHIM_RACE is set, as by ``make race``.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ on the PATH")
    ninja = pytest.importorskip("ninja")
    from ninja.ninja_syntax import Writer

    def build(sources, output, *flags, own={}, race=bool(os.environ.get("SHIM_RACE"))):
        flags = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", f"-I{SHIM}",
                 f"-I{ROOT / 'csrc'}", *flags]
        kernel_flags = ["-O1"]
        runtime = [SHIM / "fibres.cpp"]
        if race:
            probe = ["g++", "-fsanitize=thread", "-x", "c++", "-fsyntax-only", "-"]
            if subprocess.run(probe, input="", text=True, stderr=subprocess.DEVNULL).returncode:
                pytest.skip("g++ has no -fsanitize=thread for this machine")
            flags += ["-DSHIM_RACE", "-g1"]
            kernel_flags += ["-fsanitize=thread", "-fno-threadsafe-statics"]
            runtime += [SHIM / "race.cpp"]
        # The kernels first: of an inline function that others have too, the linker takes the first, an instrumented one.
        kernels = [source for source in sources if source.suffix == ".cu"]
        others = [source for source in sources if source not in kernels]
        edges = [(SHIM / "shared_edge.cpp", [f"-DSHIM_EDGE=shim_shared_{edge}"]) for edge in ("begin", "end")]
        parts = [edges[0], *((source, kernel_flags) for source in kernels), edges[1]]
        parts += [(source, ["-O1", *setup_module.isa_flags(source).split()]) for source in others]
        parts += [(source, ["-O2"]) for source in runtime]
        parts = [(source, [*how, *own.get(source, [])]) for source, how in parts]
        whose = [f"-{output.name.partition('.')[0]}" if source in own else "" for source, _ in parts]
        objects = [output.with_name(f"{number}-{part[0].name}{whose[number]}.o") for number, part in enumerate(parts)]
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output.with_name("lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # tests of the same checkout that run at the same time
            script = output.with_suffix(".ninja")
            with open(script, "w") as file:
                writer = Writer(file, width=10000)
                writer.variable("builddir", str(output.parent))
                writer.rule("compile", f"g++ {shlex.join(map(str, flags))} $how -MMD -MF $out.d -x c++ -c $in -o $out",
                            deps="gcc", depfile="$out.d")
                writer.rule("link", "g++ -shared -fopenmp $in -ldl -o $out")
                # The largest first, so that no core is left with it at the end.
                for size, (source, how), where in sorted(zip((-s.stat().st_size for s, _ in parts), parts, objects)):
                    writer.build(str(where), "compile", str(source), variables={"how": shlex.join(how)})
                writer.build(str(output), "link", [str(where) for where in objects])
            command = [Path(ninja.BIN_DIR, "ninja"), f"-j{os.cpu_count()}", "-f", script]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout
        return output

    return build


@pytest.fixture(scope="session")
def load_shim(setup_module, build_shim):
    """``load_shim(name, own={})``: ``_C`` with the CUDA sources compiled by g++ against tests/csrc/shim."""
    pybind11 = pytest.importorskip("pybind11")
    folder = ROOT / "build" / f"{'race' if os.environ.get('SHIM_RACE') else 'shim'}-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    names = ("CUDA_ARCHITECTURES", "CUDA_REASON", "COMPILER")
    config = "".join(f'#define PRUNEATTN_{name} "shim"\n' for name in names)
    setup_module.write_if_changed(folder / "build_config.h", config)
    sources = sorted([*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cpp")])
    flags = ["-DPRUNEATTN_CUDA", f"-I{folder}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def load(name, own={}):
        output = build_shim(sources, folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}", *flags, own=own)
        spec = importlib.util.spec_from_file_location("_C", output)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules.pop("_C", None)
        return module

    return load


@pytest.fixture(scope="session")
def shim_module(load_shim):
    return load_shim("_C")


@pytest.fixture(scope="session")
def mma_sync_module(load_shim):
    """As `shim_module`, with the tensor cores of GPUs other than Hopper's."""
    return load_shim("mma_sync", {ROOT / "csrc/cuda/column_mean_attention.cu": ["-DSHIM_MMA_SYNC"]})


@pytest.fixture(scope="session")
def compiled():
    return pytest.importorskip("pruneattn._C", reason="pruneattn._C is not built: pip install -e .")


@pytest.fixture
def cpu(compiled):
    return Kernels(compiled, "cpu", (2,), Memory())


@pytest.fixture
def shim(shim_module):
    return Kernels(shim_module, "cuda", (0, 0), Memory())


@pytest.fixture
def shim_mma_sync(mma_sync_module):
    return Kernels(mma_sync_module, "cuda", (0, 0), Memory())


@pytest.fixture
def device(compiled):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if not compiled.build_info()["cuda"]:
        pytest.skip(f"pruneattn._C has no CUDA code: {compiled.build_info()['cuda_reason']}")
    return Kernels(compiled, "cuda", (0, torch.cuda.current_stream().cuda_stream), DeviceMemory())


@pytest.fixture(params=["cpu", "shim", pytest.param("device", marks=pytest.mark.device)])
def kernels(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["shim", pytest.param("device", marks=pytest.mark.device)])
def cuda(request):
    return request.getfixturevalue(request.param)
