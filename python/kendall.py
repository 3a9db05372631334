"""Fig. 4: does attention follow intensity or variation? Kendall's coefficient with the clusters, block by block.

    python python/kendall.py runs/ast_tiny_esc50 --dataset esc50 --clusters intensity.json variation.json

The attention score of each patch in each block of the unpruned model is held against the number of the patch's cluster
(C1 to C5, from python/clusters.py). Writes kendall.csv, .png and .pdf.
"""

from pruneattn.analysis.clusters import load_clusters
from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.analysis.kendall import measure_kendall, plot_kendall
from pruneattn.cli import run_command
from pruneattn.errors import UserError


def main(argv=None):
    parser = make_parser("kendall", __doc__.splitlines()[0])
    parser.add_argument(
        "--clusters", nargs="+", required=True, metavar="JSON", help="clusters.json of python/clusters.py, one or two"
    )
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = [load_clusters(path, analysis.model.features) for path in args.clusters]
    if len({one.statistic for one in clusters}) < len(clusters):
        raise UserError(f"--clusters: two files cluster by {clusters[0].statistic}; give one per statistic")
    rows = measure_kendall(analysis, clusters)
    report_failed(analysis)
    for row in rows:
        print("{statistic}, block {block:2}, {variant:>5}: {coefficient:+.3f} ± {se:.3f} ({clips} clips)".format(**row))
    title = f"{analysis.model.name} on {describe_data(analysis)}"
    save_result(args.output, "kendall", rows, plot_kendall(rows, title, analysis.model.prune_blocks))


if __name__ == "__main__":
    run_command(main)
