"""Table III and Fig. 5: group the patches of a data set into five clusters by intensity or variation.

    python python/clusters.py runs/audiomae_tiny_esc50 --dataset esc50 --statistic intensity

Writes clusters.csv (share, centre and range of C1 to C5), clusters.png and .pdf, and clusters.json, which the scripts
kendall.py, remove_clusters.py and kept_histogram.py read.
"""

from pruneattn.analysis.clusters import STATISTICS, cluster_rows, find_clusters, plot_clusters
from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.cli import run_command


def main(argv=None):
    parser = make_parser("clusters", __doc__.splitlines()[0])
    parser.add_argument(
        "--statistic",
        choices=tuple(STATISTICS),
        default="intensity",
        help="mean or standard deviation of a patch's normalised log-mel (default: intensity)",
    )
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters, counts, examples = find_clusters(analysis, args.statistic, describe_data(analysis))
    report_failed(analysis)
    rows = cluster_rows(clusters)
    for row in rows:
        print(f"{row['cluster']}: {row['share']:6.1%} of the patches, around {row['centre']:+.3f}")
    clusters.save(args.output / "clusters.json")
    figure = plot_clusters(analysis.model, analysis.dataset, clusters, counts, examples)
    save_result(args.output, "clusters", rows, figure)


if __name__ == "__main__":
    run_command(main)
