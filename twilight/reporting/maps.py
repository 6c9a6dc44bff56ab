"""Pictures by layer and head, by depth and length, and by position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import style
from .metrics import Metric, number, pooled
from .points import Choice, representatives
from .settings import Setting, labels
from .style import Picture
from .table import Row

MOST_PANELS = 20
_ACCURACY = Metric("facts", "accuracy", "facts answered", True)


def budgets(rows: Sequence[Row]) -> list[Picture]:
    """Draw the tokens that each head keeps, one panel a selector, from the tables ``budgets`` or ``fidelity_heads``.

    Where a table has contexts, the longest is drawn.
    """
    pictures = []
    usable = [row for row in rows if _whole(row, "layer") is not None and _whole(row, "head") is not None]
    usable = [row for row in usable if number(row.values.get("b1_query")) is not None]
    for order, (label, mine) in enumerate(_comparable(usable)):
        mine, context = _longest(mine)
        groups, chosen = representatives(mine)
        groups, left = _first(groups)
        if not groups:
            continue
        grids = {name: _heads(group) for name, group in groups.items()}
        most = max(value for grid in grids.values() for line in grid for value in line if not math.isnan(value))
        layers, heads = max(len(grid) for grid in grids.values()), max(len(grid[0]) for grid in grids.values())
        with style.drawing():
            width, height = min(5.0, 2.0 + 0.16 * heads), min(5.0, 1.6 + 0.16 * layers)
            figure, axes = style.grid(len(grids), columns=4, width=width, height=height)
            for panel, (name, grid) in zip(axes, grids.items(), strict=True):
                image = draw_heads(panel, grid, most)
                panel.set_title(f"{_short(name)}\n{_choice(chosen[name])}", fontsize=10)
                spec = panel.get_subplotspec()
                panel.set_ylabel("layer" if spec.is_first_col() else "")
                panel.set_xlabel("query head")
            bar = style.colour_bar(figure, image, axes, "tokens kept a step, mean")
            style.plain_log(bar.ax.yaxis)
            style.title(figure, f"Tokens that each head keeps{context}\n{label}")
        caption = (
            "Yellow heads keep many tokens, dark ones few, on one logarithmic scale for all panels; grey layers are "
            "dense or not measured. A fixed budget would make all the same colour."
        )
        pictures.append(Picture(f"budgets{_number(order)}", "Tokens kept by layer and head", caption + left, figure))
    return pictures


def draw_heads(panel: Any, grid: Sequence[Sequence[float]], most: float) -> Any:
    """Draw tokens kept, `[layers][heads]`, NaN where a layer is dense, on a logarithmic scale that ends at `most`."""
    import matplotlib
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="0.88")
    norm = LogNorm(1, max(most, 2.0))
    image = panel.imshow(np.ma.masked_invalid(np.asarray(grid, dtype=float)), cmap=colours, norm=norm, aspect="auto")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    return image


def needles(rows: Sequence[Row]) -> list[Picture]:
    """Draw facts answered by depth and length: a picture for each kind of fact, a panel for each selector and dense."""
    pictures = []
    usable = [row for row in rows if _ACCURACY.has(row.values) and number(row.values.get("depth")) is not None]
    usable = [row for row in usable if number(row.values.get("context")) is not None]
    kinds = sorted({str(row.values.get("kind") or "facts") for row in usable})
    for kind in kinds:
        same = [row for row in usable if str(row.values.get("kind") or "facts") == kind]
        for order, (label, mine) in enumerate(_comparable(same)):
            groups, chosen = representatives(mine)
            groups, left = _first(groups)
            titles = {name: f"{_short(name)}\n{_choice(chosen[name])}" for name in groups}
            dense = [row for row in mine if row.is_dense]
            if dense:
                groups, titles = {"dense": dense, **groups}, {"dense": "dense\n", **titles}
            contexts = sorted({float(row.values["context"]) for row in mine})
            depths = sorted({float(row.values["depth"]) for row in mine})
            with style.drawing():
                # Wide enough for a title, high enough for a number in each cell.
                width, height = min(5.0, max(1.9, 0.8 + 0.42 * len(contexts))), min(4.5, 0.9 + 0.23 * len(depths))
                columns = 6 if len(groups) > 4 and width < 3 else 4
                figure, axes = style.grid(len(groups), columns=columns, width=width, height=height, sharey=True)
                for panel, (name, group) in zip(axes, groups.items(), strict=True):
                    image = _needle(panel, group, contexts, depths)
                    panel.set_title(titles[name], fontsize=10)
                    panel.set_ylabel("depth of the fact" if panel.get_subplotspec().is_first_col() else "")
                    panel.set_xlabel("context" if width < 3 else "context length in tokens")
                style.colour_bar(figure, image, axes, "facts answered, share")
                style.title(figure, f"Facts answered by depth and length: {kind}\n{label}")
            caption = (
                "The share of planted facts that were answered: depth 0 % is the beginning of the context, 100 % its "
                "end. Cells without a number were not measured. Compare with the panel of dense attention, where a "
                "fact can be lost too."
            )
            stem = f"needle-{kind.replace(' ', '_').replace('/', '_')}{_number(order)}"
            pictures.append(Picture(stem, f"Facts by depth and length: {kind}", caption + left, figure))
    return pictures


def positions(rows: Sequence[Row]) -> list[Picture]:
    """Draw where in the context the tokens lie that top-p and top-k keep, from the table ``positions``."""
    pictures = []
    wanted = ("bin_low", "bin_high", "share")
    usable = [row for row in rows if all(number(row.values.get(name)) is not None for name in wanted)]
    for order, (label, mine) in enumerate(_comparable(usable)):
        mine, context = _longest(mine)
        groups, chosen = representatives(mine)
        groups, left = _first(groups)
        if not groups:
            continue
        with style.drawing():
            figure, axes = style.grid(len(groups), columns=4, width=3.1, height=2.8, legend=1.3, sharey=True)
            for panel, (name, group) in zip(axes, groups.items(), strict=True):
                for kind, colour, line in (("top_p", style.COLOURS[0], "-"), ("top_k", style.COLOURS[1], "--")):
                    bins = _density([row.values for row in group if row.values.get("kind") == kind])
                    if bins:
                        edges = [low for low, _, _ in bins] + [bins[-1][1]]
                        panel.stairs(
                            [value for *_, value in bins],
                            edges,
                            baseline=None,
                            color=colour,
                            linestyle=line,
                            linewidth=1.8,
                        )
                panel.axhline(1.0, color="0.6", linewidth=1, linestyle=":")
                panel.set_title(f"{_short(name)}\n{_choice(chosen[name])}", fontsize=10)
                style.tidy(panel)
                spec = panel.get_subplotspec()
                panel.set_ylabel("share ÷ uniform share" if spec.is_first_col() else "")
            style.plain_log(axes[0].yaxis)
            _age_axis(axes, [row.values for group in groups.values() for row in group])
            handles = [
                style.line(color=style.COLOURS[0], label="top-p"),
                style.line(color=style.COLOURS[1], linestyle="--", label="top-k"),
                style.line(color="0.6", linestyle=":", label="uniform"),
            ]
            style.legend(figure, handles)
            style.title(figure, f"Where the kept tokens lie{context}\n{label}")
        caption = (
            "How many of the kept tokens lie at each age, over what an even spread would put there; age 0 is the "
            "newest token, 1 the first of the context. Mean over layers. Both kinds keep as many tokens on average: "
            "where the lines part, top-p spends them elsewhere than top-k."
        )
        pictures.append(
            Picture(f"positions{_number(order)}", "Positions kept, top-p against top-k", caption + left, figure)
        )
    return pictures


def _needle(panel: Any, group: Sequence[Row], contexts: Sequence[float], depths: Sequence[float]) -> Any:
    import matplotlib
    import numpy as np

    grid = np.full((len(depths), len(contexts)), np.nan)
    cells: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in group:
        place = depths.index(float(row.values["depth"])), contexts.index(float(row.values["context"]))
        cells.setdefault(place, []).append(row.values)
    for place, values in cells.items():
        grid[place] = pooled(_ACCURACY, values)[0]
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="0.88")
    image = panel.imshow(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=1, aspect="auto")
    if grid.size <= 80:
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "white" if value < 0.55 else "black"
                panel.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=10, color=colour)
    panel.set_xticks(range(len(contexts)), [style.length(context) for context in contexts])
    scale = 100 if max(depths) <= 1 else 1
    panel.set_yticks(range(len(depths)), [f"{scale * depth:.0f} %" for depth in depths])
    return image


def _heads(group: Sequence[Row]) -> list[list[float]]:
    found: dict[tuple[int, int], list[float]] = {}
    for row in group:
        place = _whole(row, "layer") or 0, _whole(row, "head") or 0
        found.setdefault(place, []).append(float(row.values["b1_query"]))
    layers, heads = max(layer for layer, _ in found) + 1, max(head for _, head in found) + 1
    nothing = [math.nan]
    return [
        [sum(each) / len(each) for head in range(heads) for each in [found.get((layer, head), nothing)]]
        for layer in range(layers)
    ]


def _density(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Return (low, high, share over the uniform share) of each bin, mean over what rows there are of it."""
    found: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        found.setdefault((float(row["bin_low"]), float(row["bin_high"])), []).append(float(row["share"]))
    means = {edges: sum(values) / len(values) for edges, values in sorted(found.items()) if edges[1] > edges[0]}
    total = sum(means.values())
    if not total:
        return []
    # What no token of falls is not drawn: a logarithmic axis has no 0.
    return [(low, high, share / total / (high - low) or math.nan) for (low, high), share in means.items()]


