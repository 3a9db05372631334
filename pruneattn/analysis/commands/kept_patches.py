"""``pruneattn analyze kept_patches``: the patches of clips that each pruning stage keeps (paper, Fig. 1 and 3)."""

from __future__ import annotations

from collections.abc import Sequence

from ...cli import check_least
from ...files import write_csv
from ...plot import keep_rate_text
from ..clips import describe_data
from ..kept_patches import example_rows, measure_kept, plot_page
from .options import (
    add_default_keep_rate_option,
    make_clips_parser,
    open_analysis,
    report_failed,
    save_result,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "kept_patches",
        "Writes kept_patches.png, .pdf and .csv for the shown clips, and kept_shares.csv for all clips: the share of "
        "sound, pause and padding among the patches after each stage.",
    )
    add_default_keep_rate_option(parser, 0.5)
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="number of clips to show (default: 4)")
    parser.add_argument(
        "--match", nargs="+", default=(), metavar="TEXT", help="show only clips whose path contains one of the texts"
    )
    args = parser.parse_args(argv)
    check_least(args, clips=1)
    analysis = open_analysis(args)
    model = analysis.model
    model.set_keep_rate(args.keep_rate)
    rows, examples = measure_kept(analysis, args.clips, args.match)
    report_failed(analysis, args.output)
    for row in rows:
        print("{stage:>14} ({patches} patches): {share:6.1%} ± {se:.1%} {kind}".format(**row))
    write_csv(args.output / "kept_shares.csv", rows)
    rate = keep_rate_text(args.keep_rate)
    title = f"{model.name}, {model.score} score, keep-rate {rate}: {describe_data(analysis)}"
    figure = plot_page(model, analysis.dataset, examples, title)
    save_result(args.output, "kept_patches", example_rows(model, analysis.dataset, examples), figure)
    return 0
