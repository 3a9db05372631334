"""Files that pruneattn 0.1.0 wrote, and its command lines, run in this process."""

import json
import os
import runpy
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pruneattn

FILES = Path(__file__).resolve().with_name("files")
SCRIPTS = Path(__file__).resolve().parents[2] / "python"


@pytest.fixture(scope="session")
def files():
    """The folder of the old files, which no test may change."""
    return FILES


@pytest.fixture(scope="session")
def expected():
    """The values that version 0.1.0 computed."""
    return json.loads((FILES / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def fbank(expected):
    """The input of the expected logits: normalized log-mels, float32 ``[2, 128, 128]``."""
    return torch.from_numpy(np.load(FILES / "input.npy")).float() / expected["input_scale"]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Copy old files into the working directory, which is temporary, and return the first copy's relative path."""
    monkeypatch.chdir(tmp_path)

    def copy(*names):
        for name in names:
            if (FILES / name).is_dir():
                shutil.copytree(FILES / name, name)
            else:
                shutil.copy(FILES / name, name)
        return Path(names[0])

    return copy


class Programs:
    """Run commands and scripts as ``python -m`` and ``python`` do, without starting a process."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setenv("COLUMNS", "400")  # --help breaks no line inside an option

    def command(self, name, *arguments):
        """Run ``python -m pruneattn.NAME``, which must succeed, and return its standard output."""
        return self._succeed(self._module(name), name, arguments)

    def script(self, name, *arguments):
        """Run ``python python/NAME.py``, which must succeed, and return its standard output."""
        path = str(SCRIPTS / f"{name}.py")
        return self._succeed(lambda: runpy.run_path(path, run_name="__main__"), name, arguments)

    def rejected(self, name, *arguments):
        """Run ``python -m pruneattn.NAME``, which must fail, and return its message."""
        exit_code, _, error = self._run(self._module(name), name, arguments)
        assert exit_code not in (0, None)
        return f"{exit_code}\n{error}"  # sys.exit takes a code or a message

    @staticmethod
    def _module(name):
        return lambda: runpy.run_module(f"pruneattn.{name}", run_name="__main__")

    def _succeed(self, program, name, arguments):
        exit_code, output, error = self._run(program, name, arguments)
        assert exit_code in (0, None), f"{exit_code}\n{error}"
        return output

    def _run(self, program, name, arguments):
        self._monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        self._capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # the module may be imported
            program()
        return left.value.code, *self._capsys.readouterr()


@pytest.fixture
def programs(monkeypatch, capsys):
    return Programs(monkeypatch, capsys)


@pytest.fixture(scope="session")
def environment():
    """Environment of a new process that imports this package from any working directory."""
    return os.environ | {"PYTHONPATH": str(Path(pruneattn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def assert_close(actual, wanted):
    """Equal up to rounding on another CPU, with other kernels or another version of PyTorch."""
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(wanted), rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="session")
def close():
    return assert_close
