"""``python -m pruneattn.predict``: labels of sound files of any length, and pictures of what pruning keeps of them."""

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import UserError, run_command
from .inference import autocast
from .io import atomic_write
from .opening import add_checkpoint_options, describe, open_checkpoint
from .plot import check_plot_path, plot_kept_patches, save_figure
from .training import distributed


@dataclass
class Clip:
    """A sound file and what the model says about it."""

    path: Path
    wave: torch.Tensor | None  # float32 [L] at 16 kHz; given up once it is not needed any more
    samples: int
    starts: list  # first sample of each window
    scores: list = field(default_factory=list)  # float32 [K] per window

    @property
    def mean_scores(self):
        return torch.stack(self.scores).mean(0)  # [K]


def main(argv=None):
    """Predict as the command line says; returns the exit code: 1 if nothing could be predicted."""
    args = _parse(argv)
    device = distributed.start(args.device)
    model = open_checkpoint(args, args.dataset).to(device)
    if args.keep_rate is not None:
        model.set_keep_rate(args.keep_rate)
    labels = _labels(model, args.label_csv)
    quiet = args.json == "-"
    results, failed, pictures = [], [], _PictureNames(args.plot)
    paths = find_clips(args.clips, failed)
    progress = tqdm(paths, desc="predict", unit="clip", disable=None if len(paths) > 1 else True, leave=False)
    for clip in predict_clips(
        model, progress, failed, device, amp=args.amp, batch_size=args.batch_size, overlap=args.overlap,
        keep_waves=args.plot is not None,
    ):  # fmt: skip
        picture = None
        if args.plot is not None:
            picture = pictures.of(clip.path, alone=len(paths) == 1)
            save_figure(draw_clip(model, clip, labels, device, args.amp), picture)
            clip.wave = None
        results.append(_result(model, clip, labels, args.top_k, picture))
        if not quiet:
            tqdm.write(_text(results[-1]), file=sys.stdout)  # keeps clear of the progress bar
    if args.json is not None:
        errors = [{"path": path, "error": reason} for path, reason in failed]
        _write_json(args.json, {**_about(args, model), "clips": results, "failed": errors})
    if failed:
        print(f"{len(failed)} of {len(failed) + len(results)} could not be predicted:", file=sys.stderr)
        for path, reason in failed:
            print(f"  {reason if path in reason else f'{path}: {reason}'}", file=sys.stderr)
    return 0 if results else 1


def find_clips(inputs, failed):
    """Sound files among and below ``inputs``, each once, in the order given; what is none is added to ``failed``."""
    from .data import find_audio

    paths = {}
    for given in map(Path, inputs):
        if not given.is_dir():
            paths[given] = None  # decoding tells whether it is there and sound
            continue
        found = find_audio(given)
        paths.update(dict.fromkeys(found))
        if not found:
            failed.append((str(given), "no sound files in this folder"))
    return list(paths)


def window_starts(samples, window, overlap):
    """First samples of the windows that cover a clip: one, or several of which neighbours share ``overlap`` or more.

    The last window ends with the clip, so that no window of a long clip is padded.
    """
    if samples <= window:
        return [0]
    step = max(1, round(window * (1 - overlap)))
    return [*range(0, samples - window, step), samples - window]


