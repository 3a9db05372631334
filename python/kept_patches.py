"""Fig. 1 and 3: the spectrogram beside what is left after each pruning stage, several clips on a page.

    python python/kept_patches.py runs/audiomae_tiny_esc50 --dataset esc50 --keep-rate 0.5 --clips 4

Writes kept_patches.png and .pdf with kept_patches.csv (the clips shown), and kept_shares.csv: over all clips, how much
of what is left is sound, pause and padding.
"""

from pruneattn.analysis.command import describe_data, make_parser, open_analysis, report_failed, save_result
from pruneattn.analysis.kept_patches import example_rows, measure_kept, plot_page
from pruneattn.cli import check_least, run_command
from pruneattn.files import write_csv


def main(argv=None):
    parser = make_parser("kept_patches", __doc__.splitlines()[0])
    parser.add_argument("--keep-rate", type=float, default=0.5, metavar="R", help="(default: 0.5)")
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="clips to show (default: 4)")
    parser.add_argument("--match", nargs="+", default=(), metavar="TEXT", help="only clips whose path contains a text")
    args = parser.parse_args(argv)
    check_least(args, clips=1)
    analysis = open_analysis(args)
    model = analysis.model
    model.set_keep_rate(args.keep_rate)
    rows, examples = measure_kept(analysis, args.clips, args.match)
    report_failed(analysis)
    for row in rows:
        print("{stage:>14} ({patches} patches): {share:6.1%} ± {se:.1%} {kind}".format(**row))
    write_csv(args.output / "kept_shares.csv", rows)
    title = f"{model.name}, {model.score} score, keep-rate {args.keep_rate:g}: {describe_data(analysis)}"
    figure = plot_page(model, analysis.dataset, examples, title)
    save_result(args.output, "kept_patches", example_rows(model, analysis.dataset, examples), figure)


if __name__ == "__main__":
    run_command(main)
