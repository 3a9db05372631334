from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio
from pruneattn.data.toy import make_sound

LABELS = ["buzz", "siren", "tone"]
FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0, padding="min")


class Run:
    """A checkpoint of a small model with opinions, and a folder of clips."""

    def __init__(self, folder, family, clips):
        self.folder, self.data = folder / family, clips
        self.folder.mkdir()
        torch.manual_seed(1)
        self.model = pruneattn.create_model(
            f"{family}_tiny", num_classes=3, frames=128, embed_dim=32, depth=4, num_heads=2, prune_blocks=(0, 1, 2)
        ).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.4)
        pruneattn.save_pretrained(
            self.model, self.folder / "best.safetensors", features=FEATURES, labels=LABELS, multilabel=False
        )
        self.model.features = FEATURES

    @property
    def paths(self):
        """The clips in the order of the data set."""
        return sorted(self.data.glob("test/*/*.wav"))

    def fbanks(self):
        """Each clip's log-mel ``[128, 128]``, made clip by clip."""
        extract = FeatureExtractor(FEATURES)
        return [extract(load_audio(path)[None], torch.tensor([len(load_audio(path))]))[0] for path in self.paths]

    def options(self, output):
        """Options of a script that analyses this checkpoint on these clips."""
        data = ["--dataset", "folder", "--data-dir", str(self.data)]
        return [str(self.folder), *data, "--output", str(output), "--device", "cpu", "--batch-size", "3"]


@pytest.fixture
def analysis_script(load_file):
    """``analysis_script(name)``: that script of ``python/`` as a module."""
    return lambda name: load_file(Path(__file__).parents[2] / "python" / f"{name}.py")


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
    """Makes a `Run` of a family; skips where the optional packages for figures are not there."""
    pytest.importorskip("matplotlib")
    return lambda family: Run(tmp_path, family, analysis_clips)