@torch.inference_mode()
def predict_clips(model, paths, failed, device, *, amp="fp32", batch_size=16, overlap=0.5, keep_waves=False):
    """Predict sound files, batching windows across files.

    Args:
        model: opened checkpoint on ``device``.
        paths: files, decoded one after the other.
        failed: list that gets ``(path, reason)`` of every file that cannot be predicted.
        amp: "fp32", "bf16" or "fp16".
        batch_size: windows at once.
        overlap: share of a window that the next one repeats, in [0, 1).
        keep_waves: leave the waveforms in the results.

    Yields:
        ``Clip`` in the order of ``paths``: per window softmax, or sigmoid if the model is multilabel.
    """
    from .data import FeatureExtractor, load_audio
    from .data.fbank import samples_for

    features = FeatureExtractor(model.features).to(device)
    window = samples_for(model.frames)
    waiting, pending = [], []  # clips without all their scores; windows that wait for a batch

    def run(count):
        batch = pending[:count]
        del pending[:count]
        waves = [clip.wave[start : start + window] for clip, start in batch]
        lengths = torch.tensor([len(wave) for wave in waves])
        padded = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)  # [B, L]
        fbank = features(padded.to(device), lengths)
        with autocast(device, amp):
            logits = model(fbank).float()  # [B, K]
        scores = (logits.sigmoid() if model.multilabel else logits.softmax(-1)).cpu()
        for (clip, _), row in zip(batch, scores):
            clip.scores.append(row)

    def complete():
        while waiting and len(waiting[0].scores) == len(waiting[0].starts):
            clip = waiting.pop(0)
            if not keep_waves:
                clip.wave = None
            if clip.mean_scores.isfinite().all():
                yield clip
            else:
                failed.append((str(clip.path), "the model's output is not finite (try --amp fp32)"))

    for path in paths:
        try:
            wave = load_audio(path)
        except (UserError, OSError) as error:
            failed.append((str(path), str(error)))
            continue
        clip = Clip(path, wave, len(wave), window_starts(len(wave), window, overlap))
        waiting.append(clip)
        pending.extend((clip, start) for start in clip.starts)
        while len(pending) >= batch_size:
            run(batch_size)
            yield from complete()
    while pending:
        run(batch_size)
    yield from complete()


@torch.inference_mode()
def draw_clip(model, clip, labels, device, amp="fp32"):
    """Figure of the window in which the clip's label is clearest, and of the patches that each pruning stage keeps."""
    from .data import FeatureExtractor
    from .data.fbank import HOP, SAMPLE_RATE, WINDOW, samples_for
    from .models.trace import trace

    top = int(clip.mean_scores.argmax())
    best = max(range(len(clip.starts)), key=lambda i: float(clip.scores[i][top]))
    start = clip.starts[best]
    wave = clip.wave[start : start + samples_for(model.frames)]
    fbank = FeatureExtractor(model.features).to(device)(wave[None].to(device))  # [1, frames, 128]
    with autocast(device, amp):
        kept = trace(model, fbank).kept
    stages, counts = [], [model.num_patches]
    for block, index in zip(model.prune_blocks, kept):
        time, mel = model.patch_position(index[0].cpu())
        grid = torch.zeros(model.grid[::-1], dtype=torch.bool)  # [mel rows, time columns]
        grid[mel, time] = True
        stages.append((f"after block {block + 1}", grid.numpy()))
        counts.append(len(time))
    rates = model.keep_rates
    if all(count == counts[0] for count in counts):
        pruning, stages = "keep-rate 1, nothing is pruned (choose another with --keep-rate)", []
    else:
        rate = f"{rates[0]:g}" if len(set(rates)) == 1 else ", ".join(f"{rate:g}" for rate in rates)
        pruning = f"keep-rate {rate}, patches {' → '.join(map(str, counts))}"
    part = ""
    if len(clip.starts) > 1:
        part = f", seconds {start / SAMPLE_RATE:.1f} to {(start + len(wave)) / SAMPLE_RATE:.1f} of {clip.samples / SAMPLE_RATE:.1f}"
    return plot_kept_patches(
        fbank[0].float().cpu().numpy(),
        stages,
        title=f"{clip.path.name}: {labels[top]} ({float(clip.mean_scores[top]):.2f})",
        subtitle=f"{model.name}, {pruning}{part}",
        sounding=1 + (len(wave) - WINDOW) // HOP,
        start=start / SAMPLE_RATE,
    )


class _PictureNames:
    """File of each clip's picture: the name given, or for several clips ``out-CLIP.png``, numbered where these clash."""

    def __init__(self, path):
        self.path, self.taken = path, set()

    def of(self, clip, alone):
        if alone:
            return self.path
        name, number = self.path.with_stem(f"{self.path.stem}-{clip.stem}"), 2
        while name in self.taken:
            name, number = self.path.with_stem(f"{self.path.stem}-{clip.stem}-{number}"), number + 1
        self.taken.add(name)
        return name


