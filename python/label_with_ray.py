"""Label a corpus on many machines with Ray Data. The files are those of `pruneattn predict --output`.

    python python/label_with_ray.py runs/audiomae_base_as20k clips.txt --output labels.parquet --gpus 1 --actors 8

Tasks on the CPUs of the whole cluster decode clips. Actors with the model label the decoded clips, each on a GPU or on
CPUs. Clips and checkpoint must have the same path on every machine, and pruneattn must be installed there. This process
receives the labels (a few hundred bytes per clip) and writes each clip once. Ray recovers from lost actors, tasks and
machines. If this process ends, the same command resumes.
"""

import argparse
import math

import numpy as np

from pruneattn.cli import CommandParser, add_output_option, check_least, run_command
from pruneattn.errors import UserError
from pruneattn.labelling.corpus import Decoded, decode, find_clips
from pruneattn.labelling.label_files import LabelFile, check_label_path, label_schema
from pruneattn.labelling.write_labels import write_labels
from pruneattn.predict import add_label_options, check_label_options, describe_labels, make_labeler, open_model
from pruneattn.runtime import distributed
from pruneattn.runtime.inference import can_optimize

TASK_CLIPS = 64  # clips that one task decodes, and decodes again if the task is lost


def main(argv=None):
    args = parse(argv)
    about = describe_labels(open_model(args), args)
    paths, failed = find_clips(args.clips, args.data_dir)
    output = LabelFile(args.output, about, windows=args.windows)
    todo = [path for path in paths if path not in output.done]

    def rows():
        yield from ({"path": path, "error": reason} for path, reason in failed)
        yield from label(args, todo)

    return write_labels(rows(), len(todo), output)


def label(args, paths):
    """Rows of ``Labeler.row``, in the order in which the clips are finished.

    Args:
        args: parsed options.
        paths: list of paths of clips, as str.
    """
    try:
        import ray.data
    except ImportError:
        raise UserError("labeling with Ray needs ray, which is not installed: pip install 'pruneattn[ray]'") from None
    if not paths:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # write_labels has a progress bar
    blocks = min(10_000, math.ceil(len(paths) / TASK_CLIPS))
    clips = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=blocks)
    # With more tasks than actors at the same time, Ray does not fuse decoding into the actors.
    tasks = ray.data.TaskPoolStrategy(size=max(blocks, args.actors + 1))
    decoded = clips.map_batches(decode_batch, batch_size=args.batch_size, compute=tasks, num_cpus=1)
    # Ray Data restarts a lost actor and repeats its batch by default.
    labels = decoded.map_batches(
        LabelBatches,
        fn_constructor_args=(args,),
        batch_size=args.batch_size,
        zero_copy_batch=False,  # torch needs writable memory
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=args.cpus,
        num_gpus=args.gpus,
    )
    for batch in labels.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in batch.to_pylist():
            yield {name: value for name, value in row.items() if value is not None}


def decode_batch(batch):
    """Decode a batch of clips: columns ``path``, ``wave`` (float32, empty if decoding failed) and ``error``."""
    clips = [decode(str(path), whole=True) for path in batch["path"]]
    waves = np.empty(len(clips), dtype=object)
    waves[:] = [np.zeros(0, np.float32) if clip.wave is None else clip.wave for clip in clips]
    return {"path": batch["path"], "wave": waves, "error": np.array([clip.error or "" for clip in clips])}


class LabelBatches:
    """Actor with the model, which labels decoded batches."""

    def __init__(self, args):
        device = distributed.start("cuda" if args.gpus else "cpu")
        self.labeler = make_labeler(open_model(args), device, args)

    def __call__(self, batch):
        import pyarrow

        decoded = (
            Decoded(str(path), wave, str(error) or None)
            for path, wave, error in zip(batch["path"], batch["wave"], batch["error"])
        )
        rows = [self.labeler.row(clip) for clip in self.labeler.clips(decoded)]
        schema = label_schema(self.labeler.windows).append(pyarrow.field("error", pyarrow.string()))
        return pyarrow.Table.from_pylist(rows, schema=schema)


def parse(argv):
    parser = CommandParser(
        prog="python python/label_with_ray.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_label_options(parser)
    add_output_option(parser, "FILE", "FILE.jsonl, or Parquet files in the folder FILE.parquet", required=True)
    parser.add_argument("--actors", type=int, default=1, metavar="N", help="actors with the model (default: 1)")
    parser.add_argument(
        "--gpus",
        type=float,
        default=0,
        metavar="G",
        help="GPUs per actor, or a fraction of one (default: 0, CPUs only)",
    )
    parser.add_argument("--cpus", type=float, default=1, metavar="C", help="CPUs, and threads, per actor (default: 1)")
    args = parser.parse_args(argv)
    check_label_options(args)
    check_least(args, actors=1, gpus=0, cpus=0)
    check_label_path(args.output)
    can_optimize("cuda" if args.gpus else "cpu", args.amp)  # rejects --amp int8 on GPUs
    return args


if __name__ == "__main__":
    run_command(main)
