"""The metric by keep-rate and ranking (paper, Table I): which cells to train, and what they say against unpruned."""

import json
import shutil
from typing import NamedTuple

import numpy as np

from .. import train
from ..checkpoints.pretrained import load_pretrained
from ..data import FeatureExtractor, make_loader
from ..errors import UserError
from ..files import atomic_write, write_json
from ..models.macs import count_macs
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from ..runtime import distributed
from ..runtime.inference import optimized, predict_dataset
from ..training import state
from ..training.build import open_split
from ..training.options import describe, differences, parse
from .paired import metric_name, paired_test, unit_scores

#: Name of a ranking -> the option that trains with it; attention is the model's own score.
RANKINGS = {"attention": []} | {name: ["--score", name] for name in ("intensity", "variation", "random")}
UNPRUNED = "unpruned"
_OWN_OPTIONS = ("--output", "--seed", "--keep-rate", "--score", "--resume", "--branch-from")
_OF_A_CELL = ("seed", "keep_rate", "score")  # may differ within a table
_STYLES = {  # Okabe-Ito colours, each with a marker of its own
    "attention": ("#0072b2", "o"),
    "intensity": ("#d55e00", "s"),
    "variation": ("#009e73", "^"),
    "random": ("#555555", "D"),
}


class Cell(NamedTuple):
    """One training run of the table."""

    ranking: str  # a key of RANKINGS, or UNPRUNED
    keep_rate: float
    seed: int

    @property
    def name(self):
        ranking = self.ranking if self.ranking == UNPRUNED else f"{self.ranking}-{self.keep_rate:g}"
        return f"{ranking}-seed{self.seed}"


def make_cells(rankings, keep_rates, seeds):
    """All cells of a table, in the order in which to train them: the unpruned runs first, from which others branch."""
    for rate in keep_rates:
        if not 0 < rate < 1:
            raise UserError(f"--keep-rates {rate:g}: must be above 0 and below 1; unpruned is trained in any case")
    pruned = [Cell(ranking, rate, seed) for seed in seeds for rate in keep_rates for ranking in rankings]
    return [Cell(UNPRUNED, 1.0, seed) for seed in seeds] + pruned


