import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pruneattn.train import main


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Folder of WAV files: tones of three pitches in noise, 36 for training, 9 for validation and 9 for testing."""
    soundfile = pytest.importorskip("soundfile")
    root = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for kind, pitch in (("low", 300), ("middle", 1200), ("high", 4800)):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                time = np.arange(rng.integers(6000, 12000)) / 16000
                wave = np.sin(2 * np.pi * pitch * time) + 0.01 * rng.standard_normal(len(time))
                soundfile.write(folder / f"{i:02d}.wav", 0.1 * wave, 16000)
    return root


@pytest.fixture(scope="session")
def tagged(clips):
    """Options for manifests of the same clips. Every second training clip has two labels; all others have one."""
    kinds = ("high", "low", "middle")
    rows = ["index,mid,display_name", *(f"{number},/m/{kind},{kind}" for number, kind in enumerate(kinds))]
    (clips / "class_labels_indices.csv").write_text("\n".join(rows))
    options = ["--dataset", "manifest"]
    for split in ("train", "val", "test"):
        entries = []
        for number, path in enumerate(sorted((clips / split).rglob("*.wav"))):
            both = ",/m/low" if split == "train" and number % 2 else ""
            entries.append({"wav": str(path.relative_to(clips)), "labels": f"/m/{path.parent.name}{both}"})
        (clips / f"{split}.json").write_text(json.dumps({"data": entries}))
        options += [f"--{split}-manifest", str(clips / f"{split}.json")]
    return options


@contextlib.contextmanager
def one_thread():
    """Compared runs use the same number of threads. For models of this size, one thread is the fastest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def train(clips, tmp_path):
    """Run training in this process; see `Runs`."""
    with one_thread():
        yield Runs(clips, tmp_path)


# Runs that several tests compare with or copy. No test may change their folders.


@pytest.fixture(scope="session")
def whole(clips, tmp_path_factory):
    """An uninterrupted run with the options of `Runs.arguments`."""
    with one_thread():
        return Runs(clips, tmp_path_factory.mktemp("runs"))("whole")


@pytest.fixture(scope="session")
def plain(clips, tmp_path_factory):
    """The same run without augmentation."""
    with one_thread():
        return Runs(clips, tmp_path_factory.mktemp("runs"))("plain", *Runs.plain)


@pytest.fixture(scope="session")
def short(clips, tmp_path_factory):
    """A run of two epochs, with the options `Runs.short`."""
    with one_thread():
        return Runs(clips, tmp_path_factory.mktemp("runs"))("short", *Runs.short)


class Runs:
    """Tiny training runs, by the name of their output folder, and the content of these folders."""

    #: Options without randomness, except for the order of the clips.
    plain = (
        "--no-gain --no-noise --mixup 0 --specaug-freq 0 --specaug-time 0 --mask-time 0 --mask-freq 0 --drop-path 0"
    ).split()
    #: Options for two epochs, of which the second is pruned.
    short = ("--epochs", "2", "--shrink-epochs", "0")

    def __init__(self, clips, root):
        self.clips, self.root = clips, root

    def arguments(self, name, *options):
        """Command line of a run of 4 epochs with 3 steps each, pruned from epoch 1 on, with all augmentations."""
        return (
            f"--dataset folder --data-dir {self.clips} --output {self.root / name} --no-tensorboard --log-every 1 "
            "--size tiny --embed-dim 48 --depth 4 --num-heads 3 --prune-blocks 1 2 --frames 64 --batch-size 12 "
            "--epochs 4 --keep-rate 0.5 --shrink-start 1 --shrink-epochs 2 --warmup-epochs 1 "
            "--mask-time 0.25 --mask-freq 0.25 --mixup 0.5"
        ).split() + [str(option) for option in options]

    def __call__(self, name, *options, code=0):
        """Train in this process; later options take precedence. Return the output folder."""
        assert main(self.arguments(name, *options)) == code
        return self.root / name

    def copy(self, run, name):
        """Copy the folder of a run, which a test may then change."""
        return shutil.copytree(run, self.root / name)

    @staticmethod
    def log(folder, kind=None):
        """Lines of log.jsonl, without the times, which differ between any two runs."""
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        times = {"train_seconds", "eval_seconds", "clips_per_second"}
        lines = [{key: value for key, value in line.items() if key not in times} for line in lines]
        return [line for line in lines if kind in (None, line["kind"])]

    @staticmethod
    def state(folder, name="last.pt"):
        return torch.load(folder / name, weights_only=True)

    def assert_same(self, a, b):
        """Two output folders contain the same run, bit for bit."""
        assert self.log(a) == self.log(b)
        left, right = self.state(a), self.state(b)
        for key in ("model", "optimizer", "scaler", "progress"):
            assert_identical(left[key], right[key])
        assert (a / "result.json").read_bytes() == (b / "result.json").read_bytes()
        with safe_open(a / "best.safetensors", "pt") as left, safe_open(b / "best.safetensors", "pt") as right:
            assert left.metadata() == right.metadata()
        assert_identical(load_file(a / "best.safetensors"), load_file(b / "best.safetensors"))


def assert_identical(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_identical(left, right)
    else:
        assert a == b
