"""Every command opens a checkpoint with its own stride, or with that of ``--stride``."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import convert, evaluate, export, predict
from pruneattn.analysis.commands.options import make_clips_parser, open_analysis
from pruneattn.data import FeatureConfig
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError

pytestmark = pytest.mark.device  # commands use the GPU if there is one

LABELS = ["buzz", "siren", "tone"]
FEATURES = FeatureConfig(frames=100, mean=-11.0, std=3.0, padding="zero")
OWN, RESAMPLED = "stride 10, 100 frames (108 patches)", "100 frames (48 patches)"


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 3, "prune_blocks": (0, 1)}
    model = pruneattn.create_model("ast_tiny", num_classes=3, frames=100, stride=10, keep_rate=0.5, **sizes)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    """A folder of Hugging Face's AST with stride 10, pruned."""
    about = {"features": FEATURES, "labels": LABELS, "multilabel": False}
    pruneattn.save_checkpoint(model, tmp_path / "hf", format="huggingface", **about)
    return tmp_path / "hf"


@pytest.fixture
def clips(tmp_path):
    """A folder of three clips, one in each class."""
    for number, label in enumerate(LABELS):
        for split in ("train", "test"):
            (tmp_path / "clips" / split / label).mkdir(parents=True)
        wave = make_sound(label, np.random.default_rng(number))
        soundfile.write(tmp_path / "clips" / "test" / label / "1.wav", wave, 16000)
    return tmp_path / "clips"


WAYS = [
    ((), OWN),
    (("--stride", "10"), OWN),
    (("--stride", "16"), RESAMPLED),
    (("--stride", "16,10"), "stride 16,10, "),
]
each_way = pytest.mark.parametrize(("words", "text"), WAYS)
resampled = pytest.mark.filterwarnings("ignore:positions. an AST with stride 10:UserWarning")


def stride_of(words):
    return {"10": (10, 10), "16": (16, 16), "16,10": (16, 10)}[words[1] if words else "10"]


@each_way
@resampled
def test_evaluate(checkpoint, clips, tmp_path, words, text):
    data = [
        "--dataset",
        "folder",
        "--data-dir",
        str(clips),
        "--output",
        str(tmp_path / "out"),
        "--rounds",
        "0",
        "--keep-rate",
        "1",
    ]
    evaluate.main([str(checkpoint), *data, *words])
    assert text in json.loads((tmp_path / "out" / "table.json").read_text())["model"]


@each_way
@resampled
def test_predict(checkpoint, clips, tmp_path, words, text):
    output = tmp_path / "labels.jsonl"
    assert predict.main([str(checkpoint), str(clips), "--output", str(output), *words]) == 0
    assert text in json.loads((tmp_path / "labels.jsonl.about.json").read_text())["model"]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3


@each_way
@resampled
def test_export(checkpoint, tmp_path, capsys, monkeypatch, words, text):
    seen = []

    def export_model(model, path, *_, **__):
        seen.append(model.stride)
        path.touch()
        return 0.0

    monkeypatch.setattr(export, "export_model", export_model)
    output = ["--format", "torch", "--output", str(tmp_path / "x.pt2"), "--device", "cpu"]
    export.main([str(checkpoint), *output, *words])
    assert text in capsys.readouterr().out and seen == [stride_of(words)]


@each_way
@resampled
def test_convert(model, checkpoint, tmp_path, capsys, words, text):
    convert.main([str(checkpoint), str(tmp_path / "out"), "--format", "huggingface", *words])
    assert text in capsys.readouterr().out
    opened = pruneattn.load_pretrained(tmp_path / "out")
    assert opened.stride == stride_of(words)
    if opened.stride == model.stride:
        assert all(torch.equal(a, b) for a, b in zip(opened.parameters(), model.parameters(), strict=True))


@each_way
@resampled
def test_analyses(checkpoint, clips, tmp_path, words, text):
    pytest.importorskip("matplotlib")
    data = ["--dataset", "folder", "--data-dir", str(clips), "--output", str(tmp_path / "out"), "--device", "cpu"]
    parser = make_clips_parser("clusters", "Writes nothing.")
    assert open_analysis(parser.parse_args([str(checkpoint), *data, *words])).model.stride == stride_of(words)


@each_way
@resampled
def test_labeling_with_ray(checkpoint, clips, tmp_path, load_file, words, text):
    script = load_file(Path(__file__).parents[2] / "python" / "label_with_ray.py")
    args = script.parse([str(checkpoint), str(clips), "--output", str(tmp_path / "x.jsonl"), *words])
    assert text in script.describe_labels(script.open_model(args), args)["model"]


def test_an_official_checkpoint_keeps_its_stride(tmp_path, capsys):
    torch.manual_seed(0)
    model = pruneattn.create_model("ast_tiny", num_classes=3, frames=200, stride=10)  # 12 x 19 patches
    pruneattn.save_checkpoint(model, tmp_path / "official.pth", format="ast")
    words = [str(tmp_path / "official.pth"), str(tmp_path / "out"), "--format", "huggingface", "--model", "ast_tiny"]
    convert.main([*words, "--num-classes", "3", "--frames", "200"])
    assert "stride 10, 200 frames (228 patches)" in capsys.readouterr().out
    assert torch.equal(pruneattn.load_pretrained(tmp_path / "out").pos_embed, model.pos_embed)


@pytest.mark.parametrize("way", [evaluate, predict, export, convert])
def test_other_strides_are_errors(capsys, way):
    with pytest.raises(SystemExit, match="2"):
        way.main(["checkpoint", "other", "--stride", "20"])
    assert "argument --stride: expected a whole number from 1 to 16" in capsys.readouterr().err


def test_mean_and_std_of_a_folder_without_statistics(checkpoint, clips, tmp_path, capsys):
    (checkpoint / "preprocessor_config.json").unlink()
    words = [str(checkpoint), str(clips / "test" / "tone" / "1.wav"), "--output", str(tmp_path / "x.jsonl")]
    with pytest.raises(UserError, match=r"preprocessor_config.json: no such file.*\(--mean, --std\)"):
        predict.main(words)
    assert predict.main([*words, "--mean", "-11", "--std", "3"]) == 0
    assert (tmp_path / "x.jsonl").read_text().count("\n") == 1
