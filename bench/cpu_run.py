"""`make bench-cpu`: everything that is measured on a CPU, side by side, in one result file.

Prints Markdown tables and writes bench/results/cpu-<date>.json with the machine, versions, commit and every figure.
Times are medians with the 20th and 80th percentile, of rounds in which all variants of a table take turns. A peer whose
result is not ours is an error, not a time. Takes about 20 minutes on two cores without the sections adapters and
exported; let nothing else run.
"""

import argparse
import sys

import peers
import torch
from cpu_adapters import run_adapters
from cpu_block import run_block, run_memory
from cpu_exported import run_exported
from cpu_models import run_models, run_peers
from cpu_ops import run_ops, run_threads
from machine import RESULTS, describe_machine, version, write_result
from report import Settings, markdown

from pruneattn.backend import _C, why_not

SECTIONS = {
    "ops": run_ops,
    "threads": run_threads,
    "models": run_models,
    "peers": run_peers,
    "exported": run_exported,
    "adapters": run_adapters,
    "block": run_block,
    "memory": run_memory,
}


def run(sections, settings, folder=RESULTS):
    """Measure the sections and write the result file; returns its path."""
    tables = []
    for section in sections:
        for title, rows in SECTIONS[section](settings):
            print(f"\n### {title}\n\n{markdown(rows)}\n", flush=True)
            tables.append({"section": section, "title": title, "rows": rows})
    result = {
        **describe_machine(),
        "timm": version("timm"),
        "transformers": version("transformers"),
        "onnxruntime": version("onnxruntime"),
        "instruction_set": _C.cpu_isa(),
        "instruction_sets": _C.cpu_isas(),
        "threads": torch.get_num_threads(),
        "rounds": settings.rounds,
        "left_out": peers.missing(),
        "tables": tables,
    }
    return write_result("cpu", result, folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; all by default")
    rounds = Settings().rounds
    parser.add_argument("--rounds", type=int, default=rounds, help="of models, ops and blocks get three times as many")
    parser.add_argument("--quick", action="store_true", help="a single round, to see that everything runs")
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            parser.error(f"unknown section {section!r}; choose from {', '.join(SECTIONS)}")
    if why_not("cpu"):
        sys.exit(f"error: {why_not('cpu')}")
    for peer, reason in peers.missing().items():
        print(f"left out: {peer} ({reason})")
    path = run(args.sections or list(SECTIONS), Settings(rounds=1 if args.quick else args.rounds))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
