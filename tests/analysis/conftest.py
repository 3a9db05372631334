import dataclasses

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn.analysis.__main__ import main
from pruneattn.analysis.clips import Analysis
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio, load_dataset
from pruneattn.data.toy import make_sound

LABELS = ["buzz", "siren", "tone"]
FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0, padding="min")


class Run:
    """A checkpoint of a small model whose logits and scores differ between clips, and a folder of clips."""

    def __init__(self, folder, family, clips, frames=128, **options):
        self.folder, self.data = folder / family, clips
        self.folder.mkdir()
        self.features = dataclasses.replace(FEATURES, frames=frames)
        torch.manual_seed(1)
        sizes = {"num_classes": 3, "embed_dim": 32, "depth": 4, "num_heads": 2, "prune_blocks": (0, 1, 2)}
        self.model = pruneattn.create_model(f"{family}_tiny", frames=frames, **sizes, **options).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.4)
        pruneattn.save_pretrained(
            self.model, self.folder / "best.safetensors", features=self.features, labels=LABELS, multilabel=False
        )
        self.model.features = self.features
        self.model.labels, self.model.multilabel = LABELS, False

    @property
    def paths(self):
        """Paths of the clips in the order of the dataset."""
        return sorted(self.data.glob("test/*/*.wav"))

    def fbanks(self):
        """Log-mel ``[frames, 128]`` of each clip, computed clip by clip."""
        extract = FeatureExtractor(self.features)
        return [extract(load_audio(path)[None], torch.tensor([len(load_audio(path))]))[0] for path in self.paths]

    def corners(self):
        """First frame and first mel bin of each patch of this AST, in token order: mel row by mel row."""
        of_frequency, of_time = self.model.stride
        frames = range(0, self.model.frames - 15, of_time)
        return [(frame, mel) for mel in range(0, 128 - 15, of_frequency) for frame in frames]

    def analysis(self, **settings):
        """The arguments of the library for this checkpoint on these clips."""
        dataset = load_dataset("folder", "test", data_dir=self.data, frames=self.features.frames)
        return Analysis(self.model, dataset, torch.device("cpu"), "folder, test", **{"batch_size": 3, **settings})

    def options(self, output):
        """Options of an analysis of this checkpoint on these clips."""
        data = ["--dataset", "folder", "--data-dir", str(self.data)]
        return [str(self.folder), *data, "--output", str(output), "--device", "cpu", "--batch-size", "3"]


@pytest.fixture
def analyze():
    """``analyze(name, *options)`` runs ``pruneattn analyze NAME``, which must succeed."""

    def run(name, *options):
        assert main([name, *map(str, options)]) == 0

    return run


@pytest.fixture(scope="session")
def analysis_clips(tmp_path_factory):
    """Seven synthetic clips of three classes, 0.5 to 1 s long."""
    folder = tmp_path_factory.mktemp("analysis_clips")
    for number, label in enumerate(["buzz", "siren", "tone", "buzz", "siren", "tone", "tone"]):
        for split in ("train", "test"):
            (folder / split / label).mkdir(parents=True, exist_ok=True)
        wave = make_sound(label, np.random.default_rng(number))
        soundfile.write(folder / "test" / label / f"{number}.wav", wave, 16000)
    return folder


@pytest.fixture
def analysis_run(tmp_path, analysis_clips):
    """``analysis_run(family, **options)`` makes a `Run`; skips if matplotlib is not installed."""
    pytest.importorskip("matplotlib")
    return lambda family, **options: Run(tmp_path, family, analysis_clips, **options)
