"""Fixtures for the compiled kernels: C++ on the CPU, CUDA C++ under emulation, CUDA C++ on a GPU."""

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
RUNTIME = Path(__file__).parent / "runtime"
#: `make race` sets it: the emulation then also finds data races.
RACE = bool(os.environ.get("EMULATED_RACE"))


def has_gpu():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def instruction_sets():
    """The instruction sets of the CPU kernels on this machine."""
    try:
        from pruneattn import _C
    except ImportError:
        return ["baseline"]  # tests skip
    return _C.cpu_isas()


# Only implementations that this machine can run are parameters, so that the report lists no skipped duplicates.
EMULATED = [pytest.param("emulated", marks=pytest.mark.emulated)]
EMULATED_MMA_SYNC = [pytest.param("emulated_mma_sync", marks=pytest.mark.emulated)]
DEVICE = [pytest.param("device", marks=pytest.mark.device)] if has_gpu() else []


def pytest_collection_modifyitems(items):
    """Mark tests that use `build_emulated` as ``emulated``. The smoke tests use `build_library` and are not marked."""
    for item in items:
        if "build_emulated" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.emulated)


class Memory:
    """Buffers in host memory."""

    def put(self, array):
        """Copy the array. Return (handle, pointer); the copy lives as long as the handle."""
        array = np.array(array, copy=True)
        return array, array.ctypes.data

    def get(self, handle):
        return handle


class DeviceMemory(Memory):
    """Buffers in GPU memory, allocated by torch."""

    def put(self, array):
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(array)).cuda()
        return tensor, tensor.data_ptr()

    def get(self, handle):
        return handle.cpu().numpy()


class Kernels:
    """The kernels of one implementation, called with numpy arrays."""

    def __init__(self, module, prefix, last, memory):
        self.module, self.prefix, self.last, self.memory = module, prefix, last, memory

    def call(self, name, *arguments):
        getattr(self.module, f"{self.prefix}_{name}")(*arguments, *self.last)

    def select(self, scores, keep):
        _scores_handle, scores_ptr = self.memory.put(scores)
        index, index_ptr = self.memory.put(np.full((len(scores), keep), -7, np.int64))
        self.call("select_tokens", scores_ptr, *scores.shape, scores.shape[1], keep, index_ptr)
        return self.memory.get(index)

    def copy(self, tensors, keep, extra_tokens, run, shift=0):
        """Call ``run(rows)`` for uint8 tensors [B, N, row_bytes] that start `shift` bytes off alignment."""
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
        _handle, index_ptr = self.memory.put(index)
        batch, keep = index.shape
        patches = tensors[0].shape[1] - extra_tokens
        return self.copy(
            tensors,
            keep,
            extra_tokens,
            lambda rows: self.call("gather_tokens", index_ptr, batch, patches, keep, extra_tokens, rows),
            shift,
        )

    def prune(self, scores, tensors, keep, extra_tokens, shift=0):
        _handle, scores_ptr = self.memory.put(scores)
        index, index_ptr = self.memory.put(np.full((len(scores), keep), -7, np.int64))
        out = self.copy(
            tensors,
            keep,
            extra_tokens,
            lambda rows: self.call(
                "prune_tokens", scores_ptr, *scores.shape, scores.shape[1], keep, index_ptr, extra_tokens, rows
            ),
            shift,
        )
        return self.memory.get(index), out

    def prune_sums(self, partials, tensors, keep, extra_tokens, write=True):
        """Run ``prune_epilogue`` on partial scores [B, R, P]. Return (scores or None, index, outputs)."""
        batch, rows, patches = partials.shape
        _handle, pointer = self.memory.put(partials)
        scores, scores_ptr = self.memory.put(np.full((batch, patches), -7, np.float32))
        index, index_ptr = self.memory.put(np.full((batch, keep), -7, np.int64))
        strides = (rows * patches, patches)
        out = self.copy(
            tensors,
            keep,
            extra_tokens,
            lambda places: self.call(
                "prune_epilogue",
                pointer,
                batch,
                rows,
                patches,
                *strides,
                keep,
                scores_ptr if write else 0,
                index_ptr,
                extra_tokens,
                places,
            ),
        )
        return self.memory.get(scores) if write else None, self.memory.get(index), out


