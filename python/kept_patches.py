"""Deprecated alias of ``pruneattn analyze kept_patches``. The next release removes it."""

import sys

from pruneattn.analysis.commands.kept_patches import main as analyze
from pruneattn.cli import run_command


def main(argv=None):
    print("warning: python/kept_patches.py is deprecated: use pruneattn analyze kept_patches", file=sys.stderr)
    return analyze(argv)


if __name__ == "__main__":
    run_command(main)
