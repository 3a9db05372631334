"""Accuracy by keep-rate and ranking of the patches (paper, Table I): the training runs, and their comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoints.pretrained import load_pretrained
from ..data import FeatureExtractor, make_loader
from ..errors import UserError
from ..files import atomic_write, write_json
from ..models.macs import count_macs
from ..plot import FAINT, INK, matplotlib_figure, plain_axis
from ..report import Row
from ..runtime import distributed
from ..runtime.inference import optimized, predict_dataset
from ..training import state
from ..training.build import open_split
from ..training.options import LAST, describe, differences, parse
from ..training.run import run_training
from .clips import features_of
from .paired import metric_name, paired_test, unit_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Options of training for each ranking. Attention is the model's own score.
RANKINGS: dict[str, list[str]] = {
    "attention": [],
    **{name: ["--score", name] for name in ("intensity", "variation", "random")},
}
UNPRUNED = "unpruned"
_OWN_OPTIONS = ("--output", "--seed", "--keep-rate", "--score", "--resume", "--branch-from")
_OF_A_CELL = ("seed", "keep_rate", "score")  # may differ within a table
_STYLES = {  # Okabe-Ito colors, each with its own marker
    "attention": ("#0072b2", "o"),
    "intensity": ("#d55e00", "s"),
    "variation": ("#009e73", "^"),
    "random": ("#555555", "D"),
}
_COLUMNS = (
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

#: Arrays of a cell's predictions by name: logits, targets, index, multilabel, macs.
Predictions = dict[str, NDArray[Any]]


class Cell(NamedTuple):
    """One training run of the table."""

    ranking: str  # a key of RANKINGS, or UNPRUNED
    keep_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        ranking = self.ranking if self.ranking == UNPRUNED else f"{self.ranking}-{self.keep_rate:g}"
        return f"{ranking}-seed{self.seed}"


def make_cells(rankings: Sequence[str], keep_rates: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """All cells of a table in the order of training: first the unpruned runs, from which all other runs branch."""
    for rate in keep_rates:
        if not 0 < rate < 1:
            raise UserError(f"--keep-rates {rate:g}: must be above 0 and below 1; the unpruned model is always trained")
    pruned = [Cell(ranking, rate, seed) for seed in seeds for rate in keep_rates for ranking in rankings]
    return [Cell(UNPRUNED, 1.0, seed) for seed in seeds] + pruned


class Table:
    """A folder with one training run per cell and its predictions. Several processes can share it.

    Args:
        output: folder, which must exist.
        cells: cells of the table.
        options: options of ``pruneattn train`` that all cells have, as words of a command line.

    Raises:
        UserError: training rejects the options, they set a value that belongs to a cell, or they differ from the
            options of earlier runs in the folder.
    """

    def __init__(self, output: Path, cells: Sequence[Cell], options: Sequence[str]) -> None:
        taken = [option for option in _OWN_OPTIONS if any(word.split("=")[0] == option for word in options)]
        if taken:
            raise UserError(f"{taken[0]}: every cell of the table has its own value; remove the option after --")
        self.output, self.cells, self.options = output, list(cells), list(options)
        self.settings = {cell: parse(self._command(cell)) for cell in cells}  # rejects options before any training
        self._check_options(output / "options.json")

    def _check_options(self, path: Path) -> None:
        """Reject a folder with runs that have other options: they must not share a table."""
        ours = describe(*self.settings[self.cells[0]])
        if path.exists():
            changed = differences(json.loads(path.read_text(encoding="utf-8")), ours, ignore=_OF_A_CELL)
            if changed:
                raise UserError(
                    f"{path}: this table was started with other options ({'; '.join(changed)}): use the same options, "
                    "or another --output"
                )
        else:
            write_json(path, ours)

    def predictions(self, cell: Cell) -> Path:
        """File with the predictions of a cell for the test clips. The cell is done if it exists."""
        return self.output / cell.name / "predictions.npz"

    def missing(self) -> list[Cell]:
        """The cells that are not done."""
        return [cell for cell in self.cells if not self.predictions(cell).exists()]

    def train_next(self) -> Literal["trained", "wait", "done"]:
        """Train one cell that no other process is training.

        Returns:
            ``"trained"``; ``"wait"`` if other processes are training all cells that can be trained now; ``"done"`` if
            no cell is missing.

        Raises:
            Stopped: a signal stopped the training. A later call resumes it.
            UserError: training fails, or the checkpoint to branch from was deleted.
        """
        from filelock import FileLock, Timeout

        missing = self.missing()
        for cell in missing:
            try:
                with FileLock(self.output / f".{cell.name}.lock", timeout=0):  # released even if the process is killed
                    if self.predictions(cell).exists():
                        continue
                    trunk = self._trunk(cell)
                    if trunk and not trunk.exists():
                        if (trunk.parent / state.RESULT).exists():
                            raise UserError(
                                f"{trunk} does not exist, and {cell.name} branches from it: delete the folder "
                                f"{trunk.parent}, and it will be trained again"
                            )
                        continue  # the unpruned run of this seed has not reached this point
                    self._train(cell)
                    self._predict(cell)
                    return "trained"
            except Timeout:
                continue
        return "wait" if missing else "done"

    def _train(self, cell: Cell) -> None:
        folder = self.output / cell.name
        if (folder / state.RESULT).exists():
            return
        command = self._command(cell)
        if (folder / LAST).exists():
            command.append("--resume")
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that stopped before its first checkpoint
            if trunk := self._trunk(cell):
                command += ["--branch-from", str(trunk)]
        left = len(self.missing())
        print(f"\n{cell.name} ({len(self.cells) - left} of {len(self.cells)} cells are done)", flush=True)
        try:
            run_training(*parse(command))
        finally:
            distributed.finish()

    def _command(self, cell: Cell) -> list[str]:
        ranking = RANKINGS.get(cell.ranking, [])
        own = ["--output", str(self.output / cell.name), "--seed", str(cell.seed), "--keep-rate", str(cell.keep_rate)]
        return [*self.options, *ranking, *own]

    def _trunk(self, cell: Cell) -> Path | None:
        """State of the unpruned run of the same seed before pruning starts; None if the runs share no epoch."""
        _, recipe = self.settings[cell]
        if cell.ranking == UNPRUNED or recipe.shrink_start == 0:
            return None
        return self.output / Cell(UNPRUNED, 1.0, cell.seed).name / state.TRUNK

    def _predict(self, cell: Cell) -> None:
        """Save logits and targets of the test clips, or of the validation clips if there are no test clips."""
        options, recipe = self.settings[cell]
        device = distributed.start(options.device)
        try:
            model = load_pretrained(self.output / cell.name)
            multilabel = bool(model.multilabel)
            dataset = open_split(options, recipe, "test", multilabel) or open_split(options, recipe, "val", multilabel)
            assert dataset is not None  # open_split requires the validation split
            features = FeatureExtractor(features_of(model)).to(device)
            loader = make_loader(dataset, recipe.batch_size, train=False, workers=options.workers)
            model.set_keep_rate(recipe.keep_rates)
            macs = count_macs(model).paper
            model, amp = optimized(model, device, options.amp)
            found = predict_dataset(model, features, loader, device, amp)
        finally:
            distributed.finish()
        arrays = {name: getattr(found, name).numpy() for name in ("logits", "targets", "index")}
        with atomic_write(self.predictions(cell)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays, multilabel=np.asarray(multilabel), macs=np.asarray(macs))

    def rows(self) -> list[Row]:
        """One dict per ranking and keep-rate from the cells that are done; see `compare`."""
        unpruned = {cell.seed: self._load(cell) for cell in self.cells if cell.ranking == UNPRUNED}
        rows = [{"ranking": UNPRUNED, "keep_rate": 1.0, **compare(list(unpruned.items()), {}, "unpruned")}]
        groups: dict[tuple[str, float], list[tuple[int, Predictions | None]]] = {}
        for cell in self.cells:
            if cell.ranking != UNPRUNED:
                groups.setdefault((cell.ranking, cell.keep_rate), []).append((cell.seed, self._load(cell)))
        for (ranking, rate), runs in groups.items():
            rows.append({"ranking": ranking, "keep_rate": rate, **compare(runs, unpruned, f"{ranking} at {rate:g}")})
        return rows

    def _load(self, cell: Cell) -> Predictions | None:
        path = self.predictions(cell)
        if not path.exists():
            return None
        with np.load(path) as saved:
            return {name: saved[name] for name in saved.files}


def compare(
    runs: Iterable[tuple[int, Predictions | None]], unpruned: Mapping[int, Predictions | None], name: str
) -> Row:
    """Metric of the runs of one cell, and its paired difference to the unpruned runs of the same seeds.

    Args:
        runs: ``(seed, predictions)`` of each run; None if it is not trained yet.
        unpruned: predictions of the unpruned run of each seed; None if it is not trained yet.
        name: name of the cell, for messages.

    Returns:
        dict: ``seeds`` (finished runs), ``metric_name``, ``metric`` (mean), ``metric_sd`` (over seeds), ``difference``
        to unpruned with ``difference_se`` and ``p`` of a paired t-test, in which the unit is a test clip (a class for
        mAP) whose difference is averaged over the seeds, ``difference_sd`` (over seeds), ``units`` and
        ``gmacs_paper``. Unknown values are None.

    Raises:
        UserError: two runs were tested on different clips.
    """
    done = {seed: predictions for seed, predictions in runs if predictions is not None}
    row: Row = dict.fromkeys(_COLUMNS)
    if done:
        scores = {seed: _unit_scores(predictions) for seed, predictions in done.items()}
        each = [float(np.nanmean(one)) for one in scores.values()]
        first = next(iter(done.values()))
        row |= {"metric": float(np.mean(each)), "metric_sd": _sd(each), "gmacs_paper": float(first["macs"]) / 1e9}
        row["metric_name"] = metric_name(bool(first["multilabel"]))
        row["units"] = int(np.isfinite(next(iter(scores.values()))).sum())
        pairs = {seed: theirs for seed in done if (theirs := unpruned.get(seed)) is not None}
        for seed, theirs in pairs.items():
            if not np.array_equal(done[seed]["index"], theirs["index"]):
                raise UserError(f"{name}, seed {seed}: tested on other clips than the unpruned run: train it again")
        if pairs:
            by_seed = np.stack(
                [scores[seed] - _unit_scores(theirs) for seed, theirs in pairs.items()]
            )  # [seeds, units]
            row |= paired_test(by_seed.mean(0)) | {"difference_sd": _sd(np.nanmean(by_seed, axis=1))}
    return {"seeds": len(done), **row}


def _unit_scores(predictions: Predictions) -> NDArray[np.float64]:
    return unit_scores(predictions["logits"], predictions["targets"], bool(predictions["multilabel"]))


def _sd(values: Sequence[float] | NDArray[np.float64]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def table_lines(rows: Sequence[Row], rankings: Sequence[str]) -> list[str]:
    """The table in the paper's layout, as Markdown: a line per keep-rate, a column per ranking, in percent."""
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


