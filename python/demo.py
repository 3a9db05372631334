"""Training, evaluation and prediction in a few minutes on two cores, with synthetic sounds: ``make demo``.

The demo trains a small AudioMAE on the synthetic dataset ``toy`` while its keep-rate falls from 1 to 0.7, evaluates it
at keep-rates 1.0 to 0.4, predicts one clip and draws the patches that pruning keeps of it. All files are in ``demo/``.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import soundfile

from pruneattn.constants import SAMPLE_RATE
from pruneattn.data import load_dataset

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
KEEP_RATE = 0.7
NEEDED = 0.90  # lowest test accuracy at KEEP_RATE with which the demo succeeds

MODEL = "--model audiomae --size tiny --depth 4 --prune-blocks 1 2 3"
RECIPE = (
    f"--keep-rate {KEEP_RATE} --shrink-start 3 --shrink-epochs 3 --epochs 7 --warmup-epochs 0.5 --batch-size 32 "
    "--lr 1e-3 --lr-batch 32 --drop-path 0 --mixup 0 --specaug-freq 0 --specaug-time 0 --no-gain --no-noise"
)


def main():
    start = time.perf_counter()
    # Results of an earlier demo. Training does not overwrite a run.
    for name in ("run", "evaluation"):
        shutil.rmtree(DEMO / name, ignore_errors=True)
    DEMO.mkdir(exist_ok=True)

    run("train", f"--dataset toy {MODEL} {RECIPE} --cache --output demo/run")
    run("evaluate", "demo/run --dataset toy --output demo/evaluation --batch-size 64")
    clip = write_clip(DEMO / "siren.wav", "siren")
    run("predict", f"demo/run demo/{clip.name} --top-k 3 --plot demo/siren.png")

    rows = json.loads((DEMO / "evaluation" / "table.json").read_text())["rows"]
    accuracy = {row["keep_rate"]: row["top1"] for row in rows}
    good = accuracy[KEEP_RATE] >= NEEDED
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Test accuracy at keep-rate {KEEP_RATE}: "
        f"{accuracy[KEEP_RATE]:.1%}, unpruned {accuracy[1.0]:.1%}.\n"
        f"  demo/run/                  the trained model, its configuration and log\n"
        f"  demo/evaluation/table.md   accuracy, MACs and speed by keep-rate; also table.csv, .json and tradeoff.png\n"
        f"  demo/siren.png             the patches that each pruning stage keeps of demo/siren.wav"
    )
    if not good:
        print(f"This is below the expected {NEEDED:.0%}.", file=sys.stderr)
    return 0 if good else 1


def run(command, options):
    """Run a command of pruneattn as in a shell."""
    print(f"\n$ pruneattn {command} {options}", flush=True)
    done = subprocess.run([sys.executable, "-m", "pruneattn", command, *options.split()], cwd=ROOT)
    if done.returncode:
        sys.exit(f"pruneattn {command} failed with exit code {done.returncode}")


def write_clip(path, label):
    """Save the first test clip of a class as a sound file."""
    dataset = load_dataset("toy", "test")
    number = next(i for i, clip in enumerate(dataset.clips) if dataset.labels[clip.labels[0]] == label)
    soundfile.write(path, dataset[number]["wave"].numpy(), SAMPLE_RATE)
    return path


if __name__ == "__main__":
    sys.exit(main())
