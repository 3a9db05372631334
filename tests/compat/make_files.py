"""Write ``tests/compat/files``: models, runs, labels and tables as pruneattn 0.1.0 saved them.

Version 0.1.0, git commit 73aa40e, wrote the committed files. ``test_old_files.py`` opens them with the current code. To
write them again, check that commit out, add this script, install the test requirements, and run from the root::

    python tests/compat/make_files.py

Newer code must not write these files: they would then test nothing. The script replaces the folder ``files``.
Weights and inputs come from integer arithmetic and do not depend on a random number generator. All paths inside the
files are relative to ``files``, which is the working directory of every command here.
"""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch

import pruneattn
from pruneattn.data import FeatureConfig
from pruneattn.data.toy import make_sound
from pruneattn.training.engine import Trainer

COMMIT = "73aa40e"
FILES = Path(__file__).resolve().with_name("files")
LABELS = ["buzz", "siren", "tone"]
AST_FILE, AUDIOMAE_FOLDER = "ast.safetensors", "audiomae"
INPUT_SCALE = 64  # input.npy holds int8 values; divided by this they are the normalized log-mel
SMALLEST_GAP = 2e-5  # between the scores of the last kept and the first dropped patch, a hundred times their error

_TINY = "--size tiny --num-heads 2 --frames 128 --drop-path 0 --warmup-epochs 1 --log-every 1 --no-tensorboard"
_SPEED = "--device cpu --seed 0"
_SOUNDS = "--dataset folder --data-dir sounds"
#: Options of pruneattn.train, each with the optimizer step that SIGTERM interrupts.
RUNS = {
    "run": (
        (
            f"--model audiomae {_TINY} {_SPEED} {_SOUNDS} --embed-dim 16 --depth 3 --prune-blocks 1 2 --batch-size 3 "
            "--lr-batch 3 --lr 0.02 --epochs 3 --keep-rate 0.5 --shrink-start 1 --shrink-epochs 1 --mean -11 --std 3"
        ),
        3,
    ),
    "toy-run": (
        (
            f"--model ast {_TINY} {_SPEED} --dataset toy --embed-dim 8 --depth 2 --prune-blocks 1 --batch-size 250 "
            "--epochs 2 --keep-rate 0.7 --shrink-start 1 --shrink-epochs 0 --score column_mean"
        ),
        15,
    ),
}
TABLE1 = "--rankings attention --keep-rates 0.5 --seeds 0 --output table1"
TABLE1_RUN = (
    f"--model ast {_TINY} --device cpu {_SOUNDS} --embed-dim 8 --depth 2 --prune-blocks 1 --batch-size 3 "
    "--lr-batch 3 --epochs 2 --shrink-start 1 --shrink-epochs 0 --mean -11 --std 3"
)
PREDICT = f"predict {AST_FILE} {{clips}} --output {{output}} --top-k 2 --batch-size 2 --device cpu"
LABEL_OPTIONS = {"labels.jsonl": "", "labels.parquet": "--windows"}
EVALUATE = f"evaluate {AST_FILE} {_SOUNDS} --keep-rate 1.0 0.7 0.5 --batch-size 2 --device cpu"
RATES = (1.0, 0.7, 0.5)


