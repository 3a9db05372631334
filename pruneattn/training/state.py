"""The output folder of a run, and the checkpoints from which it resumes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from ..errors import UserError
from ..files import atomic_write, locked
from .options import LAST, PRUNING, differences

__all__ = ["BEST", "CONFIG", "LAST", "LOG", "MISSING", "RESULT", "TRUNK", "Progress"]

#: Files in the output folder of a run, next to `LAST` and the list of failed clips, ``report.FAILED``.
CONFIG, LOG, RESULT = "config.json", "log.jsonl", "result.json"
BEST, TRUNK = "best.safetensors", "trunk.pt"
MISSING = "missing_clips.txt"
_FORMAT = 1


@dataclass
class Progress:
    """Position of a run. With the weights, the optimizer and the loss scaler, it determines the rest of the run.

    Attributes:
        epoch: epoch of the next optimizer step, from 0.
        step: number of completed optimizer steps in this epoch.
        loss_sum: sum of the losses of these steps.
        train_seconds: duration of these steps.
        best: ``epoch``, ``metric``, ``keep_rate``, ``pruning`` and ``val`` (metrics) of the best checkpoint, if any.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    train_seconds: float = 0.0
    best: dict[str, Any] | None = None

    def improves(self, metric: float, keep_rate: Sequence[float], pruning: bool) -> bool:
        """Whether an epoch is the best so far: it has another keep-rate than the best epoch, or a better metric.

        Keep-rates only fall during a run, so another keep-rate is closer to the target, and the best epoch of a
        finished run has the target keep-rate.
        """
        best = self.best
        if best is None or best["keep_rate"] != keep_rate or best["pruning"] != pruning:
            return True
        return metric > best["metric"] or math.isnan(best["metric"])


def open_output(folder: str | Path, resuming: bool, lock: ExitStack) -> Path:
    """Create and lock the output folder of a run.

    Args:
        folder: the folder.
        resuming: whether it may contain a run.
        lock: holds the lock on the folder.

    Raises:
        UserError: the folder cannot be created, another process trains in it, or it already contains a run and
            ``resuming`` is False.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output {folder}: a file of this name exists; choose another folder") from None
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be created: {error.strerror}; choose a folder that is writable"
        ) from None
    lock.enter_context(locked(folder, "choose another folder with --output"))
    if not resuming and any((folder / name).exists() for name in (CONFIG, LAST, LOG, BEST)):
        raise UserError(f"--output {folder} already contains a run: resume it with --resume, or choose another folder")
    return folder


def save_state(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    log_bytes: int,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint from which a run can resume, atomically.

    Args:
        path: file to write.
        config: flat dict of the configuration of the run, which `load_state` compares.
        progress: position of the run.
        model: model, without the wrappers of ``torch.compile`` and DDP.
        optimizer: its optimizer.
        scaler: its loss scaler.
        log_bytes: current length of the log; a resumed run removes everything after it.
        files: for a trunk only: log and best checkpoint so far (content by name), which its branches copy.
    """
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in (files or {}).items() if data
    }
    state = {
        "format": _FORMAT,
        "config": dict(config),
        "progress": dataclasses.asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "log_bytes": log_bytes,
        "files": tensors,
    }
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | Path, config: Mapping[str, Any], *, branch: bool = False) -> dict[str, Any]:
    """Read a checkpoint of `save_state` on the CPU, and check that it belongs to a configuration.

    Args:
        path: file to read.
        config: configuration of the run that continues from the checkpoint.
        branch: whether a new run branches off; its pruning options may differ, and the file must be a trunk.

    Raises:
        UserError: the file does not exist or cannot be read, or the configuration differs; the message lists the
            options that differ.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: checkpoint not found")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types of exception for a damaged file
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of a training run, or damaged ({reason})") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise UserError(f"{path}: not a checkpoint of a training run; to start from its weights, use --init")
    ignore: Collection[str] = PRUNING if branch else ()
    found = differences(state["config"], config, ignore)
    if found:
        free = "pruning options" if branch else "options that do not affect the result"
        raise UserError(
            f"{path} comes from a run with another configuration; only {free} may differ. "
            f"Saved -> given: {'; '.join(found)}"
        )
    if branch and not state["files"]:
        raise UserError(f"{path}: not the {TRUNK} that a run saves before its first pruned epoch")
    return state


def restore(
    state: Mapping[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler
) -> Progress:
    """Load a state of `load_state` into model, optimizer and scaler, and return its `Progress`."""
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])
