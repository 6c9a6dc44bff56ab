"""One table of all rows: dense beside sparse, what looks too good flagged, as CSV and Parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twilight.errors import missing_extra

from .collect import Collected, Run
from .metrics import Metric, metrics, number, stderr, too_good
from .settings import Setting, setting, texts_by_name

FIRST = (
    "task", "method", "model", "model_revision", "selector", "selector_options", "budget", "budget_value", "pruner",
    "pruner_options", "p", "seed", "config_hash",
)  # fmt: skip
"""Columns that every run's rows have, in their order."""
_CHOICE = FIRST[4:11]
_KEYS = ("seed", "text", "kind", "context", "depth", "lm_task", "metric", "batch")
"""Columns that say what was measured: rows that agree in them, and in their setting, were asked the same."""
LAST = ("flag", "device", "dtype", "kernels", "model_hash", "versions", "started", "seconds", "run")
"""Columns that the report adds, behind the task's own and ``dense_<metric>``."""


@dataclass
class Row:
    """A row of the table, and where it comes from."""

    values: dict[str, Any]
    setting: Setting
    run: Run

    @property
    def is_dense(self) -> bool:
        return bool(self.values.get("method") == "dense")

    def key(self, *, without: Sequence[str] = ()) -> tuple[Any, ...]:
        """Return what tells this measurement from others, without what was chosen by it."""
        return (self.setting, *(self.values.get(name) for name in _KEYS if name not in without))


@dataclass
class Merged:
    """The table.

    Attributes:
        rows: of all runs; dense ones once for all runs that measured the same.
        tables: the runs' other tables, by name.
        metrics: the measures of quality that there are.
        dense_spread: sentences on dense values that differ between runs, which they should not.
    """

    rows: list[Row]
    tables: dict[str, list[Row]]
    metrics: list[Metric]
    dense_spread: list[str]

    def columns(self) -> list[str]:
        """Return the columns that have a value somewhere, in the order of the table."""
        found = dict.fromkeys(name for row in self.rows for name, value in row.values.items() if value is not None)
        middle = [name for name in found if name not in FIRST and name not in LAST]
        return [name for name in FIRST if name in found] + middle + [name for name in LAST if name in found]

    @property
    def flagged(self) -> list[Row]:
        return [row for row in self.rows if row.values.get("flag")]


def merge(found: Collected) -> Merged:
    """Put the rows of all runs into one table."""
    rows: list[Row] = []
    tables: dict[str, list[Row]] = {}
    for run in found.runs:
        columns = {name for row in run.rows for name in row}
        rows += [_row(run, row, columns) for row in run.rows]
        for name, table in run.tables.items():
            tables.setdefault(name, []).extend(_row(run, row, columns) for row in table)
    named = texts_by_name([(row.setting, row.values) for each in (rows, *tables.values()) for row in each])
    rows, *others = ([replace(row, setting=named[row.setting]) for row in each] for each in (rows, *tables.values()))
    tables = dict(zip(tables, others, strict=True))
    every = metrics(row.values for row in rows)
    rows, spread = _dense_once(rows, every)
    _compare(rows, every)
    return Merged(rows, tables, every, spread)


def compare(rows: Iterable[Row], baseline: Iterable[Row], every: Sequence[Metric]) -> list[Row]:
    """Put the quality of `baseline`, runs of the same configurations at another time, beside that of `rows`.

    Columns ``baseline_<metric>`` and ``change_<metric>`` are added where a run of the same hash has the same row.

    Returns:
        The rows that have changed, the most by the order of `every` and size first.
    """
    before = {_identity(row): row for row in baseline}
    changed: list[tuple[int, float, Row]] = []
    for row in rows:
        other = before.get(_identity(row))
        if other is None:
            continue
        for order, metric in enumerate(every):
            old, new = number(other.values.get(metric.column)), number(row.values.get(metric.column))
            if old is None or new is None or not metric.has(row.values):
                continue
            row.values[f"baseline_{metric.column}"], row.values[f"change_{metric.column}"] = old, new - old
            if not math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-12):
                changed.append((order, -abs(new - old), row))
    return [row for *_, row in sorted(changed, key=lambda each: each[:2])]


