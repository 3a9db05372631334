"""``pruneattn analyze clusters``: the patches of a dataset in five clusters (paper, Table III and Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from ..clusters import STATISTICS, cluster_rows, find_clusters, plot_clusters
from .options import make_clips_parser, open_analysis, report_failed, save_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "clusters",
        "Writes clusters.csv (share, center and range of C1 to C5), clusters.png and .pdf, and clusters.json, which "
        "kendall, remove_clusters and kept_histogram read.",
    )
    parser.add_argument(
        "--statistic",
        choices=tuple(STATISTICS),
        default="intensity",
        help="mean (intensity) or standard deviation (variation) of a patch's normalized log-mel (default: intensity)",
    )
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters, counts, examples = find_clusters(analysis, args.statistic)
    report_failed(analysis, args.output)
    rows = cluster_rows(clusters)
    for row in rows:
        print(f"{row['cluster']}: {row['share']:6.1%} of the patches, around {row['centre']:+.3f}")
    clusters.save(args.output / "clusters.json")
    figure = plot_clusters(analysis.model, analysis.dataset, clusters, counts, examples)
    save_result(args.output, "clusters", rows, figure)
    return 0
