"""Builds ``pruneattn._C`` from csrc/: the C++ code, and the CUDA code if nvcc is found. Does not need torch.

The build looks for nvcc in CUDA_HOME, PATH and /usr/local/cuda. PRUNEATTN_CUDA_ARCHS sets the CUDA architectures
(default "80;90a;100"); "none" builds without CUDA. CXX and CXXFLAGS set the C++ compiler and its flags. Objects stay in
build/, so rebuilds are incremental. The metadata of the package is in pyproject.toml.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a;100"
# Each file csrc/cpu/isa_*.cpp is compiled for its instruction set. The library selects a supported one at run time.
AVX512 = (
    "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 "
    "-Wno-maybe-uninitialized"
)  # GCC 12 warns about its own intrinsics
ISA_FLAGS = {
    "isa_avx2": "-mavx2 -mfma",
    "isa_avx_vnni": "-mavx2 -mfma -mavxvnni",
    "isa_avx512": AVX512,
    "isa_avx512_vnni": f"{AVX512} -mavx512vnni",
    "isa_avx512_bf16": f"{AVX512} -mavx512vnni -mavx512bf16",
}


def isa_flags(source):
    return ISA_FLAGS.get(source.stem, "") if platform.machine().lower() in ("x86_64", "amd64") else ""


def say(line):
    print(f"pruneattn: {line}", flush=True)


def find_nvcc():
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(0, str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def choose_cuda():
    """Returns (path of nvcc or None, architectures, reason for a build without CUDA)."""
    asked = os.environ.get("PRUNEATTN_CUDA_ARCHS")
    archs = [arch.strip() for arch in (DEFAULT_ARCHS if asked is None else asked).split(";") if arch.strip()]
    if archs in ([], ["0"], ["none"]):
        return None, [], f"PRUNEATTN_CUDA_ARCHS={asked}"
    nvcc = find_nvcc()
    if nvcc is None:
        return None, [], "nvcc is not in CUDA_HOME, PATH or /usr/local/cuda"
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    unknown = [arch for arch in archs if f"sm_{arch.rstrip('af')}" not in known]
    if unknown and asked is not None:
        raise CompileError(f"PRUNEATTN_CUDA_ARCHS={asked}: {nvcc} does not support {unknown}; it supports {known}")
    if unknown:
        say(f"{nvcc} does not support sm_{' and sm_'.join(unknown)}: built without these architectures")
    archs = [arch for arch in archs if arch not in unknown]
    return (nvcc, archs, "") if archs else (None, [], f"{nvcc} supports none of sm_{', sm_'.join(unknown)}")


def gencode(arch):
    # The code of an architecture without suffix includes its PTX, which the driver compiles for newer GPUs.
    code = f"sm_{arch}" if arch[-1] in "af" else f"[sm_{arch},compute_{arch}]"
    return f"-gencode arch=compute_{arch},code={code}"


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        import ninja
        import pybind11

        nvcc, archs, reason = choose_cuda()
        say(
            f"compiles CUDA code for sm_{', sm_'.join(archs)} with {nvcc}"
            if nvcc
            else f"builds without CUDA code: {reason}"
        )
        cxx = os.environ.get("CXX", "g++")
        if shutil.which(cxx.split()[0]) is None:
            raise CompileError(f"no C++ compiler: {cxx} is not on the PATH. Set CXX or install g++.")

        # One folder per Python version with stable paths, so that builds in temporary environments reuse the objects.
        folder = ROOT / "build" / sysconfig.get_config_var("SOABI")
        folder.mkdir(parents=True, exist_ok=True)
        pybind = folder / f"pybind11-{pybind11.__version__}"
        pybind.unlink(missing_ok=True)
        pybind.symlink_to(pybind11.get_include())
        run = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True, check=False)
        version = run.stdout.split("\n")[0]
        config = {"CUDA_ARCHITECTURES": ";".join(archs), "CUDA_REASON": reason, "COMPILER": version}
        lines = [f"#define PRUNEATTN_{name} {json.dumps(value)}\n" for name, value in config.items()]
        write_if_changed(folder / "build_config.h", "#pragma once\n" + "".join(lines))

        output = folder / "_C.so"
        self.write_ninja(folder, output, cxx, nvcc, archs, pybind)
        build = subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", folder], stdout=sys.stdout.fileno(), check=False)
        if build.returncode:
            raise CompileError(
                "pruneattn._C did not compile, see the errors above. PRUNEATTN_CUDA_ARCHS=none builds it without CUDA."
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(output, target)

    @staticmethod
    def write_ninja(folder, output, cxx, nvcc, archs, pybind):
        from ninja.ninja_syntax import Writer

        host = f"-fPIC -fopenmp -fvisibility=hidden -Wall -Wextra {os.environ.get('CXXFLAGS', '')}"
        ccbin = f"-ccbin {cxx.split()[-1]}" if "CXX" in os.environ else ""
        define = "-DPRUNEATTN_CUDA" if nvcc else ""
        with open(folder / "build.ninja", "w") as file:
            ninja = Writer(file, width=1000)
            ninja.rule(
                "cxx",
                f"{cxx} -std=c++17 -O3 {host} {define} -I{folder} -isystem {pybind} "
                f"-isystem {sysconfig.get_path('include')} -ffp-contract=fast $flags "
                "-MMD -MF $out.d -c $in -o $out",
                deps="gcc",
                depfile="$out.d",
                description="g++ $in",
            )
            objects = NinjaBuild.objects(ninja, folder, "cxx", "*.cpp")
            # exclude-libs hides the symbols of the static CUDA runtime, which would clash with torch's runtime.
            link = f"{cxx} -shared {host} $in -o $out -Wl,--exclude-libs,ALL"
            if nvcc:
                flags = f"-std=c++17 -O3 --threads 0 {ccbin} -Xcompiler '{host}' {' '.join(map(gencode, archs))}"
                ninja.rule(
                    "nvcc",
                    f"{nvcc} {flags} -MMD -MF $out.d -c $in -o $out",
                    deps="gcc",
                    depfile="$out.d",
                    description="nvcc $in",
                )
                objects += NinjaBuild.objects(ninja, folder, "nvcc", "*.cu")
                link = (
                    f"{nvcc} -shared {ccbin} -cudart static -cudadevrt none -Xcompiler '{host}' "
                    "-Xlinker --exclude-libs,ALL $in -o $out"
                )
            ninja.rule("link", link, description="link $out")
            ninja.build(str(output), "link", objects)

    @staticmethod
    def objects(ninja, folder, rule, pattern):
        sources = sorted((ROOT / "csrc").rglob(pattern))
        return [
            ninja.build(
                str(folder / f"{s.parent.name}_{s.name}.o"),
                rule,
                str(s),
                variables={"flags": isa_flags(s)},
            )[0]
            for s in sources
        ]


if __name__ == "__main__":
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
    setup(ext_modules=[Extension("pruneattn._C", sources)], cmdclass={"build_ext": NinjaBuild})
