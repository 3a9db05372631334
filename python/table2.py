"""Deprecated alias of ``pruneattn analyze table2``. The next release removes it."""

import sys

from pruneattn.analysis.commands.table2 import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/table2.py is deprecated: use pruneattn analyze table2", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
