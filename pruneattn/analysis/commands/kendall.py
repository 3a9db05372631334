"""``pruneattn analyze kendall``: agreement between attention score and patch statistics by block (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError
from ..clips import describe_data, features_of
from ..clusters import load_clusters
from ..kendall import measure_kendall, plot_kendall
from .options import add_clusters_option, make_clips_parser, open_analysis, report_failed, save_result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "kendall",
        "The attention score of each patch in each block of the unpruned model is compared with the number of the "
        "patch's cluster, C1 to C5. Writes kendall.csv, .png and .pdf.",
    )
    add_clusters_option(parser, "one or two clusters.json, one for each statistic,", nargs="+")
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = [load_clusters(path, features_of(analysis.model)) for path in args.clusters]
    if len({one.statistic for one in clusters}) < len(clusters):
        raise UserError(f"--clusters: two files have clusters by {clusters[0].statistic}: use one for each statistic")
    rows = measure_kendall(analysis, clusters)
    report_failed(analysis, args.output)
    for row in rows:
        print("{statistic}, block {block:2}, {variant:>5}: {coefficient:+.3f} ± {se:.3f} ({clips} clips)".format(**row))
    title = f"{analysis.model.name} on {describe_data(analysis)}"
    save_result(args.output, "kendall", rows, plot_kendall(rows, title, analysis.model.prune_blocks))
    return 0
