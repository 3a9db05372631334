"""``python -m pruneattn.predict``: labels of sound files of any length, and pictures of what pruning keeps of them."""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .errors import UserError, check_least, run_command
from .inference import AMP_DTYPES, autocast, optimized
from .io import atomic_write
from .opening import add_checkpoint_options, describe, open_checkpoint
from .plot import check_plot_path, plot_kept_patches, save_figure
from .training import distributed
from .windows import find_clips, predict_clips


def main(argv=None):
    """Predict as the command line says; returns the exit code: 1 if nothing could be predicted."""
    args = _parse(argv)
    device = distributed.start(args.device)
    model, amp = optimized(open_checkpoint(args, args.dataset), device, args.amp)
    if args.keep_rate is not None:
        model.set_keep_rate(args.keep_rate)
    labels = _labels(model, args.label_csv)
    quiet = args.json == "-"
    results, failed, pictures = [], [], _PictureNames(args.plot)
    paths = find_clips(args.clips, failed)
    progress = tqdm(paths, desc="predict", unit="clip", disable=None if len(paths) > 1 else True, leave=False)
    for clip in predict_clips(
        model, progress, failed, device, amp=amp, batch_size=args.batch_size, overlap=args.overlap,
        keep_waves=args.plot is not None,
    ):  # fmt: skip
        picture = None
        if args.plot is not None:
            picture = pictures.of(clip.path, alone=len(paths) == 1)
            save_figure(draw_clip(model, clip, labels, device, amp), picture)
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
        stages.append((f"after block {block + 1}", model.kept_grid(index[0].cpu()).numpy()))
        counts.append(index.shape[1])
    rates = model.keep_rates
    if all(count == counts[0] for count in counts):
        stages, pruning = [], "keep-rate 1, nothing is pruned (choose another with --keep-rate)"
    else:
        rate = f"{rates[0]:g}" if len(set(rates)) == 1 else ", ".join(f"{rate:g}" for rate in rates)
        pruning = f"keep-rate {rate}, patches {' → '.join(map(str, counts))}"
    part = ""
    if len(clip.starts) > 1:
        begin, end, whole = (samples / SAMPLE_RATE for samples in (start, start + len(wave), clip.samples))
        part = f", seconds {begin:.1f} to {end:.1f} of {whole:.1f}"
    return plot_kept_patches(
        fbank[0].float().cpu().numpy(),
        stages,
        title=f"{clip.path.name}: {labels[top]} ({float(clip.mean_scores[top]):.2f})",
        subtitle=f"{model.name}, {pruning}{part}",
        sounding=1 + (len(wave) - WINDOW) // HOP,
        start=start / SAMPLE_RATE,
    )


class _PictureNames:
    """File of each clip's picture: the name given, or for several ``out-CLIP.png``, numbered where these clash."""

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
    result = {
        "path": str(clip.path),
        "seconds": clip.samples / SAMPLE_RATE,
        "labels": top(clip.mean_scores),
        "windows": windows,
    }
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
        "--keep-rate", type=float, metavar="R",
        help="share of patches kept at each pruning block, in (0, 1] (the checkpoint's)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float, default=0.5, metavar="SHARE",
        help="of a window that the next one repeats, in [0, 1) (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=Path, metavar="PNG",
        help="draw the spectrogram and what is kept of it after each pruning stage; of several clips into PNG-CLIP.png",
    )  # fmt: skip
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help="write everything as JSON, to a file or (without a name) to standard output in place of the text",
    )  # fmt: skip
    parser.add_argument("--label-csv", metavar="CSV", help="names of the classes (index,mid,display_name)")
    parser.add_argument(
        "--dataset", default="as20k", help="with --model: dataset that the checkpoint was trained for (default: as20k)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--amp", choices=tuple(AMP_DTYPES), default="fp32", help="precision (default: fp32)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="B", help="windows at once (default: 16)")
    args = parser.parse_args(argv)
    check_least(args, top_k=1, batch_size=1)
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
