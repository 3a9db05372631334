"""Label a corpus on many machines: what `python -m pruneattn.predict --output` does, on Ray Data.

    python python/label_with_ray.py runs/audiomae_base_as20k clips.txt --output labels.parquet --gpus 1 --actors 8

CPUs of the whole cluster decode, and actors with the model label what they decoded, on a GPU each or on CPUs. Clips and
checkpoint must have the same path on every machine, and pruneattn be installed there. The labels come to this process
(some hundred bytes a clip), which writes them as predict does: the same files, each clip once. Ray makes up for an actor,
a decoding task or a machine that is lost; if this process ends, the same command goes on.
"""

import argparse
import math
from pathlib import Path

import numpy as np

from pruneattn.cli import check_least, run_command
from pruneattn.errors import UserError
from pruneattn.labelling.corpus import Decoded, decode, find_clips
from pruneattn.labelling.label_files import LabelFile, check_label_path, label_schema
from pruneattn.labelling.write_labels import write_labels
from pruneattn.predict import add_label_options, check_label_options, describe_labels, make_labeller, open_model
from pruneattn.runtime import distributed

TASK_CLIPS = 64  # decoded by one task, which is what is done again when it is lost


def main(argv=None):
    args = _parse(argv)
    about = describe_labels(open_model(args), args)
    paths, failed = find_clips(args.clips, args.data_dir)
    output = LabelFile(args.output, about, windows=args.windows)
    todo = [path for path in paths if path not in output.done]

    def rows():
        yield from ({"path": path, "error": reason} for path, reason in failed)
        yield from label(args, todo)

    return write_labels(rows(), len(todo), output)


def label(args, paths):
    """Rows of clips, as ``Labeller.row`` gives them, in the order in which they are done.

    Args:
        args: parsed options.
        paths: list of str.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("labelling with Ray needs ray: pip install 'pruneattn[ray]'") from None
    if not paths:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one for the labels
    blocks = min(10_000, math.ceil(len(paths) / TASK_CLIPS))
    clips = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=blocks)
    # Ray would decode in the actors if it could have as many of these tasks at once as of them.
    tasks = ray.data.TaskPoolStrategy(size=max(blocks, args.actors + 1))
    decoded = clips.map_batches(decode_batch, batch_size=args.batch_size, compute=tasks, num_cpus=1)
    # An actor that is lost comes back and does again what it was doing: Ray Data's default.
    labels = decoded.map_batches(
        LabelBatches,
        fn_constructor_args=(args,),
        batch_size=args.batch_size,
        zero_copy_batch=False,  # torch takes no memory that cannot be written
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    for batch in labels.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            yield {name: value for name, value in row.items() if value is not None}


def decode_batch(batch):
    """Decode the clips of a batch: columns ``path``, ``wave`` (float32, empty where it cannot be had) and ``error``."""
    clips = [decode(str(path)) for path in batch["path"]]
    waves = np.empty(len(clips), dtype=object)
    waves[:] = [np.zeros(0, np.float32) if clip.wave is None else clip.wave for clip in clips]
    return {"path": batch["path"], "wave": waves, "error": np.array([clip.error or "" for clip in clips])}


class LabelBatches:
    """Actor that holds the model and labels decoded batches."""

    def __init__(self, args):
        device = distributed.start("cuda" if args.gpus else "cpu")
        self.labeller = make_labeller(open_model(args), device, args)

    def __call__(self, batch):
        import pyarrow

        decoded = (
            Decoded(str(path), wave, str(error) or None)
            for path, wave, error in zip(batch["path"], batch["wave"], batch["error"])
        )
        rows = [self.labeller.row(clip) for clip in self.labeller.clips(decoded)]
        schema = label_schema(self.labeller.windows).append(pyarrow.field("error", pyarrow.string()))
        return pyarrow.Table.from_pylist(rows, schema=schema)


def _parse(argv):
    parser = argparse.ArgumentParser(
        prog="python python/label_with_ray.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_label_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="FILE.jsonl, or a folder FILE.parquet",
    )
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="actors with the model (default: 1)")
    parser.add_argument(
        "--gpus", type=float, default=0, metavar="G", help="GPUs of each, may be a fraction (default: 0, on CPUs)"
    )
    parser.add_argument("--cpus", type=float, default=1, metavar="C", help="CPUs of each, as threads (default: 1)")
    args = parser.parse_args(argv)
    check_label_options(args)
    check_least(args, actors=1, gpus=0, cpus=0)
    check_label_path(args.output)
    return args


if __name__ == "__main__":
    run_command(main)
