"""Predictions for a whole dataset."""

import pytest
import torch

from pruneattn import UserError
from pruneattn.data import FeatureConfig, FeatureExtractor
from pruneattn.data.loader import Batch
from pruneattn.metrics import evaluate_predictions
from pruneattn.runtime import distributed
from pruneattn.runtime.inference import autocast, can_optimize, evaluate_model, optimized, predict_dataset

CLIPS, CLASSES = 7, 5


@pytest.fixture
def model(make_model):
    return make_model("audiomae", depth=2, prune_blocks=(1,), keep_rate=0.5)


@pytest.fixture
def features(model):
    return FeatureExtractor(FeatureConfig(model.frames, -4.0, 4.0))


@pytest.fixture
def batches():
    """``batches(*parts, failed)``: a loader's batches of clips by their numbers; clip 3 fails if it is in one."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(CLIPS, 20000, generator=generator)
    targets = torch.eye(CLASSES)[torch.arange(CLIPS) % CLASSES]

    def make(*parts):
        for part in parts:
            good = torch.tensor([clip for clip in part if clip != 3], dtype=torch.int64)
            failed = [("3.wav", "the file is empty")] if 3 in part else []
            yield Batch(waves[good], torch.full((len(good),), 20000), targets[good], good, failed)

    return make


def test_predictions_are_in_order_and_the_mode_is_restored(model, features, batches):
    model.train()
    whole = predict_dataset(model, features, batches(range(CLIPS)), "cpu")
    assert model.training and not model.eval().training
    assert whole.index.tolist() == [0, 1, 2, 4, 5, 6] and whole.failed == [("3.wav", "the file is empty")]
    assert whole.targets.argmax(1).tolist() == [0, 1, 2, 4, 0, 1]
    parts = predict_dataset(model, features, batches([4, 6, 1], [3], [5, 0, 2]), "cpu")
    assert not model.training and parts.index.tolist() == whole.index.tolist() and parts.failed == whole.failed
    torch.testing.assert_close(parts.logits, whole.logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        batch = next(batches([5]))
        expected = model(features(batch.waves, batch.lengths))
    torch.testing.assert_close(whole.logits[4:5], expected, rtol=1e-4, atol=1e-5)


def test_every_process_gets_the_clips_of_all(model, features, batches, monkeypatch):
    whole = predict_dataset(model, features, batches(range(CLIPS)), "cpu")
    parts = []
    monkeypatch.setattr(distributed, "gather_objects", lambda part: parts.append(part) or [part])
    for clips in ([0, 2, 4, 6], [1, 3, 5], [3]):  # a process can have no clip that can be decoded
        try:
            predict_dataset(model, features, batches(clips), "cpu")
        except UserError:
            assert clips == [3]
    monkeypatch.setattr(distributed, "gather_objects", lambda part: parts)
    gathered = predict_dataset(model, features, batches([3]), "cpu")
    assert gathered.index.tolist() == whole.index.tolist() and gathered.failed == whole.failed
    torch.testing.assert_close(gathered.logits, whole.logits, rtol=1e-4, atol=1e-5)


def test_a_dataset_without_a_decodable_clip_is_an_error(model, features, batches):
    message = "no clip of the dataset could be decoded; the first, 3.wav: the file is empty"
    with pytest.raises(UserError, match=message):
        predict_dataset(model, features, batches([3]), "cpu")
    with pytest.raises(UserError, match="no clip of the dataset could be decoded$"):
        predict_dataset(model, features, [], "cpu")


def test_metrics_of_a_dataset(model, features, batches):
    for multilabel in (False, True):
        predictions = predict_dataset(model, features, batches(range(CLIPS)), "cpu")
        metrics, failed = evaluate_model(
            model, features, batches([0, 1], [2, 3, 4, 5, 6]), "cpu", multilabel=multilabel
        )
        expected = evaluate_predictions(predictions.logits, predictions.targets, multilabel)
        assert metrics["map"] == pytest.approx(expected["map"]) and metrics["top1"] == expected["top1"]
        assert failed == predictions.failed


def test_precision_of_the_model(model, features, batches):
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    full = predict_dataset(model, features, batches(range(3)), "cpu").logits
    half = predict_dataset(model, features, batches(range(3)), "cpu", "bf16").logits
    assert seen == [torch.float32, torch.bfloat16]
    assert full.dtype == half.dtype == torch.float32
    with autocast("cpu", "bf16"):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    with autocast("cpu", "fp32"):
        assert not torch.is_autocast_enabled("cpu")


def test_fastest_form_on_a_cpu(model):
    assert can_optimize("cpu", "fp32") and can_optimize("cpu", "bf16")
    assert not can_optimize("cpu", "fp16") and not can_optimize("cuda:0", "fp32")
    same, amp = optimized(model, "cpu", "fp16")
    assert same is model and amp == "fp16" and not model.optimized
    half, amp = optimized(model, "cpu", "bf16")
    assert amp == "fp32" and half.optimized and half.head.weight.dtype == torch.bfloat16
