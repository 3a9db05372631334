"""Table IV: how much the unpruned model loses without its quiet or without its loud tokens, by depth.

    python python/remove_clusters.py runs/ast_tiny_esc50 --dataset esc50 --clusters intensity.json

Tokens of the clusters C1 and C2 (low) or C4 and C5 (high, from python/clusters.py) are taken out after a block. Writes
remove_clusters.csv, .png and .pdf.
"""

from pruneattn.analysis.clusters import load_clusters
from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.analysis.remove_clusters import check_depths, default_depths, measure_removal, plot_removal
from pruneattn.cli import run_command


def main(argv=None):
    parser = make_parser("remove_clusters", __doc__.splitlines()[0])
    parser.add_argument("--clusters", required=True, metavar="JSON", help="clusters.json of python/clusters.py")
    parser.add_argument(
        "--after-block",
        type=int,
        nargs="+",
        metavar="N",
        help="remove after so many blocks; 0: before the first (default: six depths, evenly spread)",
    )
    args = parser.parse_args(argv)
    analysis = open_analysis(args)
    clusters = load_clusters(args.clusters, analysis.model.features)
    depth = len(analysis.model.blocks)
    after_blocks = sorted(set(args.after_block or default_depths(depth)))
    check_depths(after_blocks, depth)
    rows = measure_removal(analysis, clusters, after_blocks)
    report_failed(analysis)
    print(f"{rows[0]['metric_name']} with all tokens {rows[0]['unpruned']:.2%} ({rows[0]['clips']} clips)")
    for row in rows:
        print(
            "without {removed:>4} after block {after_block:2}: {metric:.2%} ({difference:+.2%} ± {difference_se:.2%}), "
            "{tokens_removed:.0%} of the tokens, {clips_without_tokens} clips without any left".format(**row)
        )
    title = f"{analysis.model.name} on {describe_data(analysis)}, by {clusters.statistic}"
    save_result(args.output, "remove_clusters", rows, plot_removal(rows, title))


if __name__ == "__main__":
    run_command(main)
