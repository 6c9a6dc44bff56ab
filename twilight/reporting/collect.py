"""Find runs: ``result.json`` and ``error.json`` under folders, and result files of ``twilight bench``."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
RESULT, ERROR = "result.json", "error.json"
_BENCHMARK = b'"benchmark"'


@dataclass
class Run:
    """A finished run, as its file says it."""

    path: Path
    config: dict[str, Any]
    config_hash: str
    overrides: list[str]
    provenance: dict[str, Any]
    rows: list[dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]]
    started: float = 0.0
    """Seconds since the epoch: when it began, or where it does not say, when its file was written."""

    @property
    def command(self) -> str:
        return shlex.join(["twilight", "run", *self.overrides])

    @property
    def versions(self) -> dict[str, str]:
        found = self.provenance.get("versions")
        return {str(name): str(version) for name, version in found.items()} if isinstance(found, dict) else {}


@dataclass
class Failure:
    """A run that failed."""

    path: Path
    config_hash: str
    command: str
    error: str
    traceback: str
    not_applicable: bool
    finished_since: bool = False
    """Whether a run of the same configuration is among the finished ones."""


@dataclass
class Collected:
    """All that was found.

    Attributes:
        runs: finished runs, one for each configuration: the newest.
        replaced: older runs of a configuration, each with the one that was taken.
        skipped: files that are no runs, and why.
        benchmarks: result files of ``twilight bench``.
    """

    runs: list[Run] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    replaced: list[tuple[Run, Run]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    benchmarks: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)


def collect(places: Sequence[str | Path]) -> Collected:
    """Read the runs in `places`, which are folders, searched to the bottom, or files.

    A configuration that was run more than once, by its hash, counts once: the run that began last.

    Raises:
        FileNotFoundError: a place that is not there.
    """
    found = Collected()
    by_hash: dict[str, Run] = {}
    for path in _files(places):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            found.skipped.append((path, f"not JSON: {error}"))
            continue
        if isinstance(data, dict) and isinstance(data.get("cells"), list) and "benchmark" in data:
            found.benchmarks.append((path, data))
            continue
        wrong = _wrong(data)
        if wrong:
            found.skipped.append((path, wrong))
        elif "error" in data:
            found.failures.append(_failure(path, data))
        else:
            run = _run(path, data)
            other = by_hash.get(run.config_hash)
            if other is None:
                by_hash[run.config_hash] = run
                continue
            old, new = (other, run) if run.started >= other.started else (run, other)
            by_hash[run.config_hash] = new
            found.replaced.append((old, new))
    # One that was taken can have been replaced later by a third.
    found.replaced = [(old, by_hash[old.config_hash]) for old, _ in found.replaced]
    found.runs = list(by_hash.values())
    for failure in found.failures:
        failure.finished_since = failure.config_hash in by_hash
    return found


def _files(places: Sequence[str | Path]) -> Iterator[Path]:
    seen: set[str] = set()
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"no runs at '{place}'\n  what makes some: twilight sweep … --out {place}")
        for path in [place] if place.is_file() else _walk(place):
            real = os.path.realpath(path)
            if real not in seen:  # a folder and another inside it
                seen.add(real)
                yield path


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(root) / name
            if name in (RESULT, ERROR) or (name.endswith(".json") and _is_benchmark(path)):
                yield path


def _is_benchmark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _BENCHMARK in file.read(64)
    except OSError:
        return False


def _wrong(data: Any) -> str:
    """Return why this is no run, or an empty string."""
    if not isinstance(data, dict) or "config_hash" not in data or not isinstance(data.get("config"), dict):
        return "no run of twilight run or sweep (it has no config and config_hash)"
    if data.get("schema") != SCHEMA:
        return f"schema {data.get('schema')!r}, and this version reads {SCHEMA}"
    if "error" not in data and not _all_dicts(data.get("rows")):
        return "'rows' is not a list of objects"
    return ""


def _all_dicts(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) for row in rows)


def _run(path: Path, data: Mapping[str, Any]) -> Run:
    about = data.get("provenance") or {}
    tables = {name: rows for name, rows in (data.get("tables") or {}).items() if _all_dicts(rows)}
    overrides = [str(word) for word in data.get("overrides") or []]
    started = _seconds(about.get("started"))
    if started is None:
        started = path.stat().st_mtime
    return Run(path, data["config"], str(data["config_hash"]), overrides, about, data["rows"], tables, started)


def _failure(path: Path, data: Mapping[str, Any]) -> Failure:
    command = shlex.join(["twilight", "run", *map(str, data.get("overrides") or [])])
    error, trace = str(data["error"]), str(data.get("traceback") or "")
    return Failure(path, str(data["config_hash"]), command, error, trace, bool(data.get("not_applicable")))


def _seconds(text: Any) -> float | None:
    if not isinstance(text, str):
        return None
    try:
        when = datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None
    if when.tzinfo is None:  # not of this machine's zone, so that an order does not depend on where it is read
        when = when.replace(tzinfo=datetime.timezone.utc)
    return when.timestamp()