class Table:
    """A folder with one training run per cell and its predictions, shared by any number of processes.

    Args:
        output: folder, made if need be.
        cells: list of `Cell`.
        options: options of ``pruneattn.train`` that all cells have, as a list of words.

    Raises:
        UserError: the options are not train's, set what belongs to a cell, or are not those that the folder's runs
            were trained with.
    """

    def __init__(self, output, cells, options):
        taken = [option for option in _OWN_OPTIONS if any(word.split("=")[0] == option for word in options)]
        if taken:
            raise UserError(f"{taken[0]}: every cell of the table has its own; leave it out after --")
        self.output, self.cells, self.options = output, cells, list(options)
        self.settings = {cell: parse(self._command(cell)) for cell in cells}  # wrong options end here, not in an hour
        self._check_options(output / "options.json")

    def _check_options(self, path):
        """Runs of different options must not stand in one table."""
        ours = describe(*self.settings[self.cells[0]])
        if path.exists():
            changed = differences(json.loads(path.read_text(encoding="utf-8")), ours, ignore=_OF_A_CELL)
            if changed:
                raise UserError(
                    f"{path}: this table was begun with other options ({'; '.join(changed)}): "
                    "give the same, or another --output"
                )
        else:
            write_json(path, ours)

    def predictions(self, cell):
        """File with the cell's predictions on the test clips; once it is there, the cell is done."""
        return self.output / cell.name / "predictions.npz"

    def missing(self):
        return [cell for cell in self.cells if not self.predictions(cell).exists()]

    def train_next(self):
        """Train one cell that nobody is at work on.

        Returns:
            ``"trained"``; ``"wait"``: others are at work on all that could be done now; ``"done"``: nothing is left;
            or train's exit code, an int, where it was stopped by a signal.
        """
        from filelock import FileLock, Timeout

        missing = self.missing()
        for cell in missing:
            try:
                with FileLock(self.output / f".{cell.name}.lock", timeout=0):  # let go of even by a kill
                    if self.predictions(cell).exists():
                        continue
                    trunk = self._trunk(cell)
                    if trunk and not trunk.exists():
                        if (trunk.parent / state.RESULT).exists():
                            raise UserError(
                                f"{trunk} is gone, from which {cell.name} would branch: delete the folder "
                                f"{trunk.parent} to have it trained again"
                            )
                        continue  # the unpruned run of this seed is not that far
                    code = self._train(cell)
                    if code:
                        return code
                    self._predict(cell)
                    return "trained"
            except Timeout:
                continue
        return "wait" if missing else "done"

    def _train(self, cell):
        folder = self.output / cell.name
        if (folder / state.RESULT).exists():
            return 0
        command = self._command(cell)
        if (folder / state.LAST).exists():
            command.append("--resume")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # stopped before there was anything to go on from
            if trunk := self._trunk(cell):
                command += ["--branch-from", str(trunk)]
        left = len(self.missing())
        print(f"\n{cell.name} ({len(self.cells) - left} of {len(self.cells)} cells are done)", flush=True)
        return train.main(command)

    def _command(self, cell):
        ranking = RANKINGS.get(cell.ranking, [])
        own = ["--output", str(self.output / cell.name), "--seed", str(cell.seed), "--keep-rate", str(cell.keep_rate)]
        return [*self.options, *ranking, *own]

    def _trunk(self, cell):
        """What the unpruned run of the same seed saves before pruning would begin; None where nothing is in common."""
        _, recipe = self.settings[cell]
        if cell.ranking == UNPRUNED or recipe.shrink_start == 0:
            return None
        return self.output / Cell(UNPRUNED, 1.0, cell.seed).name / state.TRUNK

    def _predict(self, cell):
        """Save logits and targets of the test clips (of the validation clips, where there are no others)."""
        options, recipe = self.settings[cell]
        device = distributed.start(options.device)
        try:
            model = load_pretrained(self.output / cell.name)
            test_set = open_split(options, recipe, "test", model.multilabel)
            dataset = test_set or open_split(options, recipe, "val", model.multilabel)
            features = FeatureExtractor(model.features).to(device)
            loader = make_loader(dataset, recipe.batch_size, train=False, workers=options.workers)
            model.set_keep_rate(recipe.keep_rates)
            macs = count_macs(model).paper
            model, amp = optimized(model, device, options.amp)
            found = predict_dataset(model, features, loader, device, amp)
        finally:
            distributed.finish()
        arrays = {name: getattr(found, name).numpy() for name in ("logits", "targets", "index")}
        with atomic_write(self.predictions(cell)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, multilabel=model.multilabel, macs=macs)

    def rows(self):
        """What is known so far, a dict per ranking and keep-rate; see `compare`."""
        unpruned = {cell.seed: self._load(cell) for cell in self.cells if cell.ranking == UNPRUNED}
        rows = [{"ranking": UNPRUNED, "keep_rate": 1.0, **compare(list(unpruned.items()), {}, "unpruned")}]
        groups = {}
        for cell in self.cells:
            if cell.ranking != UNPRUNED:
                groups.setdefault(cell[:2], []).append((cell.seed, self._load(cell)))
        for (ranking, rate), runs in groups.items():
            rows.append({"ranking": ranking, "keep_rate": rate, **compare(runs, unpruned, f"{ranking} at {rate:g}")})
        return rows

    def _load(self, cell):
        path = self.predictions(cell)
        if not path.exists():
            return None
        with np.load(path) as saved:
            return {name: saved[name] for name in saved.files}