@pytest.fixture(scope="session")
def setup_module():
    """The module setup.py, imported without running a build."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("pruneattn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def build_library(setup_module):
    """``build_library(name, sources, flags=(), own=None, race=RACE)``: compiles a library of emulated kernels.

    The library and its objects stay in build/, where all libraries share the objects of the runtime. A rebuild compiles
    only changed files. A file lock serializes the builds of all processes, so that each object is compiled once.

    Args:
        name: of the library.
        sources: the source files. The files ``*.cu`` are kernels.
        flags: compiler flags for sources that are not kernels. All libraries share the objects of the kernels.
        own: ``{source: flags}``, additional flags for sources whose objects other libraries do not share.
        race: whether the library finds data races.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on the PATH")
    ninja = pytest.importorskip("ninja")
    from ninja.ninja_syntax import Writer

    def objects_of(folder, name, sources, flags, own, race):
        """``[(object, source, flags)]`` in link order."""
        kernel_flags, runtime = ["-O1"], [RUNTIME / "fibers.cpp"]
        if race:
            kernel_flags += ["-fsanitize=thread", "-fno-threadsafe-statics"]
            runtime += [RUNTIME / "race.cpp"]
        edges = [
            (folder / f"edge_{edge}.o", RUNTIME / "shared_edge.cpp", [f"-DEMULATED_EDGE=emulated_shared_{edge}"])
            for edge in ("begin", "end")
        ]

        def compiled(source, how):
            suffix = f"-{name}" if source in own else ""
            return folder / f"{source.parent.name}_{source.name}{suffix}.o", source, [*how, *own.get(source, [])]

        # The kernels are first: of several copies of an inline function, the linker takes the first, instrumented copy.
        # Tests never call the CPU kernels of this library, so they are not optimized.
        kernels = [compiled(source, kernel_flags) for source in sources if source.suffix == ".cu"]
        others = [
            compiled(source, ["-O0", *setup_module.isa_flags(source).split(), *flags])
            for source in sources
            if source.suffix != ".cu"
        ]
        return [edges[0], *kernels, edges[1], *others, *((folder / f"{s.name}.o", s, ["-O2"]) for s in runtime)]

    def build(name, sources, flags=(), own=None, race=RACE):
        own = own or {}
        base = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
        base += [f"-I{RUNTIME}", f"-I{ROOT / 'csrc'}"]
        if race:
            probe = ["g++", "-fsanitize=thread", "-x", "c++", "-fsyntax-only", "-"]
            if subprocess.run(probe, input="", text=True, stderr=subprocess.DEVNULL, check=False).returncode:
                pytest.skip("g++ does not support -fsanitize=thread on this machine")
            base += ["-DEMULATED_RACE", "-g1"]
        folder = ROOT / "build" / f"{'race' if race else 'emulated'}-{sysconfig.get_config_var('SOABI')}"
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            script = folder / f"{name}.ninja"
            objects = objects_of(folder, name, sources, flags, own, race)
            with open(script, "w") as file:
                writer = Writer(file, width=10000)
                writer.variable("builddir", str(folder))
                command = f"g++ {shlex.join(base)} $flags -MMD -MF $out.d -x c++ -c $in -o $out"
                writer.rule("compile", command, deps="gcc", depfile="$out.d")
                writer.rule("link", "g++ -shared -fopenmp $in -ldl -o $out")
                # The largest file first, so that it does not finish last on a single core.
                for target, source, how in sorted(objects, key=lambda part: -part[1].stat().st_size):
                    writer.build(str(target), "compile", str(source), variables={"flags": shlex.join(how)})
                writer.build(str(output), "link", [str(target) for target, *_ in objects])
            command = [Path(ninja.BIN_DIR, "ninja"), f"-j{os.cpu_count()}", "-f", script]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stdout
        return output

    return build


