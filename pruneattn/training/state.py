"""The output folder of a run, and the checkpoints from which it goes on."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UserError
from ..files import atomic_write
from .options import LAST, PRUNING, differences

CONFIG, LOG, RESULT = "config.json", "log.jsonl", "result.json"
BEST, TRUNK = "best.safetensors", "trunk.pt"
FAILED, MISSING = "failed_clips.txt", "missing_clips.txt"
_FORMAT = 1


@dataclass
class Progress:
    """How far a run is; with the weights, the optimiser and the loss scaler all that a run's future depends on."""

    epoch: int = 0
    step: int = 0  # optimiser steps done in this epoch
    loss_sum: float = 0.0  # of these steps
    train_seconds: float = 0.0
    best: dict | None = None  # epoch, metric, keep_rate, pruning and metrics of the best checkpoint

    def improves(self, metric, keep_rate, pruning):
        """Whether an epoch is the best so far. A keep-rate nearer to the target always beats one farther away.

        The schedule only falls, so that is any change; the last stage's winner has the target keep-rate.
        """
        best = self.best
        if best is None or best["keep_rate"] != keep_rate or best["pruning"] != pruning:
            return True
        return metric > best["metric"] or math.isnan(best["metric"])


def open_output(folder, going_on):
    """Create the output folder; refuse one that already holds a run, unless that is to go on."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output {folder}: there is a file of that name; give another folder") from None
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be created: {error.strerror}; give a folder that can be written to"
        ) from None
    if not going_on and any((folder / name).exists() for name in (CONFIG, LAST, LOG, BEST)):
        raise UserError(f"--output {folder} holds a run already: go on with it (--resume), or give another folder")
    return folder


def save_state(path, *, config, progress, model, optimizer, scaler, log_bytes, files=None):
    """Write a checkpoint to go on from, atomically.

    Args:
        config: flat dict of the run's configuration, compared when the run goes on.
        log_bytes: length of the log at this moment; what came later is cut off when the run goes on.
        files: only for a trunk: the folder's log and best checkpoint so far (bytes by name), for its branches.
    """
    files = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in (files or {}).items() if data}
    state = {
        "format": _FORMAT,
        "config": config,
        "progress": dataclasses.asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "log_bytes": log_bytes,
        "files": files,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load_state(path, config, *, branch=False):
    """Read a checkpoint of `save_state`, on the CPU, and see that it belongs to this configuration.

    Raises:
        UserError: there is none, it cannot be read, or the configuration differs; the message lists the fields.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of a training run, or damaged ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path}: not a checkpoint of a training run; to start from its weights use --init")
    found = differences(state["config"], config, PRUNING if branch else ())
    if found:
        rest = "pruning options" if branch else "options that do not change the result"
        raise UserError(
            f"{path} comes from a run with another configuration; only {rest} may differ. "
            f"Saved -> given: {'; '.join(found)}"
        )
    if branch and not state["files"]:
        raise UserError(f"{path}: not the {TRUNK} that a run saves before its first pruned epoch")
    return state


def restore(state, model, optimizer, scaler):
    """Put a loaded state into the live objects; returns its `Progress`."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])
