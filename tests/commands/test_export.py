"""``pruneattn export``: options and messages. tests/models/test_export.py tests the files."""

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import export
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError

pytestmark = pytest.mark.device  # commands use the GPU if there is one


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    model = pruneattn.create_model(
        "ast_tiny", num_classes=2, frames=128, embed_dim=48, depth=4, num_heads=3, prune_blocks=(1, 2, 3), keep_rate=0.7
    )
    features = FeatureConfig(frames=128, mean=-11.0, std=3.0)
    path = tmp_path / "best.safetensors"
    pruneattn.save_pretrained(model, path, features=features, labels=["a", "b"], multilabel=False)
    return path


@pytest.fixture
def exported(monkeypatch):
    """The arguments with which a model is exported; the file is not a program."""
    seen = {}

    def export_model(model, path, format, **options):
        seen.update(options, keep_rates=model.keep_rates, path=path, format=format)
        path.write_bytes(bytes(2**20))
        return 2e-6

    monkeypatch.setattr(export, "export_model", export_model)
    return seen


@pytest.mark.parametrize(
    ("words", "keep_rates", "text"),
    [
        ([], (0.7, 0.7, 0.7), "0.7"),
        (["--keep-rate", "0.5"], (0.5, 0.5, 0.5), "0.5"),
        (["--keep-rate", "0.9", "0.7", "0.5"], (0.9, 0.7, 0.5), "0.9,0.7,0.5"),
        (["--keep-rate", "0.9,0.7,0.9"], (0.9, 0.7, 0.9), "0.9,0.7,0.9"),
    ],
)
def test_the_model_is_exported_at_the_keep_rate(checkpoint, tmp_path, exported, capsys, words, keep_rates, text):
    path = tmp_path / "out.onnx"
    assert export.main([*words, str(checkpoint), "--format", "onnx", "--output", str(path)]) == 0
    assert exported["keep_rates"] == keep_rates
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: ast_tiny, 128 frames (64 patches), 2 classes, keep-rate {text}, 1.0 MiB",
        "checked in onnxruntime: logits within 2.0e-06 of the model's",
    ]


def test_options_reach_the_exporter(checkpoint, tmp_path, exported, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export.main([str(checkpoint), "--format", "torch", "--dtype", "bf16", "--waveform", "--kernels", "--device", "cpu"])
    assert exported == {
        "keep_rates": (0.7, 0.7, 0.7),
        "path": (tmp_path / "ast_tiny.pt2").relative_to(tmp_path),
        "format": "torch",
        "waveform": True,
        "dtype": torch.bfloat16,
        "kernels": True,
        "calibrate": None,
    }


def test_int8_is_calibrated_on_the_training_split(checkpoint, tmp_path, exported):
    for number, label in enumerate("ab" * 4):
        folder = tmp_path / "clips" / ("train" if number < 6 else "test") / label
        folder.mkdir(parents=True, exist_ok=True)
        sound = make_sound(("tone", "siren")[number % 2], np.random.default_rng(number))
        soundfile.write(folder / f"{number}.wav", sound, 16000)
    data = ["--dataset", "folder", "--data-dir", str(tmp_path / "clips")]
    path = tmp_path / "out.onnx"
    words = [str(checkpoint), "--format", "onnx", "--dtype", "int8", "--calibrate", "99", "--output", str(path), *data]
    assert export.main(words) == 0
    paths = sorted((tmp_path / "clips" / "train").rglob("*.wav"))
    features = FeatureExtractor(FeatureConfig(frames=128, mean=-11.0, std=3.0))
    expected = torch.cat([features(load_audio(path)[None]) for path in paths])
    torch.testing.assert_close(torch.cat(exported["calibrate"]), expected)
    assert exported["dtype"] == torch.int8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "onnx", "--dtype", "int8"], r"calibrate \(--calibrate\): .* needs calibration inputs"),
        (["--format", "onnx", "--calibrate", "3"], r"\(--calibrate\) applies only with dtype \(--dtype\) int8"),
        (["--format", "torch", "--dtype", "int8", "--calibrate", "3"], "the format torch does not support it"),
        (["--format", "onnx", "--dtype", "int8", "--calibrate", "3", "--waveform"], r"waveform \(--waveform\): not"),
        (["--format", "onnx", "--dtype", "int8", "--calibrate", "-1"], "--calibrate -1: must be at least 0"),
    ],
)
def test_rejected_int8_options(checkpoint, exported, words, message):
    with pytest.raises(UserError, match=message):
        export.main([str(checkpoint), *words])
    assert not exported


def test_a_wrong_number_of_keep_rates_is_an_error(checkpoint, exported):
    with pytest.raises(UserError, match="keep_rate: 2 values for 3 pruning blocks"):
        export.main([str(checkpoint), "--format", "torch", "--keep-rate", "0.9", "0.7"])
    assert not exported