def _result(model, clip, labels, top_k, picture):
    from .data.fbank import SAMPLE_RATE, samples_for

    def top(scores):
        best = scores.topk(min(top_k, len(scores)))
        return [{"label": labels[i], "score": score} for score, i in zip(best.values.tolist(), best.indices.tolist())]

    ends = [min(start + samples_for(model.frames), clip.samples) for start in clip.starts]
    windows = [
        {"start": start / SAMPLE_RATE, "end": end / SAMPLE_RATE, "labels": top(scores)}
        for start, end, scores in zip(clip.starts, ends, clip.scores)
    ]
    result = {"path": str(clip.path), "seconds": clip.samples / SAMPLE_RATE, "labels": top(clip.mean_scores), "windows": windows}
    return result if picture is None else {**result, "plot": str(picture)}


def _about(args, model):
    return {
        "checkpoint": str(args.checkpoint),
        "model": describe(model),
        "keep_rates": list(model.keep_rates),
        "scores": "sigmoid" if model.multilabel else "softmax",
    }


def _text(result):
    windows = len(result["windows"])
    length = f"{result['seconds']:.2f} s" + (f", mean of {windows} windows" if windows > 1 else "")
    lines = [f"{result['path']} ({length})"]
    lines += [f"  {one['score']:.4f}  {one['label']}" for one in result["labels"]]
    if "plot" in result:
        lines.append(f"  picture: {result['plot']}")
    return "\n".join(lines)


def _write_json(target, value):
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _labels(model, label_csv):
    """Names of the classes: of the label CSV, else the checkpoint's, else numbers."""
    if label_csv is None:
        return model.labels or [f"class {number}" for number in range(model.num_classes)]
    from .data.manifest import read_label_csv

    _, names = read_label_csv(label_csv)
    if len(names) != model.num_classes:
        raise UserError(f"{label_csv} names {len(names)} classes, the checkpoint has {model.num_classes}")
    return names


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m pruneattn.predict",
        description="Labels of sound files of any format and length. What is longer than the model's input is cut into "
        "overlapping windows whose scores are averaged; what is shorter is padded as in training.",
    )
    add_checkpoint_options(parser)
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="sound files, and folders that are searched for them")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="labels to name per clip (default: 5)")
    parser.add_argument(
        "--keep-rate", type=float, metavar="R", help="share of patches kept at each pruning block, in (0, 1] (the checkpoint's)"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of a window that the next one repeats, in [0, 1) (default: 0.5)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG",
        help="draw the spectrogram and what is kept of it after each pruning stage; of several clips into PNG-CLIP.png",
    )  # fmt: skip
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write everything as JSON to a file, or instead of the text to standard output")
    parser.add_argument("--label-csv", metavar="CSV", help="names of the classes (index,mid,display_name), where the checkpoint has none")
    parser.add_argument(
        "--dataset", default="as20k", help="with --model: dataset that the checkpoint was trained for (default: as20k)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--amp", choices=("fp32", "bf16", "fp16"), default="fp32", help="precision of the model (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="windows at once (default: 16)")
    args = parser.parse_args(argv)
    if args.top_k < 1:
        raise UserError(f"--top-k {args.top_k}: must be at least 1")
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: must be at least 1")
    if not 0 <= args.overlap < 1:
        raise UserError(f"--overlap {args.overlap}: must be at least 0 and below 1")
    if args.plot is not None:
        check_plot_path(args.plot)
        _check_folder(args.plot)
    if args.json not in (None, "-"):
        # Also keeps "--json CHECKPOINT CLIP" from writing over the checkpoint.
        if not args.json.endswith(".json"):
            raise UserError(f"--json {args.json}: the file's name must end in .json (or '-' for standard output)")
        _check_folder(Path(args.json))
    return args


def _check_folder(path):
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")


if __name__ == "__main__":
    run_command(main)
