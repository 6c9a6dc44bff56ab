"""What a sweep shows while it runs, and its summary, read off the folders of its runs; what one long run is at."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from twilight import runs

if TYPE_CHECKING:
    from twilight.sweeper import Planned

INTERVAL = 0.2
"""Seconds between looks at the folders."""

METRICS = (
    "accuracy", "agreement", "perplexity", "delta_bits", "mass", "output_error", "value", "total_us", "ratio",
    "b1_query", "b1_group", "kv_fraction",
)  # fmt: skip
"""Columns that a summary shows where rows have them."""


class Doing:
    """Says on standard error what one long run is at: on a terminal in a line that changes, else once in a while."""

    def __init__(self, what: str, *, every: float = 10.0, console: Console | None = None) -> None:
        self._what, self._every = what, every
        self._console = Console(stderr=True) if console is None else console
        self._status = self._console.status(escape(what)) if self._console.is_terminal else None
        self._said = time.monotonic()

    def __enter__(self) -> Doing:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._status is not None:
            self._status.stop()

    def say(self, detail: str) -> None:
        text, now = f"{self._what}: {detail}", time.monotonic()
        if self._status is not None:
            self._status.update(escape(text))
        elif now - self._said >= self._every:
            self._said = now
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Watch:
    """Looks at the folders of runs from a thread of its own, and says what it sees on standard error.

    Attributes:
        done, failed, not_applicable: the runs that have come to an end so.
        lost: runs that have ended without a trace, known after `look` once the launcher is back.
    """

    def __init__(self, todo: Sequence[Planned], *, skipped: int, console: Console | None = None) -> None:
        self.done: list[Planned] = []
        self.failed: list[Planned] = []
        self.not_applicable: list[Planned] = []
        self.skipped = skipped
        self._pending = list(todo)
        self._total = len(todo) + skipped
        self._console = Console(stderr=True) if console is None else console
        self._live = self._console.is_terminal
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="twilight-sweep", daemon=True)
        self._started = time.monotonic()
        self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"),
                                  console=self._console)  # fmt: skip
        self._bar: TaskID = self._progress.add_task("sweep", total=self._total, completed=skipped, state="")
        self._back = False

    @property
    def lost(self) -> list[Planned]:
        return self._pending if self._back else []

    def __enter__(self) -> Watch:
        if not self._live:
            words = f"{self._total} runs, {self.skipped} finished before" if self.skipped else f"{self._total} runs"
            self._say(words)
        else:
            self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
        self._back = kind is None
        if self._live:
            self._progress.stop()

    def look(self) -> None:
        """See what has come to an end since the last look, and say it."""
        with self._lock:
            for each in list(self._pending):
                if runs.read_result(each.folder, each.config) is not None:
                    self._end(each, self.done, "done")
                    continue
                error = runs.read_error(each.folder)
                if error is None:
                    continue
                if error["not_applicable"] and each.found:
                    self._end(each, self.not_applicable, "not applicable", error["error"].partition("\n")[0])
                else:
                    self._end(each, self.failed, "failed", error["traceback"])
            if self._live:
                self._progress.update(self._bar, completed=self._total - len(self._pending), state=self._state())

    def counts(self) -> str:
        """Return the runs that have come to an end, counted by how."""
        parts = [f"{len(self.done)} done", f"{len(self.failed)} failed", f"{self.skipped} skipped"]
        if self.not_applicable:
            parts.append(f"{len(self.not_applicable)} not applicable")
        return ", ".join(parts)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.look()

    def _end(self, each: Planned, kind: list[Planned], word: str, detail: str = "") -> None:
        self._pending.remove(each)
        kind.append(each)
        line = f"[{self._total - len(self._pending)}/{self._total}] {word}: {each.name}"
        if not self._live:
            line += f"  ({self.counts()}{self._left()})"
        elif word == "done":
            return
        self._say("\n".join([line, detail.rstrip()] if detail else [line]))

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _state(self) -> str:
        active = [each for each in self._pending if (each.folder / runs.RUNNING).exists()]
        names = ", ".join(each.folder.name.rpartition("-")[0] for each in active[:2])
        more = f" and {len(active) - 2} more" if len(active) > 2 else ""
        return escape(f"{self.counts()}{self._left()}{f' · {names}{more}' if active else ''}")

    def _left(self) -> str:
        ended = len(self.done) + len(self.failed) + len(self.not_applicable)
        if not ended or not self._pending:
            return ""
        seconds = (time.monotonic() - self._started) / ended * len(self._pending)
        return f", {_duration(seconds)} left"


def print_summary(plan: Sequence[Planned], watch: Watch, seconds: float) -> None:
    """Print a table of the runs of a sweep, and how they ended, on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:  # a file has room
        console.width = max(console.width, 160)
    ends = {id(each): word for kind, word in ((watch.failed, "failed"), (watch.not_applicable, "not applicable"))
            for each in kind}  # fmt: skip
    by_task: dict[str, list[Planned]] = {}
    for each in plan:
        by_task.setdefault(each.config["task"]["name"], []).append(each)
    for task, planned in by_task.items():
        console.print(_summary(task if len(by_task) > 1 else None, planned, ends))
    console.print(f"{watch.counts()} in {_duration(seconds)}", markup=False, highlight=False)
    left = len(plan) - sum(map(len, (watch.done, watch.failed, watch.not_applicable))) - watch.skipped
    if left:
        console.print(f"{left} not run: the same command goes on from here", markup=False, highlight=False)
    if watch.failed:
        where = "\n  ".join(str(each.folder / runs.ERROR) for each in watch.failed)
        console.print(f"failed, and run again by the same command:\n  {where}", markup=False, highlight=False,
                      soft_wrap=True)  # fmt: skip


def _summary(title: str | None, plan: Sequence[Planned], ends: dict[int, str]) -> Table:
    """Return a table of the runs of one task: what they are, the options that differ, and the mean of each metric."""
    results = {id(each): runs.read_result(each.folder, each.config) for each in plan}
    means = {key: _means(result["rows"]) for key, result in results.items() if result is not None}
    metrics = [name for name in METRICS if any(name in mean for mean in means.values())]
    tasks = [each.config["task"] for each in plan]
    differing = [key for key in tasks[0] if any(task.get(key) != tasks[0][key] for task in tasks)]
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("selector", "pruner", "p", "budget", *differing):
        table.add_column(escape(name), no_wrap=True)
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for each, task in zip(plan, tasks, strict=True):
        config, mean = each.config, means.get(id(each), {})
        selector, pruner, budget = runs.choices(config)
        head = [selector, pruner, "" if config["p"] is None else f"{config['p']:g}", budget]
        head += [str(task.get(key, "")) for key in differing]
        end = "" if id(each) in means else ends.get(id(each), "not run")
        table.add_row(*map(escape, head), *(_number(mean.get(name)) for name in metrics), end)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over the rows that Twilight made."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name in METRICS:
            if row.get("method") == "twilight" and isinstance(row.get(name), (int, float)):
                found.setdefault(name, []).append(float(row[name]))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
