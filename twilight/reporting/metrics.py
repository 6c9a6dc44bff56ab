"""What is measured as quality: its name, its unit, which way is better, and how far it may be off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Z = 1.96
"""Error bars are 95 % intervals: this many standard errors to each side, but for shares, whose sides differ."""

_WORSE_IF_MORE = ("perplexity", "bits", "loss", "error", "nll")


@dataclass(frozen=True)
class Metric:
    """A measure of quality.

    Attributes:
        task: whose rows have it.
        column: where it stands.
        label: name and unit, as an axis says it.
        higher_is_better: which way.
        panel: columns that rows are told apart by; over all others they are pooled.
        only: values that a row must have, such as which task of lm_eval.
    """

    task: str
    column: str
    label: str
    higher_is_better: bool
    panel: tuple[str, ...] = ("context",)
    only: tuple[tuple[str, Any], ...] = ()

    @property
    def stem(self) -> str:
        """The metric in a file name."""
        return "-".join([self.task, *(str(value) for _, value in self.only)] + ([] if self.only else [self.column]))

    def has(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is of this metric, and has a value."""
        if row.get("task") != self.task or any(row.get(name) != value for name, value in self.only):
            return False
        return number(row.get(self.column)) is not None

    def gain(self, value: float, dense: float) -> float:
        """Return by how much `value` is better than `dense`; negative if it is worse."""
        return value - dense if self.higher_is_better else dense - value


_FIXED = (
    Metric("fidelity", "output_error", "error of attention's output, relative L2", False),
    Metric("fidelity", "mass", "attention mass kept, of 1", True),
    Metric("perplexity", "bits_per_byte", "bits per byte", False),
    Metric("facts", "accuracy", "facts answered, share of those asked", True),
)
_INSTEAD = Metric("perplexity", "perplexity", "perplexity per token", False)


def metrics(rows: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Return the metrics that `rows` have values of."""
    rows = list(rows)
    found = [metric for metric in _FIXED if any(metric.has(row) for row in rows)]
    if not any(metric.column == "bits_per_byte" for metric in found) and any(_INSTEAD.has(row) for row in rows):
        found.append(_INSTEAD)
    pairs = {(str(row.get("lm_task")), str(row.get("metric"))): row for row in rows if row.get("task") == "lm_eval"}
    for (task, name), row in sorted(pairs.items()):
        higher = not any(word in name for word in _WORSE_IF_MORE)
        only = (("lm_task", row.get("lm_task")), ("metric", row.get("metric")))
        metric = Metric("lm_eval", "value", f"{task}: {name.replace(',none', '')}", higher, (), only)
        if any(metric.has(each) for each in rows):
            found.append(metric)
    return found


def number(value: Any) -> float | None:
    """Return `value` as a finite float, None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def wilson(correct: float, asked: float) -> float:
    """Return a standard error of a share, such that `Z` of it are half of Wilson's 95 % interval.

    It is not 0 where none or all are right, as the binomial one is (Wilson 1927; Brown, Cai and DasGupta 2001).
    """
    share = correct / asked
    return math.sqrt(share * (1 - share) / asked + Z**2 / (4 * asked**2)) / (1 + Z**2 / asked)


def wilson_interval(correct: float, asked: float) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of a share, which lie within 0 and 1 and not evenly about the share."""
    middle = (correct / asked + Z**2 / (2 * asked)) / (1 + Z**2 / asked)
    half = Z * wilson(correct, asked)
    return max(0.0, middle - half), min(1.0, middle + half)


def pooled(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Return the value of several rows together, and its standard error if they have one.

    Shares of questions are pooled by question; other metrics are means over rows that count the same.
    """
    if metric.column == "accuracy":
        counts = _counts(rows)
        if counts is not None:
            return counts[0] / counts[1], wilson(*counts)
    values = [value for value in (number(row.get(metric.column)) for row in rows) if value is not None]
    errors = [stderr(metric, row) for row in rows]
    known = [error for error in errors if error is not None]
    error = math.sqrt(sum(each**2 for each in known)) / len(rows) if len(known) == len(rows) else None
    return sum(values) / len(values), error


def interval(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the ends of the 95 % interval of what `pooled` returns, None without an error."""
    counts = _counts(rows) if metric.column == "accuracy" else None
    if counts is not None:
        return wilson_interval(*counts)
    value, error = pooled(metric, rows)
    return None if error is None else (value - Z * error, value + Z * error)


def _counts(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return how many answers of several rows are right, and of how many; None if one does not say."""
    counts = [(number(row.get("correct")), number(row.get("asked"))) for row in rows]
    if not all(correct is not None and asked for correct, asked in counts):
        return None
    return sum(correct or 0.0 for correct, _ in counts), sum(asked or 0.0 for _, asked in counts)


def stderr(metric: Metric, row: Mapping[str, Any]) -> float | None:
    """Return the standard error of a row's metric, None where it has none.

    For bits per byte it is that of the paired difference to dense on the same tokens, which is what a comparison needs;
    the bits themselves vary far more from token to token.
    """
    if metric.column == "accuracy":
        correct, asked = number(row.get("correct")), number(row.get("asked"))
        if correct is not None and asked:
            return wilson(correct, asked)
    column = {"bits_per_byte": "delta_stderr", "accuracy": "stderr", "value": "stderr"}.get(metric.column)
    return number(row.get(column)) if column else None


def too_good(metric: Metric, value: float, error: float | None, dense: float | None, dense_error: float | None) -> str:
    """Return what to say of a value that is better than dense by more than both error bars, else an empty string.

    Errors are taken as independent unless the metric's is that of the difference itself.
    """
    if dense is None:
        return ""
    gain = metric.gain(value, dense)
    parts = [each for each in (error, None if metric.column == "bits_per_byte" else dense_error) if each is not None]
    bar = Z * math.hypot(*parts) if parts else 0.0
    if gain <= max(bar, 1e-9 * abs(dense)):
        return ""
    off = f"error bar {bar:.2g}" if parts else "no error bar to judge it by"
    return f"{metric.column} beats dense by {gain:.2g} ({off})"