def _age_axis(axes: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    widths = [float(row["bin_high"]) - float(row["bin_low"]) for row in rows]
    if min(widths) > 0 and max(widths) > 4 * min(widths):
        for panel in axes:
            panel.set_xscale("symlog", linthresh=min(widths))
    for panel in axes:
        panel.set_xlim(0, max(float(row["bin_high"]) for row in rows))
        panel.set_xlabel("age, of the context")


def _comparable(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Put rows of one setting together, and name it."""
    groups: dict[Setting, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.setting, []).append(row)
    names = labels(groups)
    return sorted(((names[where], group) for where, group in groups.items()), key=lambda each: each[0])


def _longest(rows: Sequence[Row]) -> tuple[list[Row], str]:
    contexts = {number(row.values.get("context")) for row in rows} - {None}
    if not contexts:
        return list(rows), ""
    longest = max(each for each in contexts if each is not None)
    kept = [row for row in rows if number(row.values.get("context")) == longest]
    return kept, f", context {style.length(longest)}"


def _first(groups: dict[str, list[Row]]) -> tuple[dict[str, list[Row]], str]:
    """Return as many groups as a picture has panels for, and the end of a caption that names the others."""
    names = list(groups)
    left = f" Left out, for want of room: {', '.join(names[MOST_PANELS:])}." if len(names) > MOST_PANELS else ""
    return {name: groups[name] for name in names[:MOST_PANELS]}, left


def _choice(how: Choice) -> str:
    p = "" if how.p is None else f" p={how.p:g},"
    return f"{how.rule}{p} budget {how.size}".replace("top_p p=", "p=")


def _short(name: str) -> str:
    return name if len(name) <= 26 else name[:25] + "…"


def _whole(row: Row, name: str) -> int | None:
    value = number(row.values.get(name))
    return None if value is None or value < 0 else int(value)


def _number(order: int) -> str:
    return f"-{order + 1}" if order else ""
