"""``--amp int8`` and ``--calibrate``: 8-bit weights in the commands."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import pruneattn
from pruneattn import evaluate, predict
from pruneattn.data import FeatureConfig, FeatureExtractor, load_audio
from pruneattn.data.toy import make_sound
from pruneattn.errors import UserError
from pruneattn.models import quantize
from pruneattn.models.packed import Int8Linear
from pruneattn.runtime import inference, timing
from pruneattn.runtime.inference import autocast, can_optimize, optimized

LABELS = ["buzz", "siren", "tone"]
FEATURES = FeatureConfig(frames=128, mean=-11.0, std=3.0)
needs_int8 = pytest.mark.skipif(bool(quantize.why_not_int8()), reason="8-bit weights are slow on this machine")


def make_model():
    torch.manual_seed(1)
    model = pruneattn.create_model(
        "ast_tiny", num_classes=3, frames=128, embed_dim=48, depth=2, num_heads=3, prune_blocks=(1,), keep_rate=0.5
    )
    torch.nn.init.normal_(model.head.weight, std=1.0)
    return model.eval()


def save(model, path):
    pruneattn.save_pretrained(model, path, features=FEATURES, labels=LABELS, multilabel=False)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return save(make_model(), tmp_path / "best.safetensors")


@pytest.fixture
def clips(tmp_path):
    """A dataset of six clips in each split."""
    for number, label in enumerate(LABELS * 4):
        folder = tmp_path / "clips" / ("train" if number < 6 else "test") / label
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{number}.wav", make_sound(label, np.random.default_rng(number)), 16000)
    return tmp_path / "clips"


def run(checkpoint, clips, output, *options):
    command = [checkpoint, "--dataset", "folder", "--data-dir", clips, "--output", output, "--device", "cpu", *options]
    assert evaluate.main([str(word) for word in command]) == 0
    return json.loads((output / "table.json").read_text())


def fbank(paths):
    return torch.cat([FeatureExtractor(FEATURES)(load_audio(path)[None]) for path in paths])


@needs_int8
def test_evaluate(checkpoint, clips, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "predict_dataset", lambda *a: seen.append(inference.predict_dataset(*a)) or seen[-1])
    table = run(checkpoint, clips, tmp_path / "out", "--amp", "int8", "--keep-rates", 1, 0.5, "--rounds", 1)
    fast = pruneattn.optimize_for_inference(make_model(), torch.int8)
    assert table["amp"] == "int8" and table["quantization"] == str(fast.quantization)
    assert "output" not in table["quantization"] and str(fast.quantization) in capsys.readouterr().out
    paths = sorted((clips / "test").rglob("*.wav"))
    for number, keep_rate in enumerate((1.0, 0.5)):
        fast.set_keep_rate(keep_rate)
        given = seen[0].logits[:, number]
        torch.testing.assert_close(given, fast(fbank(paths)).float(), rtol=0.05, atol=0.05)
    assert table["rows"][1]["clips_per_second"] > 0


@needs_int8
@pytest.mark.parametrize("count", [2, 99])
def test_evaluate_calibrates_on_the_training_split(checkpoint, clips, tmp_path, monkeypatch, count):
    seen = []
    original = evaluate.optimized
    monkeypatch.setattr(evaluate, "optimized", lambda *a: seen.append(copy.deepcopy(a[3:])) or original(*a))
    options = ("--amp", "int8", "--calibrate", count, "--batch-size", 4, "--rounds", 0)
    table = run(checkpoint, clips, tmp_path / "out", *options)
    batches = seen[0][0]
    paths = sorted((clips / "train").rglob("*.wav"))
    expected = fbank(paths if count > 6 else [paths[0], paths[3]])
    assert [len(batch) for batch in batches] == ([4, 2] if count > 6 else [2])
    torch.testing.assert_close(torch.cat(batches), expected)
    model = make_model()
    with torch.no_grad():
        model.blocks[0].norm2.bias[3] = 1e3
        model.blocks[0].mlp.fc1.weight[:, 3] = 0
    table = run(save(model, checkpoint), clips, tmp_path / "other", *options)
    assert "blocks.0.mlp.fc1 stays in" in table["quantization"] and "its output" in table["quantization"]


def test_rejected_options(checkpoint, clips, tmp_path):
    with pytest.raises(UserError, match="--calibrate 3 applies only with --amp int8"):
        run(checkpoint, clips, tmp_path / "out", "--calibrate", 3)
    with pytest.raises(UserError, match="--calibrate -1: must be at least 0"):
        run(checkpoint, clips, tmp_path / "out", "--amp", "int8", "--calibrate", -1)
    for call in (can_optimize, lambda device, amp: optimized(make_model(), device, amp)):
        with pytest.raises(UserError, match=r"--amp\) int8: 8-bit weights need a CPU, but the device is cuda:0"):
            call("cuda:0", "int8")


def test_ray_rejects_8_bits_on_gpus(load_file, checkpoint, tmp_path):
    script = load_file(Path(__file__).parents[2] / "python" / "label_with_ray.py")
    words = [str(checkpoint), "x.wav", "--output", str(tmp_path / "x.jsonl"), "--amp", "int8"]
    assert script.parse(words).amp == "int8"
    with pytest.raises(UserError, match="8-bit weights need a CPU, but the device is cuda"):
        script.parse([*words, "--gpus", "0.5"])


@needs_int8
def test_predict(checkpoint, clips, tmp_path, capsys):
    clip, output = next(clips.rglob("*.wav")), tmp_path / "labels.jsonl"
    command = [str(checkpoint), str(clip), "--device", "cpu", "--output"]
    assert predict.main([*command, str(output), "--amp", "int8"]) == 0
    printed = capsys.readouterr()
    fast = pruneattn.optimize_for_inference(make_model(), torch.int8)
    assert str(fast.quantization) in printed.err and printed.out == ""
    scores = fast(fbank([clip]))[0].float().softmax(-1).sort(descending=True).values
    assert json.loads(output.read_text())["scores"] == pytest.approx(scores.tolist(), abs=1e-6)
    with pytest.raises(UserError, match="made with other settings.*amp: "):
        predict.main([*command, str(output)])
    assert predict.main([*command, str(output), "--amp", "int8"]) == 0


@needs_int8
def test_a_checkpoint_with_8_bits(clips, tmp_path, capsys):
    fast = pruneattn.optimize_for_inference(make_model(), torch.int8)
    checkpoint = save(fast, tmp_path / "best.safetensors")
    table = run(checkpoint, clips, tmp_path / "out", "--amp", "int8", "--keep-rates", 1, 0.5, "--rounds", 1)
    assert table["quantization"] == str(fast.quantization) and table["rows"][0]["clips_per_second"] > 0
    clip = next(clips.rglob("*.wav"))
    assert predict.main([str(checkpoint), str(clip), "--amp", "int8", "--device", "cpu", "--output", "-"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["scores"][0] == pytest.approx(float(fast(fbank([clip])).float().softmax(-1).max()), abs=1e-6)
    for call in (
        lambda: run(checkpoint, clips, tmp_path / "out"),
        lambda: predict.main([str(checkpoint), str(clip), "--device", "cpu"]),
    ):
        with pytest.raises(
            UserError, match=r"--amp\) fp32: the checkpoint has 8-bit weights, which run with int8 only"
        ):
            call()


@needs_int8
def test_speed_is_measured_with_8_bits(monkeypatch):
    layers = {}

    def fake(variants, device, rounds):
        for name, function in variants.items():
            with torch.profiler.profile() as profiler:
                function()
            layers[name] = {event.key: event.count for event in profiler.key_averages()}.get(
                "pruneattn::int8_linear", 0
            )
        return {name: [1.0] for name in variants}

    monkeypatch.setattr(timing, "interleaved_rounds", fake)
    model = make_model()
    timing.measure_speed(model, [0.5], "cpu", amp="int8", batch_size=2)
    assert layers == {(1.0, "optimized"): 9, (0.5, "optimized"): 10, (1.0, "eager, SDPA"): 0}
    assert not model.optimized


@needs_int8
def test_the_form_for_a_cpu():
    with autocast("cpu", "int8"):
        assert not torch.is_autocast_enabled("cpu")
    fast, amp = optimized(make_model(), "cpu", "int8", [torch.randn(2, 128, 128)])
    assert amp == "fp32" and sum(isinstance(module, Int8Linear) for module in fast.modules()) == 9
    assert {error.of for error in fast.quantization.errors} == {"output"}
    assert optimized(fast, "cpu", "int8") == (fast, "fp32")


def test_machines_on_which_8_bits_are_slow(checkpoint, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "why_not_int8", lambda: "it has no instructions")
    with pytest.warns(UserWarning, match="slower on this machine: it has no instructions") as caught:
        table = run(checkpoint, clips, tmp_path / "out", "--amp", "int8", "--keep-rates", 1, "--rounds", 1)
    assert table["quantization"] is None and len([w for w in caught if "slower on" in str(w.message)]) == 1
