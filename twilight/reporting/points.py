"""Rows pooled into points of a picture, the best of them, and one run of each selector that stands for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Metric, interval, number, pooled, too_good
from .settings import Setting
from .table import Row

Panel = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Choice:
    """What was compared: a selector, a pruner, a budget."""

    selector: str
    selector_options: str
    pruner: str
    pruner_options: str
    budget: str
    budget_value: float | None
    p: float | None

    def __str__(self) -> str:
        return f"{self.name}, {self.rule}" + ("" if self.p is None else f" p={self.p:g}") + f", budget {self.size}"

    @property
    def name(self) -> str:
        """The selector and its options, which make one curve."""
        return f"{self.selector} ({self.selector_options})" if self.selector_options else self.selector

    @property
    def rule(self) -> str:
        """The pruner and its options, without p."""
        return f"{self.pruner} ({self.pruner_options})" if self.pruner_options else self.pruner

    @property
    def size(self) -> str:
        """The budget, as its override says it."""
        value = "?" if self.budget_value is None else f"{self.budget_value:g}"
        return value if self.budget in ("fixed", "fraction") else f"{self.budget} {value}"


@dataclass(frozen=True)
class Point:
    """Rows of one choice in one panel, together.

    Attributes:
        tokens: what a kv head reads a step, mean; None if the rows do not say.
        value, bar: the metric and the ends of its 95 % interval.
        dense, dense_bar: the same of dense attention, of the same questions.
        flag: what to say if it is too good to be believed.
        num_rows: how many rows were pooled.
    """

    setting: Setting
    panel: Panel
    choice: Choice
    tokens: float | None
    seq_len: float | None
    value: float
    bar: tuple[float, float] | None
    dense: float | None
    dense_bar: tuple[float, float] | None
    flag: str
    num_rows: int


def choice(row: Row) -> Choice:
    """Return what a row was measured with."""
    names = ("selector", "selector_options", "pruner", "pruner_options", "budget")
    text = {name: str(row.values.get(name) or "") for name in names}
    return Choice(**text, budget_value=number(row.values.get("budget_value")), p=number(row.values.get("p")))


def points(rows: Iterable[Row], metric: Metric) -> list[Point]:
    """Pool `rows` by setting, panel and choice; over seeds, kinds and depths, that is."""
    mine = [row for row in rows if metric.has(row.values)]
    dense = {row.key(): row for row in mine if row.is_dense}
    groups: dict[tuple[Setting, Panel, Choice], list[Row]] = {}
    for row in mine:
        if not row.is_dense:
            panel = tuple((name, row.values.get(name)) for name in metric.panel if row.values.get(name) is not None)
            groups.setdefault((row.setting, panel, choice(row)), []).append(row)
    found = []
    for (where, panel, how), group in groups.items():
        values = [row.values for row in group]
        value, error = pooled(metric, values)
        others = [dense[row.key()].values for row in group if row.key() in dense]
        # Half of the questions are not the same questions.
        whole = len(others) == len(group)
        base, base_error = pooled(metric, others) if whole else (None, None)
        flag = too_good(metric, value, error, base, base_error)
        found.append(
            Point(
                where, panel, how, _mean(map(tokens_read, values)), _mean(number(row.get("seq_len")) for row in values),
                value, interval(metric, values), base, interval(metric, others) if whole else None, flag, len(group),
            )
        )  # fmt: skip
    return found


def tokens_read(row: dict[str, Any]) -> float | None:
    """Return the tokens that a kv head reads, for its whole group; if that is not known, what a query head keeps."""
    read = number(row.get("b1_group"))
    return read if read is not None else number(row.get("b1_query"))


def pareto(points: Iterable[Point], metric: Metric) -> list[Point]:
    """Return the points that no other beats: none reads as few tokens and is better, nor as good and reads fewer.

    They come in the order of their tokens. Points without tokens cannot take part.
    """
    best: list[Point] = []
    sign = -1.0 if metric.higher_is_better else 1.0
    known = [(point.tokens, sign * point.value, point) for point in points if point.tokens is not None]
    for _, cost, point in sorted(known, key=lambda each: each[:2]):
        if not best or cost < sign * best[-1].value:
            best.append(point)
    return best


def representatives(rows: Sequence[Row], *, near: float = 0.9) -> tuple[dict[str, list[Row]], dict[str, Choice]]:
    """Choose for each selector the rows of one choice, alike as far as can be, so that they can be compared.

    What most selectors were run with is taken (pruner, budget and p); of equals top-p, then the p nearest to `near`.

    Returns:
        The rows of each, and its choice, by the selector's name.
    """
    groups: dict[str, dict[Choice, list[Row]]] = {}
    for row in rows:
        if not row.is_dense:
            how = choice(row)
            groups.setdefault(how.name, {}).setdefault(how, []).append(row)
    counts = Counter(_shared(how) for group in groups.values() for how in group)

    def rank(how: Choice) -> tuple[Any, ...]:
        distance = 1.0 if how.p is None else abs(how.p - near)
        return (-counts[_shared(how)], how.pruner != "top_p", distance, -(how.p or 0.0), how.name, str(how))

    chosen = {name: min(group, key=rank) for name, group in groups.items()}
    return {name: groups[name][how] for name, how in sorted(chosen.items())}, dict(sorted(chosen.items()))


def _shared(how: Choice) -> tuple[Any, ...]:
    return (how.pruner, how.pruner_options, how.budget, how.budget_value, how.p)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
