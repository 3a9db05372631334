"""``pruneattn analyze remove_clusters``: accuracy without quiet or without loud patches, by depth (paper, Table IV)."""

from __future__ import annotations

from collections.abc import Sequence

from ..clips import describe_data, features_of
from ..clusters import load_clusters
from ..remove_clusters import check_depths, default_depths, measure_removal, plot_removal
from .options import add_clusters_option, make_clips_parser, open_analysis, report_failed, save_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "remove_clusters",
        "The tokens of the clusters C1 and C2 (low) or C4 and C5 (high) are removed from the unpruned model. Writes "
        "remove_clusters.csv, .png and .pdf.",
    )
    add_clusters_option(parser)
    parser.add_argument(
        "--after-block",
        type=int,
        nargs="+",
        metavar="N",
        help="number of blocks before the removal; 0 removes before the first block (default: six depths, evenly "
        "spaced)",
    )
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = load_clusters(args.clusters, features_of(analysis.model))
    depth = len(analysis.model.blocks)
    after_blocks = sorted(set(args.after_block or default_depths(depth)))
    check_depths(after_blocks, depth)
    rows = measure_removal(analysis, clusters, after_blocks)
    report_failed(analysis, args.output)
    print(f"{rows[0]['metric_name']} with all tokens {rows[0]['unpruned']:.2%} ({rows[0]['clips']} clips)")
    for row in rows:
        print(
            "without {removed:>4} after block {after_block:2}: {metric:.2%} ({difference:+.2%} ± {difference_se:.2%}), "
            "{tokens_removed:.0%} of the tokens removed, {clips_without_tokens} clips without tokens".format(**row)
        )
    title = f"{analysis.model.name} on {describe_data(analysis)}, by {clusters.statistic}"
    save_result(args.output, "remove_clusters", rows, plot_removal(rows, title))
    return 0