@pytest.fixture(scope="session")
def build_emulated(build_library):
    """`build_library` for tests that are marked ``emulated``."""
    return build_library


@pytest.fixture(scope="session")
def load_emulated(setup_module, build_emulated):
    """``load_emulated(name, own=None)``: the module ``_C`` with the CUDA sources compiled for emulation."""
    pybind11 = pytest.importorskip("pybind11")
    config = ROOT / "build" / f"emulated-config-{sysconfig.get_config_var('SOABI')}"
    config.mkdir(parents=True, exist_ok=True)
    names = ("CUDA_ARCHITECTURES", "CUDA_REASON", "COMPILER")
    text = "".join(f'#define PRUNEATTN_{name} "emulated"\n' for name in names)
    setup_module.write_if_changed(config / "build_config.h", text)
    sources = sorted([*(ROOT / "csrc").rglob("*.cu"), *(ROOT / "csrc").rglob("*.cpp")])
    includes = [config, pybind11.get_include(), sysconfig.get_path("include")]
    flags = ["-DPRUNEATTN_CUDA", *(f"-I{folder}" for folder in includes)]

    def load(name, own=None):
        output = build_emulated(name, sources, flags, own)
        spec = importlib.util.spec_from_file_location("_C", output)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules.pop("_C", None)
        return module

    return load


@pytest.fixture(scope="session")
def emulated_module(load_emulated):
    return load_emulated("_C")


@pytest.fixture(scope="session")
def mma_sync_module(load_emulated):
    """Same as `emulated_module`, with mma.sync instead of wgmma."""
    source = ROOT / "csrc/cuda/column_mean_attention.cu"
    return load_emulated("mma_sync", {source: ["-DPRUNEATTN_EMULATE_MMA_SYNC"]})


@pytest.fixture(scope="session")
def compiled():
    return pytest.importorskip("pruneattn._C", reason="pruneattn._C is not built: pip install -e .")


@pytest.fixture(params=instruction_sets())
def isa(request, compiled):
    """Each instruction set of the CPU kernels that this machine supports."""
    previous = compiled.cpu_isa()
    compiled.cpu_use_isa(request.param)
    yield request.param
    compiled.cpu_use_isa(previous)


@pytest.fixture
def cpu(compiled):
    return Kernels(compiled, "cpu", (2,), Memory())


@pytest.fixture
def emulated(emulated_module):
    return Kernels(emulated_module, "cuda", (0, 0), Memory())


@pytest.fixture
def emulated_mma_sync(mma_sync_module):
    return Kernels(mma_sync_module, "cuda", (0, 0), Memory())


@pytest.fixture
def device(compiled):
    if not has_gpu():
        pytest.skip("no CUDA device")
    import torch

    if not compiled.build_info()["cuda"]:
        pytest.skip(f"pruneattn._C has no CUDA code: {compiled.build_info()['cuda_reason']}")
    return Kernels(compiled, "cuda", (0, torch.cuda.current_stream().cuda_stream), DeviceMemory())


@pytest.fixture(params=["cpu", *EMULATED, *DEVICE])
def kernels(request):
    """Each implementation of the kernels."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[*EMULATED, *DEVICE])
def cuda(request):
    """Each implementation of the CUDA kernels."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[*EMULATED, *EMULATED_MMA_SYNC])
def emulated_attention(request):
    """The emulated kernels, with each kind of tensor core instruction."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=[*EMULATED, *EMULATED_MMA_SYNC, *DEVICE])
def cuda_attention(request):
    """Each implementation of the CUDA kernels, with each kind of tensor core instruction."""
    return request.getfixturevalue(request.param)
