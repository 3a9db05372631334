"""Rows of all benchmarks: one versioned schema for JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pruneattn.errors import UserError
from pruneattn.files import atomic_write, write_csv

#: A row of a result: dict with `COLUMNS`.
Row = dict[str, Any]

#: Increased when a column changes its name or its meaning.
SCHEMA = 1

#: The measured work.
CASE = ("level", "subject", "device", "dtype", "batch", "tokens")
#: The provider and its settings. `CASE` and `VARIANT` together identify a row.
VARIANT = ("provider", "backend", "keep_rate", "part")
#: Measurements. Times, multiply-accumulates (MACs) and bytes are those of one call with its whole batch.
#:
#: - ``status``: "ok", or why there is no time: "left out: ...", "out of memory", "wrong: ..." (not the reference's
#:   result)
#: - ``timing``: the clock; see `measure`
#: - ``p20_ms``, ``p50_ms``, ``p80_ms``: percentiles of ``rounds`` rounds, interleaved over the providers of a case
#: - ``macs_paper``: MACs by the paper's count; ``macs_computed``: MACs of the matrix products that run
#: - ``bytes``: smallest number of bytes to read and write
#: - ``floor_ms``: the longer of two times: the computed MACs at the speed of a large matrix product, and the bytes at
#:   the speed of a large copy, both measured in the same run
#: - ``floor_share``: floor_ms / p50_ms; above 1 where caches are faster than the copy
#: - ``peak_memory_mib``: memory that a call adds at its peak
#: - ``saving``: 1 - p50_ms / p50_ms of the fastest unpruned provider of the case
#: - ``theory``: 1 - macs_paper / macs_paper without pruning
#: - ``realised``: saving / theory. These three are None where nothing is pruned.
MEASURED = (
    "status",
    "timing",
    "p20_ms",
    "p50_ms",
    "p80_ms",
    "rounds",
    "clips_per_second",
    "macs_paper",
    "macs_computed",
    "bytes",
    "floor_ms",
    "floor_share",
    "peak_memory_mib",
    "saving",
    "theory",
    "realised",
)
COLUMNS = CASE + VARIANT + MEASURED


def row_of(**values: Any) -> Row:
    """Make a row with every column. Columns without a value are None.

    Raises:
        TypeError: a name is not a column.
    """
    unknown = values.keys() - set(COLUMNS)
    if unknown:
        raise TypeError(f"no such columns: {', '.join(sorted(unknown))}")
    return {name: values.get(name) for name in COLUMNS}


def key_of(row: Row) -> tuple:
    """The case and the variant of a row, which identify it."""
    return tuple(row[name] for name in CASE + VARIANT)


def name_of(row: Row) -> str:
    """A row's variant in words: ``"ours, cpu, 0.5"``."""
    return ", ".join(
        f"{row[name]:g}" if name == "keep_rate" else row[name] for name in VARIANT if row[name] is not None
    )


def case_name(row: Row) -> str:
    """A row's case in words."""
    return f"{row['subject']}, {row['device']}, {row['dtype']}, batch {row['batch']}, {row['tokens']} tokens"


class ResultFile:
    """A result on disk that grows: JSON, and CSV with the same rows and the machine in the first columns.

    Each `add` writes the files atomically, so that an interrupted run leaves its results.

    Args:
        folder: folder of the files.
        kind: first part of the file names, ``"cpu"`` or ``"gpu"``.
        machine: description of the machine; its ``date`` is the second part of the file names.

    Attributes:
        path: the JSON file.
    """

    def __init__(self, folder: str | Path, kind: str, machine: Mapping[str, Any]):
        self.machine = machine
        self._rows: dict[tuple, Row] = {}
        self.path = Path(folder) / f"{kind}-{machine['date'][:19].replace(':', '')}.json"

    @property
    def rows(self) -> list[Row]:
        """All rows so far."""
        return list(self._rows.values())

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows and write the files. A row replaces an earlier row with the same key.

        Raises:
            UserError: the folder cannot be written.
        """
        self._rows |= {key_of(row): row for row in rows}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write into {self.path.parent}: {error.strerror}; choose another folder with --bench-output"
            ) from error
        with atomic_write(self.path) as temporary:
            result = {"schema": SCHEMA, "machine": self.machine, "rows": self.rows}
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        machine = {
            name: json.dumps(value) if isinstance(value, dict) else value for name, value in self.machine.items()
        }
        write_csv(self.path.with_suffix(".csv"), [{"schema": SCHEMA, **machine, **row} for row in self.rows])


def read_result(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """Read ``machine`` and ``rows`` of a result file (JSON).

    Raises:
        UserError: the file does not exist, is not a result of these benchmarks, or has another schema.
    """
    remedy = "use the .json file that `pytest bench/ --benchmark-only` wrote"
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        schema, machine, rows = result["schema"], result["machine"], result["rows"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a result of these benchmarks; {remedy}") from error
    if schema != SCHEMA:
        raise UserError(f"{path}: has schema {schema}, this program reads {SCHEMA}; measure again with this version")
    if not rows or any(set(row) != set(COLUMNS) for row in rows):
        raise UserError(f"{path}: has no rows, or rows with other columns than those of schema {SCHEMA}; {remedy}")
    return machine, rows
