"""Deprecated alias of ``pruneattn analyze kendall``. The next release removes it."""

import sys

from pruneattn.analysis.commands.kendall import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/kendall.py is deprecated: use pruneattn analyze kendall", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
