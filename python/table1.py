"""Deprecated alias of ``pruneattn analyze table1``. The next release removes it."""

import sys

from pruneattn.analysis.commands.table1 import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/table1.py is deprecated: use pruneattn analyze table1", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
