"""``pruneattn analyze precision``: accuracy in float32, in bfloat16 and with 8-bit weights, on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from ...cli import add_calibrate_option, add_keep_rates_option, calibration_batches, check_least
from ...files import write_csv
from ...plot import keep_rate_text
from ..precision import measure_precision
from .options import make_clips_parser, open_analysis, report_failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the analysis with these command-line arguments, and return the exit code."""
    parser = make_clips_parser(
        "precision",
        "Each is compared with float32 on the same clips, by the metric, the logits and the kept patches. Writes "
        "precision.csv.",
    )
    parser.set_defaults(device="cpu")
    add_keep_rates_option(parser, (1.0, 0.7, 0.5), per_block=True)
    add_calibrate_option(parser)
    args = parser.parse_args(argv)
    check_least(args, calibrate=0)
    analysis = open_analysis(args)
    rows, model = measure_precision(analysis, args.keep_rates, calibration_batches(args, analysis.model))
    report_failed(analysis, args.output)
    for row in rows:
        print(
            "keep-rate {rate:>4}, {precision}: {metric_name} {metric:.2%} ({difference:+.2%} ± {difference_se:.2%}), "
            "logits differ by {logits_error:.2%}, {same_patches:.1%} of the kept patches are the same".format(
                rate=keep_rate_text(row["keep_rate"]), **row
            )
        )
    if model.quantization is not None:
        print(model.quantization)
    write_csv(args.output / "precision.csv", rows)
    print(f"Saved {args.output / 'precision.csv'}")
    return 0