def save(merged: Merged, folder: Path) -> tuple[list[Path], str]:
    """Write ``rows.csv``, a CSV of each other table, and the same as Parquet if pyarrow is installed.

    Returns:
        The files, and what is missing for Parquet or an empty string.
    """
    files, missing = [], ""
    everything = {"rows": merged.rows} | {f"table-{name}": rows for name, rows in sorted(merged.tables.items())}
    parquet = importlib.util.find_spec("pyarrow") is not None
    if not parquet:
        missing = str(missing_extra("pyarrow", "report", "Parquet"))
    for name, rows in everything.items():
        columns = merged.columns() if name == "rows" else _columns(rows)
        data = [[_scalar(row.values.get(column)) for column in columns] for row in rows]
        files.append(folder / f"{name}.csv")
        part = files[-1].with_suffix(".csv.part")
        with part.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(["" if value is None else value for value in line] for line in data)
        os.replace(part, files[-1])
        if parquet:
            files.append(folder / f"{name}.parquet")
            _save_parquet(files[-1], columns, data)
    return files, missing


def _save_parquet(path: Path, columns: Sequence[str], data: Sequence[Sequence[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    arrays = []
    for index in range(len(columns)):
        values = [line[index] for line in data]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1:  # a column that two tasks use for different things
            values = [None if value is None else str(value) for value in values]
        arrays.append(pyarrow.array(values))
    part = path.with_suffix(".parquet.part")
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=list(columns)), part)
    os.replace(part, path)


def _row(run: Run, row: Mapping[str, Any], columns: set[str]) -> Row:
    about = run.provenance
    values = {"config_hash": run.config_hash, **row}
    values |= {name: about.get(name) for name in ("device", "dtype", "kernels", "model_hash", "started", "seconds")}
    values["versions"] = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or None
    values["run"] = str(run.path.parent)
    # JSON knows no NaN, Python's does; neither is a value.
    cleaned = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
    return Row(cleaned, setting(run, row, columns), run)


def _dense_once(rows: Sequence[Row], every: Sequence[Metric]) -> tuple[list[Row], list[str]]:
    """Keep one of the dense rows that measured the same, the newest, and say where they differ."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.is_dense:
            groups.setdefault(row.key(), []).append(row)
    spread = []
    for group in groups.values():
        for metric in every:
            values = [row.values[metric.column] for row in group if metric.has(row.values)]
            if values and max(values) - min(values) > 1e-6 * max(map(abs, values)):
                values_said = f"from {min(values):.6g} to {max(values):.6g} in {len(values)} runs"
                where = " ".join(
                    f"{name}={group[0].values[name]}" for name in _KEYS if group[0].values.get(name) is not None
                )
                spread.append(f"dense {metric.column} {values_said} ({metric.task} {where})")
    kept = []
    for group in groups.values():
        row = max(group, key=lambda each: each.run.started)
        chosen = dict.fromkeys([*_CHOICE, "config_hash"])
        kept.append(Row({**row.values, **chosen}, row.setting, row.run))
    return [*kept, *(row for row in rows if not row.is_dense)], spread


def _compare(rows: Sequence[Row], every: Sequence[Metric]) -> None:
    """Add ``dense_<metric>`` and ``flag`` to sparse rows that have a dense one of the same questions."""
    dense = {row.key(): row for row in rows if row.is_dense}
    for row in rows:
        other = dense.get(row.key())
        if other is None or row.is_dense:
            continue
        flags = []
        for metric in every:
            if metric.has(row.values) and metric.has(other.values):
                value, base = float(row.values[metric.column]), float(other.values[metric.column])
                row.values[f"dense_{metric.column}"] = base
                flags.append(too_good(metric, value, stderr(metric, row.values), base, stderr(metric, other.values)))
        row.values["flag"] = "; ".join(filter(None, flags)) or None


def _identity(row: Row) -> tuple[Any, ...]:
    return (row.values.get("config_hash"), *(row.values.get(name) for name in ("task", "method", *_KEYS)))


def _columns(rows: Sequence[Row]) -> list[str]:
    found = dict.fromkeys(name for row in rows for name, value in row.values.items() if value is not None)
    return sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else 99, name in LAST))


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float, bool)) else json.dumps(value)
