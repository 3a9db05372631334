"""Fig. 6: mean and deviation of the patches before and after pruning, and how many quiet ones two models keep.

    python python/kept_histogram.py runs/audiomae_tiny_esc50 --against runs/ast_tiny_esc50 --dataset esc50 \\
        --clusters intensity.json --keep-rate 0.5

Writes kept_histogram.csv (shares of C1 to C5 after each stage), kept_histogram.png and .pdf and, with --against,
kept_ratio.csv (how many patches of C1 and C2 the first model keeps for one that the second keeps).
"""

from pruneattn.analysis.clusters import load_clusters
from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.analysis.kept_histogram import bin_edges, measure_histograms, open_second, plot_histograms
from pruneattn.cli import run_command
from pruneattn.errors import UserError
from pruneattn.files import write_csv


def main(argv=None):
    parser = make_parser("kept_histogram", __doc__.splitlines()[0])
    parser.add_argument("--against", metavar="CHECKPOINT", help="a second checkpoint that reads the same input")
    parser.add_argument("--against-model", metavar="NAME", help="its model, if it is a checkpoint of another project")
    parser.add_argument("--clusters", required=True, metavar="JSON", help="clusters.json of python/clusters.py")
    parser.add_argument("--keep-rate", type=float, default=0.5, metavar="R", help="(default: 0.5)")
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = load_clusters(args.clusters, analysis.model.features)
    if clusters.statistic != "intensity":
        raise UserError(f"{args.clusters}: clusters by {clusters.statistic}; this figure needs those by intensity")
    models = [analysis.model]
    if args.against:
        models.append(open_second(analysis, args.against, args.against_model))
    for model in models:
        model.set_keep_rate(args.keep_rate)
    histograms, rows, ratio = measure_histograms(analysis, models, clusters)
    report_failed(analysis)
    for row in rows:
        print("{number}: {model} {stage:>14}: {share:6.1%} ± {se:.1%} in {cluster}".format(**row))
    if ratio:
        print("{first} keeps {ratio:.2f} ± {se:.2f} times as many C1 and C2 patches as {second}".format(**ratio))
        write_csv(args.output / "kept_ratio.csv", [ratio])
    names = [f"kept by {number}: {model.name}, {model.score} score" for number, model in enumerate(models, 1)]
    title = f"{describe_data(analysis)}, keep-rate {args.keep_rate:g}"
    edges = bin_edges(analysis.model.features)
    figure = plot_histograms(histograms, rows, clusters, edges, names, title)
    save_result(args.output, "kept_histogram", rows, figure)


if __name__ == "__main__":
    run_command(main)
