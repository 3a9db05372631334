import dataclasses

import pytest

from pruneattn.data import DATASETS
from pruneattn.data.augment import Augment
from pruneattn.errors import UserError
from pruneattn.training.options import Options, describe, differences, parse
from pruneattn.training.recipes import RECIPES, Recipe

# The paper's tables, column by column: epochs, shrink start, shrink epochs, effective batch, peak lr, frames, masking,
# SpecAugment frequency, time, mixup, gain, noise, loss, metric.
PAPER = {
    ("audiomae", "as20k"): (60, 30, 20, 32, 1.25e-4, 1024, 0.3, 48, 192, 0.5, True, False, "bce", "map"),
    ("audiomae", "spc2"): (90, 10, 30, 512, 2e-3, 128, 0, 48, 48, 0.5, True, True, "bce", "top1"),
    ("audiomae", "esc50"): (120, 20, 40, 128, 5e-4, 512, 0.3, 24, 96, 0, True, False, "ce", "top1"),
    ("audiomae", "voxceleb1"): (90, 20, 40, 64, 2.5e-4, 1024, 0, 48, 192, 0, False, True, "ce", "top1"),
    ("ast", "as20k"): (30, 15, 10, 64, 1e-4, 1024, 0, 48, 192, 0.5, False, False, "bce", "map"),
    ("ast", "spc2"): (30, 5, 15, 128, 2.5e-4, 128, 0, 48, 48, 0.6, False, True, "bce", "top1"),
    ("ast", "esc50"): (30, 5, 15, 48, 1e-5, 512, 0, 24, 96, 0, False, False, "ce", "top1"),
}


def test_recipes_equal_those_of_the_paper():
    assert RECIPES.keys() == PAPER.keys()
    for pair, r in RECIPES.items():
        peak = round(r.lr * r.batch_size / r.lr_batch, 12)
        got = (
            r.epochs,
            r.shrink_start,
            r.shrink_epochs,
            r.batch_size,
            peak,
            r.frames,
            r.mask_time,
            r.specaug_freq,
            r.specaug_time,
            r.mixup,
            r.gain,
            r.noise,
            r.loss,
            r.metric,
        )
        assert got == PAPER[pair], pair
        assert (r.mask_freq, r.mask_1d, r.padding, r.keep_rate, r.clip_grad) == (r.mask_time, 0, "min", (1.0,), 0), pair
        assert r.prune_blocks == (3, 6, 9) and r.score is None
        assert r.frames == DATASETS[pair[1]].frames


def test_optimizers_equal_those_of_the_paper():
    for (model, dataset), r in RECIPES.items():
        if model == "audiomae":
            got = (r.optimizer, r.betas, r.weight_decay, r.layer_decay, r.drop_path, r.schedule, r.warmup_epochs)
            assert got == ("adamw", (0.9, 0.95), 1e-4, 0.75, 0.1, "cosine", 4)
            assert (r.min_lr, r.warmup_steps) == (1e-5, 0)
        else:
            got = (r.optimizer, r.betas, r.weight_decay, r.layer_decay, r.drop_path, r.schedule, r.warmup_epochs)
            assert got == ("adam", (0.95, 0.999), 5e-7, 1.0, 0.0, "step", 0)
            steps = (r.lr_step_first, r.lr_step_every, r.lr_step_factor, r.warmup_steps)
            assert steps == ((10, 5, 0.5, 1000) if dataset == "as20k" else (5, 1, 0.85, 0))


def test_every_field_is_an_option():
    options, recipe = parse(["--model", "ast", "--dataset", "esc50"])
    assert recipe == RECIPES["ast", "esc50"] and (options.model, options.size) == ("ast", "base")
    assert options.output == "runs/ast_base_esc50"
    given = "--keep-rate 0.5 0.6 0.7 --betas 0.8 0.9 --no-gain --noise --frames 256 --mean -5 --score cls --epochs 40"
    _, recipe = parse(["--model", "ast", "--dataset", "esc50", *given.split()])
    assert recipe == dataclasses.replace(
        RECIPES["ast", "esc50"],
        keep_rate=(0.5, 0.6, 0.7),
        betas=(0.8, 0.9),
        gain=False,
        noise=True,
        frames=256,
        mean=-5.0,
        score="cls",
        epochs=40,
    )
    assert parse(["--dataset", "toy"])[1] == Recipe()
    assert {f.name for f in dataclasses.fields(Augment)} <= {f.name for f in dataclasses.fields(Recipe)}


