"""Pictures of time: where a step spends it, and how it compares with dense as contexts grow.

Rows come from the task ``speed`` and from result files of ``twilight bench``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import style
from .metrics import number
from .points import choice, representatives
from .settings import labels
from .style import Picture
from .table import Row

_MOST_BARS = 24
_MOST_METHODS = 8
_ALL_METHODS = 8
"""Up to this many methods all are drawn; of more, one p and budget of each selector."""


@dataclass(frozen=True)
class Timing:
    """A method at one batch and length.

    Attributes:
        group: what has to be the same to be compared: GPU, versions, kernels, shape of heads.
        what: what was timed, "one layer's attention" or "a step of the whole model".
        stages: microseconds of each stage, timed alone; empty where one launch does all.
        total, dense: microseconds of the whole, and of dense attention.
        low, high: the tenth and ninetieth percentile of `total`.
    """

    group: str
    what: str
    method: str
    batch: int
    context: float
    stages: tuple[tuple[str, float], ...]
    total: float
    dense: float
    low: float | None = None
    high: float | None = None

    @property
    def ratio(self) -> float:
        """Times as fast as dense."""
        return self.dense / self.total


def timings(rows: Iterable[Row], benchmarks: Iterable[tuple[Path, Mapping[str, Any]]] = ()) -> list[Timing]:
    """Return what was timed by the task ``speed`` and by ``twilight bench``, which have both dense and sparse."""
    found = []
    mine = [row for row in rows if row.values.get("task") == "speed" and not row.is_dense]
    if len({choice(row) for row in mine}) > _ALL_METHODS:
        mine = [row for group in representatives(mine)[0].values() for row in group]
    names = labels(row.setting for row in mine)
    for row in mine:
        values = row.values
        total, dense = number(values.get("total_us")), number(values.get("dense_us"))
        context = number(values.get("context"))
        if not total or not dense or not context:
            continue
        how = choice(row)
        stages = [(stage, number(values.get(f"{stage}_us"))) for stage in style.STAGES]
        known = tuple((stage, us) for stage, us in stages if us is not None)
        batch = int(number(values.get("batch")) or 1)
        found.append(
            Timing(names[row.setting], "a decoding step's attention", str(how), batch, context, known, total, dense)
        )
    for _, data in benchmarks:
        found += _bench(data)
    return found


def stages(found: Sequence[Timing]) -> list[Picture]:
    """Draw the stages of each method stacked, dense attention at 100 %: a panel for each method."""
    from matplotlib.patches import Patch

    groups: dict[str, dict[str, list[Timing]]] = {}
    for each in sorted(found, key=lambda each: (each.batch, each.context)):
        if each.stages:
            groups.setdefault(each.group, {}).setdefault(each.method, []).append(each)
    pictures: list[Picture] = []
    for group, methods in sorted(groups.items()):
        said = f"; {len(methods) - _MOST_METHODS} more methods in rows.csv" if len(methods) > _MOST_METHODS else ""
        methods = dict(sorted(methods.items())[:_MOST_METHODS])
        most = min(_MOST_BARS, max(map(len, methods.values())))
        with style.drawing():
            figure, axes = style.grid(len(methods), columns=2, width=5.6, height=1.2 + 0.34 * most, legend=1.4)
            for panel, (method, mine) in zip(axes, methods.items(), strict=True):
                left_out = f" ({len(mine) - _MOST_BARS} more in rows.csv)" if len(mine) > _MOST_BARS else ""
                _bars(panel, mine[:_MOST_BARS])
                panel.set_title(method + left_out)
            drawn = {stage for mine in methods.values() for each in mine for stage, _ in each.stages}
            patches = [
                Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=stage)
                for stage, (colour, hatch) in style.STAGES.items() if stage in drawn
            ]  # fmt: skip
            mark: Any = style.line(
                label="the whole step", color="black", marker="|", markersize=13, linestyle="", mew=1.6
            )
            style.legend(figure, [*patches, mark, style.line(label="dense", color="0.3", linestyle="--")])
            style.title(figure, f"Where a step spends its time{said}\n{group}", legend=1.4)
        caption = (
            "Each bar is a batch and a context length, as a share of dense attention's time at the same size: left "
            "of the dashed line is faster than dense. Stages are timed apart, so that together they can take a "
            "little more or less than the whole, which the black mark shows, and its time and ratio beside it. "
            "What one launch does has no stages: methods that do all in one are not here, and of those that select "
            "before it only that is."
        )
        stem = "stages" if len(groups) == 1 else f"stages-{len(pictures) + 1}"
        pictures.append(Picture(stem, "Time per stage", caption, figure))
    return pictures


def against_context(found: Sequence[Timing]) -> list[Picture]:
    """Draw how many times as fast as dense each method is, against the context: a panel for each batch."""
    pictures: list[Picture] = []
    groups: dict[tuple[str, str], list[Timing]] = {}
    for each in found:
        groups.setdefault((each.group, each.what), []).append(each)
    for (group, what), mine in sorted(groups.items()):
        batches = sorted({each.batch for each in mine})
        looks = style.series(each.method for each in mine)
        contexts = sorted({each.context for each in mine})
        with style.drawing():
            width = 0.9 + 0.085 * max(len(name) for name in looks)
            figure, axes = style.grid(len(batches), height=3.2, legend=width, sharey=True)
            for panel, batch in zip(axes, batches, strict=True):
                for method, look in looks.items():
                    line = sorted((each for each in mine if (each.method, each.batch) == (method, batch)), key=_context)
                    bars = [_ratio_bar(each) for each in line]
                    panel.errorbar(
                        [each.context for each in line], [each.ratio for each in line],
                        [[low for low, _ in bars], [high for _, high in bars]] if any(map(any, bars)) else None,
                        color=look.colour, marker=look.marker, linestyle=look.line, linewidth=1.8, markersize=6,
                        capsize=2,
                    )  # fmt: skip
                panel.axhline(1.0, color="0.3", linewidth=1, linestyle="--")
                panel.set_xscale("log", base=2)
                shown = contexts[:: max(1, -(-len(contexts) // 6))]
                panel.set_xticks(shown, [style.length(context) for context in shown])
                panel.minorticks_off()
                panel.set_xlim(contexts[0] / 1.3, contexts[-1] * 1.3)
                panel.set_title(f"batch {batch}")
                panel.set_xlabel("context length in tokens")
                panel.set_ylabel("times as fast as dense" if panel.get_subplotspec().is_first_col() else "")
                style.tidy(panel)
            axes[0].set_ylim(bottom=0)
            handles = [
                style.line(color=look.colour, marker=look.marker, linestyle=look.line, label=name)
                for name, look in looks.items()
            ]
            handles.append(style.line(color="0.3", linestyle="--", label="dense"))
            style.legend(figure, handles)
            style.title(figure, f"Speed against context: {what}\n{group}", legend=width)
        caption = (
            "Above the dashed line is faster than dense attention at the same size; where a line crosses it is the "
            "context from which the method pays. Bars, where there are any, are the tenth to the ninetieth "
            "percentile."
        )
        stem = "speed" if len(groups) == 1 else f"speed-{len(pictures) + 1}"
        pictures.append(Picture(stem, f"Speed against context: {what}", caption, figure))
    return pictures


def _bars(panel: Any, mine: Sequence[Timing]) -> None:
    ends = [100 * max(each.total, sum(us for _, us in each.stages)) / each.dense for each in mine]
    edge = 1.34 * max(100.0, *ends)
    for y, (each, end) in enumerate(zip(mine, ends, strict=True)):
        left = 0.0
        for stage, us in each.stages:
            colour, hatch = style.STAGES[stage]
            panel.barh(y, 100 * us / each.dense, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.74)
            left += 100 * us / each.dense
        panel.plot([100 * each.total / each.dense] * 2, [y - 0.42, y + 0.42], color="black", linewidth=1.6)
        # Text takes about a quarter of the panel: beside the line of dense attention, not across it.
        place = end if end > 100 or end + 0.27 * edge < 100 else 100
        panel.text(place + 0.012 * edge, y, f"{_us(each.total)}, {each.ratio:.1f}×", va="center", fontsize=10)
    panel.axvline(100, color="0.3", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(mine)), [f"b={each.batch}, {style.length(each.context)}" for each in mine])
    panel.invert_yaxis()
    panel.set_xlim(0, edge)
    panel.set_xlabel("% of dense attention's time")
    panel.spines[["top", "right"]].set_visible(False)


def _bench(data: Mapping[str, Any]) -> list[Timing]:
    versions = ", ".join(f"{name} {version}" for name, version in (data.get("versions") or {}).items())
    found = []
    for cell in data["cells"]:
        heads = f"{cell.get('q_heads')}/{cell.get('kv_heads')} heads of {cell.get('head_dim')}"
        group = f"{data.get('gpu')}, {heads}, kernels {data.get('raw_kernels')}, {versions}"
        where = int(cell["batch"]), float(cell["length"])
        p = f", p={cell['p']:g}" if cell.get("p") is not None else ""
        best = cell.get("best_dense")
        if cell.get("methods") and best in (cell.get("dense") or {}):
            dense = cell["dense"][best]["us"]
            for name, row in cell["methods"].items():
                parts = tuple((stage, float(row[stage]["us"])) for stage in style.STAGES if stage in row)
                total, method = row["total"], name + (p if "top-p" in name else "")
                low, high = number(total.get("p10")), number(total.get("p90"))
                found.append(
                    Timing(group, "one layer's attention", method, *where, parts, total["us"], dense, low, high)
                )
        elif best in (cell.get("ways") or {}):
            dense = 1000 * cell["ways"][best]["ms"]
            for name, row in cell["ways"].items():
                if not name.startswith(("dense", "no attention")):
                    what = f"a step of all of {cell.get('model')}"
                    low, high = (None if number(row.get(each)) is None else 1000 * row[each] for each in ("p10", "p90"))
                    method = name + (p if "top-p" in name else "")
                    found.append(Timing(group, what, method, *where, (), 1000 * row["ms"], dense, low, high))
    return found


def _ratio_bar(each: Timing) -> tuple[float, float]:
    if not each.low or not each.high:
        return 0.0, 0.0
    return max(0.0, each.ratio - each.dense / each.high), max(0.0, each.dense / each.low - each.ratio)


def _context(each: Timing) -> float:
    return each.context


def _us(value: float) -> str:
    return f"{value / 1000:.3g} ms" if value >= 10_000 else f"{value:.0f} µs" if value >= 100 else f"{value:.1f} µs"
