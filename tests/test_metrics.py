import math

import numpy as np
import pytest
import torch

from pruneattn.errors import UserError
from pruneattn.metrics import average_precision, evaluate_predictions, roc_auc


def test_small_cases_computed_by_hand():
    # Clips ranked for class 0: correct, wrong, correct -> AP (1 + 2/3) / 2, AUC 1/2. Class 1 is the mirror image.
    scores = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    targets = np.array([[1, 0], [0, 1], [1, 0]], dtype=bool)
    assert average_precision(scores, targets) == pytest.approx([5 / 6, 1 / 2])
    assert roc_auc(scores, targets) == pytest.approx([1 / 2, 1 / 2])
    result = evaluate_predictions(scores, targets, multilabel=False)
    assert result["map"] == pytest.approx(2 / 3)
    assert result["mauc"] == pytest.approx(0.5) and result["dprime"] == pytest.approx(0.0, abs=1e-12)
    # Class 0 wins the tie of clip 1, which is wrong. Clip 2 is wrong without a tie.
    assert result["top1"] == pytest.approx(1 / 3)
    assert result["top5"] == 1.0  # only two classes
    assert [row["recall"] for row in result["per_class"]] == [0.5, 0.0]
    assert [row["precision"] for row in result["per_class"]] == [0.5, 0.0]
    assert [row["positives"] for row in result["per_class"]] == [2, 1]


@pytest.mark.parametrize("levels", [3, 20, None], ids=["many ties", "ties", "no ties"])
def test_equals_scikit_learn(levels):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    clips, classes = 200, 70  # more classes than are ranked at once
    logits = rng.normal(size=(clips, classes)).astype(np.float32)
    if levels:
        logits = np.round(logits * levels / 4) / levels
    targets = rng.random((clips, classes)) < 0.1
    targets[:, 5] = False  # no positives
    targets[:, 66] = True  # no negatives
    with_positive = [k for k in range(classes) if k != 5]
    with_both = [k for k in with_positive if k != 66]
    result = evaluate_predictions(torch.tensor(logits), torch.tensor(targets).float(), multilabel=True)
    ap = [metrics.average_precision_score(targets[:, k], logits[:, k]) for k in with_positive]
    auc = [metrics.roc_auc_score(targets[:, k], logits[:, k]) for k in with_both]
    rows = result["per_class"]
    assert [rows[k]["ap"] for k in with_positive] == pytest.approx(ap, abs=1e-12)
    assert [rows[k]["auc"] for k in with_both] == pytest.approx(auc, abs=1e-12)
    assert math.isnan(rows[5]["ap"]) and math.isnan(rows[5]["auc"]) and math.isnan(rows[5]["recall"])
    assert rows[66]["ap"] == 1.0 and math.isnan(rows[66]["auc"])
    assert result["map"] == pytest.approx(np.mean(ap)) and result["mauc"] == pytest.approx(np.mean(auc))
    special = pytest.importorskip("scipy.special")
    assert result["dprime"] == pytest.approx(math.sqrt(2) * special.ndtri(np.mean(auc)))
    k = with_both[0]
    assert rows[k]["recall"] == pytest.approx(metrics.recall_score(targets[:, k], logits[:, k] > 0))
    assert rows[k]["precision"] == pytest.approx(metrics.precision_score(targets[:, k], logits[:, k] > 0))


def test_one_label_per_clip():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(300, 12)), rng.integers(0, 12, 300)
    result = evaluate_predictions(logits, np.eye(12)[labels], multilabel=False)
    assert result["top1"] == pytest.approx(metrics.accuracy_score(labels, logits.argmax(1)))
    assert result["top5"] == pytest.approx(metrics.top_k_accuracy_score(labels, logits, k=5))
    # Ranked by probability, because raw outputs of different clips have no common scale.
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = metrics.average_precision_score(np.eye(12)[labels], probability, average="macro")
    assert result["map"] == pytest.approx(expected)
    shifted = evaluate_predictions(logits + rng.normal(size=(300, 1)), np.eye(12)[labels], multilabel=False)
    assert shifted["map"] == pytest.approx(result["map"]) and shifted["mauc"] == pytest.approx(result["mauc"])
    recall = metrics.recall_score(labels, logits.argmax(1), average=None)
    assert [row["recall"] for row in result["per_class"]] == pytest.approx(recall)


def test_extremes():
    perfect = evaluate_predictions(np.eye(3) * 9, np.eye(3), multilabel=False)
    assert (perfect["map"], perfect["mauc"], perfect["top1"]) == (1.0, 1.0, 1.0) and perfect["dprime"] == math.inf
    # Saturated outputs must not become ties: sigmoid(40) == sigmoid(50) in float32.
    saturated = evaluate_predictions(torch.tensor([[40.0], [50.0]]), [[0], [1]], multilabel=True)
    assert saturated["map"] == 1.0
    half = evaluate_predictions(torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.bfloat16), [[0, 1], [1, 0]], True)
    assert half["map"] == 1.0


def test_invalid_predictions_are_errors():
    with pytest.raises(UserError, match="1 of 2 clips got outputs that are not finite"):
        evaluate_predictions([[1.0, math.nan], [1.0, 2.0]], [[1, 0], [0, 1]], False)
    with pytest.raises(UserError, match="no clip could be scored"):
        evaluate_predictions(np.zeros((0, 3)), np.zeros((0, 3)), False)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        evaluate_predictions(np.zeros((4, 3)), np.zeros((4, 2)), False)
