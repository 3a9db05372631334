"""Fig. 6: mean and deviation of the patches before and after pruning, and how many quiet ones two models keep.

    python python/kept_histogram.py runs/audiomae_tiny_esc50 --against runs/ast_tiny_esc50 --dataset esc50 \\
        --clusters intensity.json --keep-rate 0.5

Writes kept_histogram.csv (shares of C1 to C5 after each stage), kept_histogram.png and .pdf.
"""

from pruneattn.analysis.clusters import load_clusters
from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.analysis.kept_histogram import measure_histograms, open_second, plot_histograms
from pruneattn.errors import UserError, run_command


def main(argv=None):
    parser = make_parser("kept_histogram", __doc__.splitlines()[0])
    parser.add_argument("--against", metavar="CHECKPOINT", help="a second checkpoint that reads the same input")
    parser.add_argument("--clusters", required=True, metavar="JSON", help="clusters.json of python/clusters.py")
    parser.add_argument("--keep-rate", type=float, default=0.5, metavar="R", help="(default: 0.5)")
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = load_clusters(args.clusters, analysis.model.features)
    if clusters.statistic != "intensity":
        raise UserError(f"{args.clusters}: clusters by {clusters.statistic}; this figure needs those by intensity")
    models = [analysis.model] + ([open_second(analysis, args.against)] if args.against else [])
    for model in models:
        model.set_keep_rate(args.keep_rate)
    histograms, rows, ratio = measure_histograms(analysis, models, clusters)
    report_failed(analysis)
    for row in rows:
        print("{model} {stage:>14}: {share:6.1%} ± {se:.1%} in {cluster}".format(**row))
    if ratio:
        times = f"{ratio[0]:.2f} ± {ratio[1]:.2f} times as many C1 and C2 patches as"
        print(f"{models[0].name} keeps {times} {models[1].name}")
    names = [f"kept by {model.name} at {args.keep_rate:g}" for model in models]
    title = describe_data(analysis)
    figure = plot_histograms(histograms, rows, clusters, names, title)
    save_result(args.output, "kept_histogram", rows, figure)


if __name__ == "__main__":
    run_command(main)
