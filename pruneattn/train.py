"""``pruneattn train``: train a pruned AudioMAE or AST.

torchrun starts several processes, also on several machines that share the folder --output. Run the same command on each
machine::

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m pruneattn.train ... --resume

When a process dies, torchrun restarts all processes. With --resume they resume from the last checkpoint, or start the
run if there is none yet. --save-minutes limits the work that can be lost. With ``--nnodes 1:2`` the run continues on
one machine when the other is lost. Each optimizer step uses the same clips with any number of processes.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from .cli import run_command
from .training.options import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Train with these command-line arguments. Return 0, or 128 + the number of the signal that stopped the run."""
    options, recipe = parse(argv)
    # Imported after parsing, so that --help and invalid options answer quickly.
    from .runtime import distributed
    from .training.engine import Stopped
    from .training.log import say
    from .training.run import run_training

    try:
        run_training(options, recipe)
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        say(f"stopped by {name}; {stopped}; to resume, run the same command with --resume")
        return 128 + stopped.signum
    except KeyboardInterrupt:
        say("stopped before the first step or by a second Ctrl-C; nothing new is saved")
        return 128 + signal.SIGINT
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    run_command(main)
