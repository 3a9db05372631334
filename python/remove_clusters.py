"""Deprecated alias of ``pruneattn analyze remove_clusters``. The next release removes it."""

import sys

from pruneattn.analysis.commands.remove_clusters import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/remove_clusters.py is deprecated: use pruneattn analyze remove_clusters", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