def compare(runs, unpruned, name):
    """Metric of the runs of one cell, and its paired difference to the unpruned runs of the same seeds.

    Args:
        runs: list of ``(seed, predictions)``; None for what is not trained yet.
        unpruned: dict of seed to predictions, None likewise.
        name: of the cell, for messages.

    Returns:
        dict: ``seeds`` (runs done), ``metric_name``, ``metric`` (mean), ``metric_sd`` (over seeds), ``difference`` to
        unpruned with ``difference_se`` and ``p`` of a paired t-test, in which the unit is a test clip (a class for
        mAP) whose difference is averaged over the seeds, ``difference_sd`` (over seeds), ``units`` and
        ``gmacs_paper``. None for what cannot be told yet.

    Raises:
        UserError: two runs were tested on different clips.
    """
    done = {seed: predictions for seed, predictions in runs if predictions is not None}
    row = dict.fromkeys(
        (
            "metric_name",
            "metric",
            "metric_sd",
            "difference",
            "difference_se",
            "difference_sd",
            "p",
            "units",
            "gmacs_paper",
        )
    )
    if done:
        scores = {seed: _unit_scores(predictions) for seed, predictions in done.items()}
        each = [np.nanmean(one) for one in scores.values()]
        first = next(iter(done.values()))
        row |= {"metric": float(np.mean(each)), "metric_sd": _sd(each), "gmacs_paper": float(first["macs"]) / 1e9}
        row["metric_name"] = metric_name(first["multilabel"])
        row["units"] = int(np.isfinite(next(iter(scores.values()))).sum())
        pairs = [(scores[seed], unpruned[seed]) for seed in done if unpruned.get(seed) is not None]
        if pairs:
            for seed in done:
                if unpruned.get(seed) is not None and not np.array_equal(done[seed]["index"], unpruned[seed]["index"]):
                    raise UserError(f"{name}, seed {seed}: tested on other clips than unpruned; train it again")
            by_seed = np.stack([ours - _unit_scores(theirs) for ours, theirs in pairs])  # [seeds, units]
            row |= paired_test(by_seed.mean(0)) | {"difference_sd": _sd(np.nanmean(by_seed, axis=1))}
    return {"seeds": len(done), **row}


def _unit_scores(predictions):
    return unit_scores(predictions["logits"], predictions["targets"], predictions["multilabel"])


def _sd(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def table_lines(rows, rankings):
    """The table as the paper lays it out: a line per keep-rate, a column per ranking, in percent."""
    lines = ["| keep-rate | GMACs | " + " | ".join(rankings) + " |", "|---" * (2 + len(rankings)) + "|"]
    unpruned = rows[0]
    cells = [_cell(unpruned)] + [""] * (len(rankings) - 1)
    lines.append(f"| 1 (unpruned) | {_gmacs(unpruned)} | " + " | ".join(cells) + " |")
    for rate in dict.fromkeys(row["keep_rate"] for row in rows[1:]):
        of_rate = {row["ranking"]: row for row in rows if row["keep_rate"] == rate}
        cells = [_cell(of_rate[ranking]) for ranking in rankings]
        gmacs = next((row for row in of_rate.values() if row["gmacs_paper"]), unpruned | {"gmacs_paper": None})
        lines.append(f"| {rate:g} | {_gmacs(gmacs)} | " + " | ".join(cells) + " |")
    return lines


def _gmacs(row):
    return "-" if row["gmacs_paper"] is None else f"{row['gmacs_paper']:.3g}"


def _cell(row):
    if row["metric"] is None:
        return "-"
    text = f"{100 * row['metric']:.2f}"
    if row["difference"] is not None:
        star = "*" if row["p"] < 0.05 else ""
        text += f" ({100 * row['difference']:+.2f} ± {100 * row['difference_se']:.2f}{star})"
    return text


def plot_table1(rows, rankings, title):
    """Metric by keep-rate, a line per ranking with the standard error of its difference to unpruned."""
    Figure = matplotlib_figure()
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    unpruned = rows[0]["metric"]
    if unpruned is not None:
        axis.axhline(100 * unpruned, color=FAINT, lw=1, ls="--", label="unpruned")
    for number, ranking in enumerate(rankings):
        mine = [row for row in rows if row["ranking"] == ranking and row["metric"] is not None]
        mine.sort(key=lambda row: row["keep_rate"])
        colour, marker = _STYLES[ranking]
        shift = 0.004 * (number - (len(rankings) - 1) / 2)  # error bars side by side
        axis.errorbar(
            [row["keep_rate"] + shift for row in mine],
            [100 * row["metric"] for row in mine],
            [100 * (row["difference_se"] or 0) for row in mine],
            color=colour,
            marker=marker,
            ms=5,
            lw=1.4,
            capsize=3,
            label=ranking,
        )
    axis.set_xticks(sorted({row["keep_rate"] for row in rows[1:]}))
    axis.invert_xaxis()
    axis.set_xlabel("keep-rate")
    metric = next((row["metric_name"] for row in rows if row["metric_name"]), "metric")
    axis.set_ylabel(f"{metric} (%)")
    plain_axis(axis)
    axis.legend(frameon=False, fontsize=8.5)
    axis.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK)
    return figure
