"""The rows of all benchmarks: one versioned schema for JSON and CSV."""

import json
from pathlib import Path

from pruneattn.errors import UserError
from pruneattn.files import atomic_write, write_csv

#: Changes whenever a column changes its name or its meaning.
SCHEMA = 1

#: What was run.
CASE = ("level", "subject", "device", "dtype", "batch", "tokens")
#: Who ran it and how. With the case this names a row.
VARIANT = ("provider", "backend", "keep_rate", "part")
#: What came of it. Times, multiply-accumulates (MACs) and bytes are those of one call with its whole batch.
#:
#: - ``status``: "ok", or why there is no time: "left out: ...", "out of memory", "wrong: ..." (not the reference's result)
#: - ``timing``: which clock; see `measure`
#: - ``p20_ms``, ``p50_ms``, ``p80_ms``: percentiles of ``rounds`` rounds, in which the providers of a case take turns
#: - ``macs_paper``, ``macs_computed``: as the paper counts, and of the matrix products that are really run
#: - ``bytes``: what has to be read and written at least
#: - ``floor_ms``: the longer of the computed MACs at the speed of a large matrix product and the bytes at that of a large
#:   copy, both measured in the same run; ``floor_share``: floor_ms / p50_ms (above 1 where caches beat the copy)
#: - ``peak_memory_mib``: what a call adds at most to the memory in use
#: - ``saving`` = 1 - p50_ms / that of the fastest unpruned provider of the case; ``theory`` = 1 - macs_paper / the
#:   unpruned macs_paper; ``realised`` = saving / theory. None where nothing is pruned.
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


def row_of(**values):
    """A row with every column, None where nothing is given."""
    unknown = values.keys() - set(COLUMNS)
    if unknown:
        raise TypeError(f"no such columns: {', '.join(sorted(unknown))}")
    return {name: values.get(name) for name in COLUMNS}


def key_of(row):
    """What names a row: its case and its variant, as a tuple."""
    return tuple(row[name] for name in CASE + VARIANT)


def name_of(row):
    """A row's variant in words: ``"ours, cpu, 0.5"``."""
    return ", ".join(
        f"{row[name]:g}" if name == "keep_rate" else row[name] for name in VARIANT if row[name] is not None
    )


def case_name(row):
    """A row's case in words."""
    return f"{row['subject']}, {row['device']}, {row['dtype']}, batch {row['batch']}, {row['tokens']} tokens"


class ResultFile:
    """A result on disk as it grows: JSON, and the same rows as CSV with the machine in front.

    It is written again, completely or not at all, after each case, so that a run that is stopped leaves what it has. A
    row takes the place of the one with its key.
    """

    def __init__(self, folder, kind, machine):
        self.machine, self._rows = machine, {}
        self.path = Path(folder) / f"{kind}-{machine['date'][:19].replace(':', '')}.json"

    @property
    def rows(self):
        return list(self._rows.values())

    def add(self, rows):
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


def read_result(path):
    """``machine`` (dict) and ``rows`` (list of dicts with `COLUMNS`) of a result file (JSON).

    Raises:
        UserError: no such file, no result of these benchmarks, or one of another schema.
    """
    remedy = "give the .json file that `pytest bench/ --benchmark-only` wrote"
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
