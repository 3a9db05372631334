"""``python -m pruneattn.train``: train a pruned AudioMAE or AST.

Several processes, also on several machines that share --output, are started by torchrun, the same command on each::

    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 \\
        --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m pruneattn.train ... --resume

When a process dies, torchrun starts all of them again, and --resume lets them go on from the last checkpoint, or begin
where there is none yet; --save-minutes says how much work can be lost. ``--nnodes 1:2`` goes on with one machine when
the other is lost. The clips of each optimiser step stay the same with any number of processes.
"""

import signal

from .cli import run_command
from .training.options import parse


def main(argv=None):
    """Train as the command line says. Returns the exit code: 0, or 128 + the number of the signal that stopped it."""
    options, recipe = parse(argv)
    # After the options, so that --help and a wrong option answer at once.
    from .runtime import distributed
    from .runtime.signals import StopRequest
    from .training.build import build_trainer
    from .training.engine import Stopped
    from .training.log import say

    stop = StopRequest()
    try:
        trainer = build_trainer(options, recipe, stop)
        with stop:
            try:
                trainer.run()
                trainer.report()
            finally:
                trainer.log.close()
    except Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        say(f"stopped by {name}; {stopped}; go on with the same command and --resume")
        return 128 + stopped.signum
    except KeyboardInterrupt:
        say("stopped before the first step or by a second Ctrl-C; nothing new is saved")
        return 128 + signal.SIGINT
    finally:
        distributed.finish()
    return 0


if __name__ == "__main__":
    run_command(main)
