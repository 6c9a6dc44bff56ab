"""Pictures of quality: against tokens read, with a Pareto line for each selector, and against p."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import style
from .metrics import Metric
from .points import Choice, Panel, Point, pareto
from .settings import Setting
from .style import Picture, Series

MOST_PANELS = 12
"""Panels that a picture has at most; those of the longest contexts are left out, and it says so."""
CROWD = 8
"""Curves that a panel has room for with all their error bars."""
_CUT = " Arrows at the edge stand for points beyond it, whose values are written there."
_NO_BARS = " Error bars would hide so many lines: they are in the picture against tokens read."


def against_tokens(
    points: Sequence[Point], metric: Metric, names: Mapping[Setting, str], looks: Mapping[str, Series]
) -> list[Picture]:
    """Draw quality against tokens read: a picture for each setting, a panel for each context."""
    pictures = []
    for order, (where, mine) in enumerate(_by_setting(points, metric, names)):
        mine = [point for point in mine if point.tokens]
        panels, left_out = _panels(mine)
        if not panels:
            continue
        width, crowd = _legend_width(mine), _crowded(mine)
        size: dict[str, Any] = {"columns": 1 if len(panels) < 4 else 2, "width": 7.5, "height": 4.0} if crowd else {}
        cut = False
        with style.drawing():
            figure, axes = style.grid(len(panels), legend=width, **size)
            for panel, (key, inside) in zip(axes, panels.items(), strict=True):
                _curves(panel, inside, metric, looks, barred=_most_tokens(inside) if crowd else inside)
                _dense(panel, inside)
                cut |= _scale(panel, inside, metric, looks, [point.tokens or 0.0 for point in inside])
                style.token_axis(panel.xaxis, [point.tokens or 0.0 for point in inside])
                panel.set_title(_panel_name(key))
                panel.set_xlabel("tokens a kv head reads a step")
                style.tidy(panel)
            _label_rows(axes, _better(metric))
            hollow = any(not _pruned(point.choice) for point in mine)
            flags = any(point.flag for point in mine)
            style.legend(figure, _handles(mine, looks, hollow=hollow, flags=flags))
            style.title(figure, f"Quality against tokens read: {metric.label}\n{names[where]}{left_out}", legend=width)
        caption = (
            "Each point is a selector at one p and budget; a line joins those of a selector that none of its "
            f"others beats: fewer tokens, or better. {'Up' if metric.higher_is_better else 'Down'} and to the left "
            "is better."
        )
        caption += _pooled(mine) + _errors(mine, metric, few=crowd) + (_CUT if cut else "")
        stem = f"quality-{metric.stem}{_number(order, points)}"
        pictures.append(Picture(_safe(stem), f"{metric.label}, against tokens read", caption, figure))
    return pictures


def against_p(
    points: Sequence[Point], metric: Metric, names: Mapping[Setting, str], looks: Mapping[str, Series]
) -> list[Picture]:
    """Draw quality, and under it the tokens read, against p: a line for each selector and budget."""
    pictures = []
    for order, (where, mine) in enumerate(_by_setting(points, metric, names)):
        mine = [point for point in mine if point.choice.p is not None]
        if len({point.choice.p for point in mine}) < 2:
            continue
        panels, left_out = _panels(mine, most=4)
        arms = sorted({_arm(point.choice) for point in mine})
        lines = {arm: style.LINES[index % len(style.LINES)] for index, arm in enumerate(arms)}
        columns, width, crowd = len(panels), _legend_width(mine), _crowded(mine)
        shift = _shifts(mine)
        # Of many curves those above are the tangle.
        size: dict[str, Any] = {"height": 3.9, "gridspec_kw": {"height_ratios": (5, 3)}} if crowd else {"height": 3.0}
        cut = False
        with style.drawing():
            figure, axes = style.grid(2 * columns, columns=columns, legend=width, sharex=True, **size)
            for index, (key, inside) in enumerate(panels.items()):
                above, below = axes[index], axes[columns + index]
                for (name, arm), group in _lines(inside).items():
                    look = {
                        "color": looks[name].colour,
                        "marker": looks[name].marker,
                        "linestyle": lines[arm] if len(arms) > 1 else looks[name].line,
                    }
                    ps = [point.choice.p or 0.0 for point in group]
                    above.errorbar(
                        [p + shift[name] for p in ps], [point.value for point in group],
                        _bars(group, [] if crowd else group), **look,
                        markersize=5, linewidth=1.5, elinewidth=0.8, capsize=2,
                    )  # fmt: skip
                    read = [point for point in group if point.tokens]
                    below.plot(
                        [point.choice.p for point in read], [point.tokens for point in read], **look,
                        markersize=5, linewidth=1.5,
                    )  # fmt: skip
                _dense(above, inside)
                places = [(point.choice.p or 0.0) + shift[point.choice.name] for point in inside]
                cut |= _scale(above, inside, metric, looks, places)
                style.token_axis(below.yaxis, [point.tokens or 0.0 for point in inside])
                above.set_title(_panel_name(key))
                below.set_xlabel("p")
                for panel in (above, below):
                    style.tidy(panel)
            axes[0].set_ylabel(_better(metric))
            axes[columns].set_ylabel("tokens a kv head reads")
            handles = _handles(mine, looks, line="-" if len(arms) > 1 else "")
            if len(arms) > 1:
                handles += [style.line(label=arm, color="0.3", linestyle=line) for arm, line in lines.items()]
            style.legend(figure, handles)
            said = f"What p does: {metric.label}, and tokens read\n{names[where]}{left_out}"
            style.title(figure, said, legend=width)
        caption = (
            "Above: quality, with dense attention dashed. Below: the tokens that a kv head reads a step. The p to take "
            "is where the upper line has come to dense and the lower one has not yet left. Upper lines are moved aside "
            "a little, so that they can be told apart."
        )
        caption += _pooled(mine) + (_NO_BARS if crowd else _errors(mine, metric)) + (_CUT if cut else "")
        stem = f"p-{metric.stem}{_number(order, points)}"
        pictures.append(Picture(_safe(stem), f"{metric.label} and tokens read, against p", caption, figure))
    return pictures


def _curves(
    panel: Any, inside: Sequence[Point], metric: Metric, looks: Mapping[str, Series], barred: Sequence[Point]
) -> None:
    for name, group in _by_name(inside).items():
        look = looks[name]
        for pruned in (True, False):
            some = [point for point in group if _pruned(point.choice) is pruned]
            if some:
                panel.errorbar(
                    [point.tokens for point in some], [point.value for point in some], _bars(some, barred),
                    color=look.colour, marker=look.marker, markersize=5.5, alpha=0.55, linestyle="", elinewidth=0.8,
                    markerfacecolor=look.colour if pruned else "white", capsize=2,
                )  # fmt: skip
        for point in group:
            if point.flag:
                ring = {"marker": "o", "markersize": 14, "markerfacecolor": "none", "linestyle": ""}
                panel.plot(point.tokens, point.value, color="black", **ring)
        best = pareto(group, metric)
        panel.plot(
            [point.tokens for point in best], [point.value for point in best], color=look.colour, linestyle=look.line,
            linewidth=1.8,
        )  # fmt: skip


def _bars(points: Sequence[Point], barred: Sequence[Point]) -> list[list[float]] | None:
    """Return how far error bars reach, down in the first list and up in the second."""
    down, up = [], []
    for point in points:
        low, high = point.bar if point in barred and point.bar is not None else (point.value, point.value)
        # No bar rather than one of no length, whose caps would stand across the marker. Rounding makes none negative.
        down.append(max(0.0, point.value - low) if low < high else math.nan)
        up.append(max(0.0, high - point.value) if low < high else math.nan)
    return None if all(map(math.isnan, down)) else [down, up]


def _most_tokens(points: Sequence[Point]) -> list[Point]:
    """Return one point of each selector, a pruned one if there is: without, all read the same and stand in a row."""
    groups = _by_name(points).values()
    return [max(group, key=lambda point: (_pruned(point.choice), point.tokens or 0.0)) for group in groups]


def _dense(panel: Any, inside: Sequence[Point]) -> None:
    """Draw dense attention as a line, its interval as a band; nothing if it was not measured or is not one value."""
    found = {(point.dense, point.dense_bar) for point in inside if point.dense is not None}
    if len({value for value, _ in found}) != 1:
        return
    ((value, bar), *_) = sorted(found, key=lambda each: each[1] is None)
    assert value is not None
    panel.axhline(value, color="black", linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    if bar and bar[0] < bar[1]:
        panel.axhspan(*bar, color="black", alpha=0.06, linewidth=0, zorder=0)


def _scale(
    panel: Any, inside: Sequence[Point], metric: Metric, looks: Mapping[str, Series], places: Sequence[float]
) -> bool:
    """Choose the scale of quality; return whether some points lie beyond it.

    How far off a few selectors are is no reason to press the others into a line. Theirs is said in words, with an arrow
    where each point would be: at `places` of the other axis.
    """
    values = [point.value for point in inside]
    if metric.column == "accuracy":
        panel.set_ylim(-0.03, 1.05)
        return False
    wide = min(values) > 0 and max(values) > 20 * min(values)
    if wide:
        panel.autoscale_view()
        style.plain_log(panel.yaxis)
    ends = _ends(inside, math.log if wide else float) if _crowded(inside) else (None, None)
    if ends == (None, None):
        return False
    low, high = (end if end is None or not wide else math.exp(end) for end in ends)
    below, above = _padded(min(values) if low is None else low, max(values) if high is None else high, wide)
    panel.set_ylim(below if low is None else low, above if high is None else high)
    if wide:  # with ticks for what is left
        style.plain_log(panel.yaxis)
    for top, edge in ((False, low), (True, high)):
        if edge is not None:
            _beyond(panel, inside, metric, looks, places, edge, top)
    return True


def _ends(inside: Sequence[Point], scaled: Callable[[float], float]) -> tuple[float | None, float | None]:
    """Return where the axis is to end below and above; None where it reaches as far as all points.

    It ends a little beyond the farthest of all but a quarter of the selectors, if all are twice as far.
    """
    groups = [[scaled(point.value) for point in group] for group in _by_name(inside).values()]
    lowest, highest = sorted(map(min, groups)), sorted(map(max, groups))
    most = highest[-1] - lowest[0]
    low, high = lowest[len(groups) // 4], highest[-1 - len(groups) // 4]
    down, up = highest[-1] - low, high - lowest[0]
    return low - 0.3 * down if most > 2 * down else None, high + 0.3 * up if most > 2 * up else None


def _padded(low: float, high: float, wide: bool) -> tuple[float, float]:
    if wide:
        return low * (low / high) ** 0.06, high * (high / low) ** 0.06
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _beyond(
    panel: Any, inside: Sequence[Point], metric: Metric, looks: Mapping[str, Series], places: Sequence[float],
    edge: float, top: bool,
) -> None:  # fmt: skip
    """Mark the points that lie above a panel's upper edge, or below its lower one."""
    from matplotlib.patheffects import withStroke

    found: dict[str, list[float]] = {}
    for point, place in zip(inside, places, strict=True):
        if point.value > edge if top else point.value < edge:
            found.setdefault(point.choice.name, []).append(point.value)
            look = {"color": looks[point.choice.name].colour, "marker": 6 if top else 7}  # its tip is at the edge
            panel.plot(place, edge, **look, markersize=7, clip_on=False, linestyle="")
    said = [f"{'↑' if top else '↓'} {_short(name)} {_range(values)}" for name, values in sorted(found.items())]
    # Curves come from the worst on the left to the best on the right, and leave these corners.
    right = top is not metric.higher_is_better
    panel.text(
        0.99 if right else 0.01, 0.95 if top else 0.05, "\n".join(said), transform=panel.transAxes,
        ha="right" if right else "left", va="top" if top else "bottom",
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _crowded(points: Sequence[Point]) -> bool:
    return len({point.choice.name for point in points}) > CROWD


def _handles(
    points: Sequence[Point], looks: Mapping[str, Series], *, line: str = "", hollow: bool = False, flags: bool = False
) -> list[Any]:
    handles = []
    for name in _by_name(points):
        look = looks[name]
        handles.append(
            style.line(
                label=_short(name), color=look.colour, marker=look.marker, linestyle=line or look.line, markersize=6
            )
        )
    if any(point.dense is not None for point in points):
        handles.append(style.line(label="dense", color="black", linestyle=(0, (4, 3)), linewidth=1.2))
    if hollow:
        handles.append(
            style.line(label="hollow: not top-p", color="0.3", marker="o", linestyle="", markerfacecolor="white")
        )
    if flags:
        handles.append(
            style.line(
                label="beats dense: check",
                color="black",
                marker="o",
                linestyle="",
                markersize=13,
                markerfacecolor="none",
            )
        )
    return handles


def _by_setting(
    points: Sequence[Point], metric: Metric, names: Mapping[Setting, str]
) -> list[tuple[Setting, list[Point]]]:
    groups: dict[Setting, list[Point]] = {}
    for point in points:
        groups.setdefault(point.setting, []).append(point)
    return sorted(groups.items(), key=lambda each: names[each[0]])


def _panels(points: Sequence[Point], most: int = MOST_PANELS) -> tuple[dict[Panel, list[Point]], str]:
    groups: dict[Panel, list[Point]] = {}
    for point in sorted(points, key=lambda each: [(type(value).__name__, value) for _, value in each.panel]):
        groups.setdefault(point.panel, []).append(point)
    left_out = len(groups) - most
    said = f" ({left_out} of {len(groups)} contexts not drawn: see rows.csv)" if left_out > 0 else ""
    return dict(list(groups.items())[:most]), said


def _by_name(points: Sequence[Point]) -> dict[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda each: each.choice.name):
        groups.setdefault(point.choice.name, []).append(point)
    return groups


def _lines(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda each: (each.choice.name, _arm(each.choice), each.choice.p)):
        groups.setdefault((point.choice.name, _arm(point.choice)), []).append(point)
    return groups


def _shifts(points: Sequence[Point]) -> dict[str, float]:
    """Return how far to move each curve aside, so that error bars at the same p do not cover each other."""
    names = list(_by_name(points))
    ps = sorted({point.choice.p for point in points if point.choice.p is not None})
    # All curves together take no more than 0.01, or a third of what lies between two p.
    spread = min(0.01, 0.3 * min(after - before for before, after in zip(ps, ps[1:], strict=False)))
    step = spread / max(1, len(names) - 1)
    return {name: step * (index - (len(names) - 1) / 2) for index, name in enumerate(names)}


def _arm(how: Choice) -> str:
    return f"{how.rule}, budget {how.size}"


def _pruned(how: Choice) -> bool:
    return how.p is not None


def _panel_name(key: Panel) -> str:
    return ", ".join(f"{name} {style.length(value) if name == 'context' else value}" for name, value in key)


def _label_rows(axes: Sequence[Any], label: str) -> None:
    for panel in axes:
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(label)


def _better(metric: Metric) -> str:
    return f"{metric.label}\n({'higher' if metric.higher_is_better else 'lower'} is better)"


def _pooled(points: Sequence[Point]) -> str:
    most = max(point.num_rows for point in points)
    return f" A point pools up to {most} rows (kinds, depths, seeds)." if most > 1 else ""


def _errors(points: Sequence[Point], metric: Metric, *, few: bool = False) -> str:
    if all(point.bar is None for point in points):
        return " These runs give no error bars."
    what = "of the difference to dense on the same tokens" if metric.column == "bits_per_byte" else "of the value"
    where = ". So that curves can be told apart, each has one only where it reads most after pruning" if few else ""
    shares = ": of shares Wilson's, longer towards one half" if metric.column == "accuracy" else ""
    return f" Error bars are 95 % intervals {what}{shares}{where}."


def _legend_width(points: Sequence[Point]) -> float:
    return 0.9 + 0.085 * max((len(_short(point.choice.name)) for point in points), default=0)


def _short(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"


def _number(order: int, points: Sequence[Point]) -> str:
    return f"-{order + 1}" if len({point.setting for point in points}) > 1 else ""


def _safe(stem: str) -> str:
    return re.sub(r"[^\w.-]+", "_", stem)
