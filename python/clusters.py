"""Deprecated alias of ``pruneattn analyze clusters``. The next release removes it."""

import sys

from pruneattn.analysis.commands.clusters import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/clusters.py is deprecated: use pruneattn analyze clusters", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