def _gmacs(row: Row) -> str:
    return "-" if row["gmacs_paper"] is None else f"{row['gmacs_paper']:.3g}"


def _cell(row: Row) -> str:
    if row["metric"] is None:
        return "-"
    text = f"{100 * row['metric']:.2f}"
    if row["difference"] is not None:
        star = "*" if row["p"] < 0.05 else ""
        text += f" ({100 * row['difference']:+.2f} ± {100 * row['difference_se']:.2f}{star})"
    return text


def plot_table1(rows: Sequence[Row], rankings: Sequence[str], title: str) -> Figure:
    """Draw the metric by keep-rate: a line per ranking, with the standard error of its difference to unpruned."""
    Figure = matplotlib_figure()
    figure = Figure(figsize=(6.2, 4.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    unpruned = rows[0]["metric"]
    if unpruned is not None:
        axis.axhline(100 * unpruned, color=FAINT, lw=1, ls="--", label="unpruned")
    for number, ranking in enumerate(rankings):
        mine = [row for row in rows if row["ranking"] == ranking and row["metric"] is not None]
        mine.sort(key=lambda row: row["keep_rate"])
        color, marker = _STYLES[ranking]
        shift = 0.004 * (number - (len(rankings) - 1) / 2)  # so that error bars do not overlap
        axis.errorbar(
            [row["keep_rate"] + shift for row in mine],
            [100 * row["metric"] for row in mine],
            [100 * (row["difference_se"] or 0) for row in mine],
            color=color,
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
