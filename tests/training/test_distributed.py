"""Two processes train like one process with the same batch."""

import json
from pathlib import Path

import pytest
import torch


@pytest.fixture
def in_two_processes(load_file):
    return load_file(Path(__file__).parents[1] / "runtime" / "processes.py").in_two_processes


@pytest.mark.slow
def test_two_gloo_processes_equal_one(train, plain, in_two_processes):
    arguments = [*train.arguments("two", *train.plain), "--accumulate", "2", "--device", "cpu"]
    outputs = in_two_processes("-m", "pruneattn.train", *arguments)
    assert "epoch 4/4" in outputs[0] and outputs[1] == ""

    two = train.root / "two"
    for left, right in zip(train.log(plain), train.log(two), strict=True):
        assert left.keys() == right.keys()
        for key in ("loss", "lr", "train_loss", "val_loss", "map", "top1"):
            if key in left:
                assert left[key] == pytest.approx(right[key], rel=1e-5, abs=1e-9), (key, left)
    left, right = train.state(plain)["model"], train.state(two)["model"]
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=2e-5, msg=name)
    # Two processes evaluate nine test clips, each of them once.
    results = [json.loads((run / "result.json").read_text()) for run in (plain, two)]
    assert results[0]["test"]["top1"] == results[1]["test"]["top1"]
