"""``pruneattn analyze kept_histogram``: patches by mean and standard deviation before and after pruning (Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UserError
from ...files import write_csv
from ...plot import keep_rate_text
from ..clips import describe_data, features_of
from ..clusters import load_clusters
from ..kept_histogram import bin_edges, measure_histograms, open_second, plot_histograms
from .options import (
    add_clusters_option,
    add_default_keep_rate_option,
    make_clips_parser,
    open_analysis,
    report_failed,
    save_result,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "kept_histogram",
        "Writes kept_histogram.csv (shares of C1 to C5 after each stage), kept_histogram.png and .pdf and, with "
        "--against, kept_ratio.csv (C1 and C2 patches that the first model keeps, relative to the second model).",
    )
    parser.add_argument("--against", metavar="CHECKPOINT", help="second checkpoint, with the same input")
    parser.add_argument(
        "--against-model", metavar="NAME", help="model of the second checkpoint if it is of another project"
    )
    add_clusters_option(parser, "clusters.json by intensity")
    add_default_keep_rate_option(parser, 0.5)
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    features = features_of(analysis.model)
    clusters = load_clusters(args.clusters, features)
    if clusters.statistic != "intensity":
        raise UserError(f"{args.clusters} has clusters by {clusters.statistic}: use clusters by intensity")
    models = [analysis.model]
    if args.against:
        models.append(open_second(analysis, args.against, args.against_model, args.score, args.stride))
    for model in models:
        model.set_keep_rate(args.keep_rate)
    histograms, rows, ratio = measure_histograms(analysis, models, clusters)
    report_failed(analysis, args.output)
    for row in rows:
        print("{number}: {model} {stage:>14}: {share:6.1%} ± {se:.1%} in {cluster}".format(**row))
    if ratio:
        print("{first} keeps {ratio:.2f} ± {se:.2f} times as many C1 and C2 patches as {second}".format(**ratio))
        write_csv(args.output / "kept_ratio.csv", [ratio])
    names = [f"kept by {number}: {model.name}, {model.score} score" for number, model in enumerate(models, 1)]
    title = f"{describe_data(analysis)}, keep-rate {keep_rate_text(args.keep_rate)}"
    figure = plot_histograms(histograms, rows, clusters, bin_edges(features), names, title)
    save_result(args.output, "kept_histogram", rows, figure)
    return 0
