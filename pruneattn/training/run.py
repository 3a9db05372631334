"""One training run from beginning to end."""

from __future__ import annotations

from contextlib import ExitStack

from ..runtime.signals import StopRequest
from .build import build_trainer
from .options import Options
from .recipes import Recipe


def run_training(options: Options, recipe: Recipe) -> None:
    """Train a model, or resume its training, and report the result.

    The process group stays open, so that the caller can tell the main process; ``distributed.finish`` closes it.

    Raises:
        Stopped: a signal stopped the run, whose state is saved.
        UserError: an option cannot be used, or the run cannot continue.
    """
    with ExitStack() as lock:
        stop = StopRequest()
        trainer = build_trainer(options, recipe, stop, lock)
        with stop:
            try:
                trainer.run()
                trainer.report()
            finally:
                trainer.log.close()