@pytest.mark.parametrize(("words", "stride"), [("", None), ("--stride 10", (10, 10)), ("--stride=10,16", (10, 16))])
def test_a_stride_is_one_number_or_two(words, stride):
    assert parse(["--model", "ast", "--frames", "100", *words.split()])[0].stride == stride


@pytest.mark.parametrize("value", ["17", "0", "10,16,10", "ten", "10,", ""])
def test_other_strides_are_errors(capsys, value):
    with pytest.raises(SystemExit, match="2"):
        parse(["--stride", value])
    message = (
        f"argument --stride: expected a whole number from 1 to 16, or two (frequency, time) as 10,16, got {value!r}"
    )
    assert message in capsys.readouterr().err


def test_every_pruning_block_has_a_keep_rate():
    assert Recipe(keep_rate=(0.5,)).keep_rates == (0.5, 0.5, 0.5)
    assert Recipe(keep_rate=(0.5, 0.6, 0.7)).keep_rates == (0.5, 0.6, 0.7)


def test_help_shows_the_recipe(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--model", "audiomae", "--dataset", "spc2", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in (*dataclasses.fields(Options), *dataclasses.fields(Recipe)):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "(the effective batch) (default: 512)" in text and "(default: 0.9 0.95)" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--keep-rate 0", "--keep-rate must be above 0 and at most 1, got 0.0"),
        ("--keep-rate 1.5", "--keep-rate must be above 0"),
        ("--keep-rate nan", "--keep-rate must be above 0"),
        ("--keep-rate 0.5 0.5", r"one per pruning block \(3\), got 2"),
        ("--keep-rate 0.5 --epochs 20", "reaches 0.5 only in epoch 28 .* the run ends with epoch 19"),
        ("--epochs 0", "--epochs must be at least 1"),
        ("--frames 15", "--frames must be at least 16, got 15"),
        ("--lr -1", "--lr must be at least 0 and finite, got -1.0"),
        ("--std 0", "--std must be above 0 and finite, got 0.0"),
        ("--std nan", "--std must be above 0"),
        ("--mean inf", "--mean must be finite, got inf"),
        ("--betas 1.5 0.9", r"--betas must be at least 0 and below 1, got 1\.5 0\.9"),
        ("--warmup-epochs inf", "--warmup-epochs must be at least 0 and finite, got inf"),
        ("--seed 99999999999999999999999", r"--seed must be at least 0 and below 2\*\*63, got 9"),
        ("--weight-decay -1", "--weight-decay must be at least 0"),
        ("--layer-decay -1", "--layer-decay must be at least 0"),
        ("--lr-step-factor -1", "--lr-step-factor must be at least 0"),
        ("--save-minutes nan", "--save-minutes must be at least 0"),
        ("--shrink-start -1", "--shrink-start must be at least 0, got -1"),
        ("--resume run --branch-from x.pt", "use one of them"),
    ],
)
def test_invalid_values_are_rejected(given, message):
    with pytest.raises(UserError, match=message):
        parse(given.split())


def test_differences_ignore_where_a_run_computes():
    commands = ("--output a --workers 1", "--output b --seed 3 --keep-rate 0.5")
    old, new = (describe(*parse(command.split())) for command in commands)
    assert differences(old, new) == ["seed: 0 -> 3", "keep_rate: [1.0] -> [0.5]"]


def test_a_run_keeps_its_stride_unless_another_is_given():
    """Checkpoints of the first versions have no stride: it was 16."""
    for old, given, expected in (
        ({}, None, []),
        ({}, [16, 16], []),
        ({}, [10, 10], ["stride: [16, 16] -> [10, 10]"]),
        ({"stride": [10, 10]}, None, []),
        ({"stride": [10, 10]}, [16, 16], ["stride: [10, 10] -> [16, 16]"]),
    ):
        assert differences(old, {"stride": given}) == expected


def test_differences_of_long_lists_are_short():
    labels = [f"label {number}" for number in range(527)]
    other = [*labels[:400], "another", *labels[401:]]
    assert differences({"labels": labels}, {"labels": other}) == ["labels: label 400 -> another"]
    assert differences({"labels": labels}, {"labels": labels[:-1]}) == ["labels: label 526 -> None"]