def main():
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    os.chdir(FILES)
    torch.manual_seed(0)
    write_sounds()
    fbank = write_input()
    models = write_models()
    for source, name, format_ in (
        (AST_FILE, "ast.pth", "ast"),
        (AST_FILE, "huggingface", "huggingface"),
        (AUDIOMAE_FOLDER, "audiomae.pth", "audiomae"),
        (AUDIOMAE_FOLDER, "timm", "timm"),
    ):
        Path("converted").mkdir(exist_ok=True)
        call("convert", source, f"converted/{name}", "--format", format_)
    expected = {
        "version": pruneattn.__version__,
        "commit": COMMIT,
        "input_scale": INPUT_SCALE,
        "models": {name: describe(model, fbank) for name, model in models.items()},
        "runs": {name: write_run(name, options, step, fbank) for name, (options, step) in RUNS.items()},
        "labels": {output: write_labels(output, options) for output, options in LABEL_OPTIONS.items()},
        "stats": call(*f"data stats {_SOUNDS}".split(), prints=True).strip(),
    }
    write_evaluation()
    run_script("clusters", *f"{AST_FILE} {_SOUNDS} --statistic intensity --output clusters --device cpu".split())
    keep_only("clusters", "clusters.json", "clusters.csv")
    expected["table1"] = write_table1()
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rounded(expected).items()]
    Path("expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def write_sounds():
    """Sounds of 0.4 s: six to train with, three to validate, four to test; and one file that is not a sound file."""
    number = 0
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        for i in range(count):
            kind = LABELS[i % len(LABELS)]
            folder = Path("sounds", split, kind)
            folder.mkdir(parents=True, exist_ok=True)
            wave = make_sound(kind, np.random.default_rng(number))[1600:8000]
            soundfile.write(folder / f"{number}.wav", wave, 16000, subtype="PCM_16")
            number += 1
    Path("sounds/test/tone/broken.wav").write_bytes(b"RIFF, but no sound file\n")


def whole_numbers(count, offset):
    """int64 ``[count]``, spread over 0 to 65536: the squares of consecutive numbers, scaled, modulo a prime."""
    i = torch.arange(count) + 1 + offset
    return (i * i * 31337 + i * 7919) % 65537


def write_input():
    """``input.npy``: int8 ``[2, 128, 128]``, noise whose level differs from patch to patch."""
    noise = whole_numbers(2 * 128 * 128, 5).view(2, 8, 16, 8, 16) * 2 - 65537
    level = whole_numbers(2 * 8 * 8, 11).view(2, 8, 1, 8, 1) % 12 + 1
    fbank = (noise * level * 10 // 65537).clamp(-127, 127).to(torch.int8).reshape(2, 128, 128)
    np.save("input.npy", fbank.numpy())
    return fbank.float() / INPUT_SCALE


def fill(model, offset):
    """Weights from integer arithmetic, scaled so that logits differ between classes and scores between patches."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed" and model.name.startswith("audiomae"):
                continue  # computed, not drawn
            unit = whole_numbers(parameter.numel(), offset).double() / 32768 - 1  # in [-1, 1]
            offset += parameter.numel() + 1000
            unit = unit.view(parameter.shape)
            if parameter.dim() == 1:
                parameter.copy_(0.1 * unit + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(unit * (3.0 if ".qkv." in name else 2.0) / fan_in**0.5)
    return model.eval()


def write_models():
    """One model of each family: a folder and a file, with everything that a model carries next to its weights."""
    audiomae = fill(
        pruneattn.create_model(
            "audiomae_tiny",
            num_classes=4,
            frames=128,
            keep_rate=0.6,
            prune_blocks=(1, 2),
            score="intensity",
            drop_path=0.1,
            embed_dim=24,
            depth=4,
            num_heads=3,
        ),
        offset=0,
    )
    pruneattn.save_pretrained(
        audiomae,
        AUDIOMAE_FOLDER,
        features=FeatureConfig(frames=128, mean=-7.5, std=4.25, padding="zero"),
        labels=["Speech", "Dog, bark", "Música", "Rain"],
        multilabel=True,
        extra={"metric": "map", "value": 0.25, "epoch": 3, "note": None},
    )
    ast = fill(
        pruneattn.create_model(
            "ast_tiny",
            num_classes=3,
            frames=128,
            keep_rate=(0.9, 0.5),
            prune_blocks=(1, 2),
            embed_dim=24,
            depth=4,
            num_heads=2,
        ),
        offset=34,
    )
    pruneattn.save_pretrained(
        ast,
        AST_FILE,
        features=FeatureConfig(frames=128, mean=-11.0, std=3.0, padding="min"),
        labels=LABELS,
        multilabel=False,
        extra={"dataset": "folder", "rates": [0.9, 0.5]},
    )
    return {"audiomae": pruneattn.load_pretrained(AUDIOMAE_FOLDER), "ast": pruneattn.load_pretrained(AST_FILE)}


def describe(model, fbank):
    """The description of a model, and the results that version 0.1.0 computes with it."""
    rates, by_rate = model.keep_rates, {}
    with torch.no_grad():
        for rate in RATES:
            model.set_keep_rate(rate)
            check_gaps(pruneattn.trace(model, fbank))
            by_rate[str(rate)] = model(fbank).tolist()
        model.set_keep_rate(rates)
        trace = pruneattn.trace(model, fbank)
        logits = model(fbank)
    check_gaps(trace)
    macs = pruneattn.count_macs(model)
    return {
        "config": model.config,
        "keep_rates": list(model.keep_rates),
        "features": model.features.to_dict(),
        "labels": model.labels,
        "multilabel": model.multilabel,
        "extra": model.extra,
        "logits": logits.tolist(),
        "logits_at": by_rate,
        "kept": [one.tolist() for one in trace.kept],
        "scores": [[row[:4] for row in one.tolist()] for one in trace.scores],
        "macs": {"paper": macs.paper, "computed": macs.computed, "blocks": macs.blocks},
    }


def check_gaps(trace):
    """Rounding on another CPU must not change which patches a model keeps."""
    for kept, scores in zip(trace.kept, trace.scores, strict=True):
        ordered, keep = scores.sort(descending=True).values, kept.shape[1]
        if keep < scores.shape[1] and (ordered[:, keep - 1] - ordered[:, keep]).min() < SMALLEST_GAP:
            raise RuntimeError("two scores at the cut are nearly equal: give fill() another offset")


def write_run(name, options, step, fbank):
    """Write a run that SIGTERM interrupts in this optimizer step. Return the results of the uninterrupted run."""
    with tempfile.TemporaryDirectory() as folder:
        call("train", *options.split(), "--output", f"{folder}/{name}")
        whole = Path(folder, name)
        model = pruneattn.load_pretrained(whole)
        with torch.no_grad():
            logits = model(fbank).tolist()
        lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
        expected = {
            "options": options,
            "losses": [line["loss"] for line in lines if line["kind"] == "step"],
            "result": json.loads((whole / "result.json").read_text()),
            "logits": logits,
        }
    original = Trainer.train_step

    def train_step(self, batches):
        if self.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batches)

    Trainer.train_step = train_step
    try:
        call("train", *options.split(), "--output", name, code=128 + signal.SIGTERM)
    finally:
        Trainer.train_step = original
    return expected


def write_labels(output, options):
    """Write labels of two of four clips, and one clip that failed. Return the rows of the complete labels."""

    def predict(*clips, to):
        call(*PREDICT.format(clips=" ".join(clips), output=to).split(), *options.split())

    def rows(path):
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().splitlines()]
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()

    predict("sounds/test/buzz", "sounds/test/tone/broken.wav", to=output)
    with tempfile.TemporaryDirectory() as folder:
        complete = Path(folder, output)
        predict("sounds/test", to=complete)
        return {"options": options, "rows": rows(complete), "labeled": [row["path"] for row in rows(Path(output))]}


def write_evaluation():
    call(*EVALUATE.split(), "--rounds", "2", "--output", "evaluation")
    Path("evaluation/tradeoff.png").unlink()


def write_table1():
    """Table I after its first run of two: SIGTERM stops the second run before its first step."""
    original = Trainer.run

    def run(self):
        if "attention" in str(self.folder):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Trainer.run = run
    try:
        run_script("table1", *TABLE1.split(), "--", *TABLE1_RUN.split(), code=128 + signal.SIGTERM)
    finally:
        Trainer.run = original
    for name in ("table1.png", "table1.pdf", "table1.csv", "table1.md"):
        Path("table1", name).unlink()
    for lock in Path("table1").glob(".*.lock"):
        lock.unlink()
    return {"options": f"{TABLE1} -- {TABLE1_RUN}"}


def keep_only(folder, *names):
    for path in Path(folder).iterdir():
        if path.name not in names:
            path.unlink()


def call(command, *arguments, code=0, prints=False):
    """``python -m pruneattn.COMMAND`` in this process. Paths in ``config.json`` do not depend on the checkout."""
    module = f"pruneattn.{command}"
    arguments = list(map(str, arguments))
    return run(
        f"pruneattn/{command}.py", arguments, code, prints, lambda: runpy.run_module(module, run_name="__main__")
    )


def run_script(name, *arguments, code=0):
    """``python python/NAME.py`` in this process."""
    script = runpy.run_path(str(FILES.parents[2] / "python" / f"{name}.py"), run_name=name)
    return run(f"python/{name}.py", arguments, code, False, lambda: sys.exit(script["main"](list(arguments))))


def run(name, arguments, code, prints, program):
    before, output = sys.argv, io.StringIO()
    sys.argv = [name, *arguments]
    try:
        with contextlib.redirect_stdout(output if prints else sys.stdout):
            program()
        left = 0
    except SystemExit as exit_:
        left = exit_.code or 0
    finally:
        sys.argv = before
    if left != code:
        raise RuntimeError(f"{name} {' '.join(arguments)}: exit code {left}, expected {code}")
    return output.getvalue()


def rounded(value):
    """Floats with 7 significant digits, as many as float32 has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
