"""Pictures of results: how much faster than dense, and where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from twilight.reporting.style import COLOURS, MARKERS, STAGES, check_matplotlib, length, tidy

from .tables import QUEST, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_plots(data: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw what results hold, as ``<stem>-speedup.png`` and ``<stem>-stages.png``, and return the files.

    Raises:
        MissingExtraError: no matplotlib.
        ValueError: no cells, or results of another benchmark.
    """
    check_matplotlib("plots", "--plot")
    if data["benchmark"] != "decode" or not data["cells"]:
        raise ValueError(f"--plot: draws cells of 'decode', got {len(data['cells'])} of '{data['benchmark']}'")
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in (("speedup", speedup), ("stages", stages)):
        figure = draw(data)
        files.append(folder / f"{stem}-{name}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def speedup(data: dict[str, Any]) -> Figure:
    """Draw Quest with top-p against the best dense kernel: a panel for each shape of heads, a line for each batch."""
    from matplotlib.figure import Figure

    shapes = _shapes(data)
    figure = Figure(figsize=(1.2 + 4.2 * len(shapes), 3.9), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    batches = sorted({cell["batch"] for cell in data["cells"]})
    lengths = sorted({cell["length"] for cell in data["cells"]})
    for panel, (heads, cells) in zip(panels, shapes.items(), strict=True):
        for order, batch in enumerate(batches):
            points = sorted(
                (cell["length"], cell["methods"][QUEST]["speedup"]) for cell in cells if cell["batch"] == batch
            )
            style = order % len(COLOURS)
            panel.plot(
                [x for x, _ in points], [y for _, y in points], color=COLOURS[style], marker=MARKERS[style],
                label=f"batch {batch}", linewidth=1.8, markersize=6,
            )  # fmt: skip
        panel.axhline(1.0, color="0.4", linewidth=1, linestyle="--")
        panel.annotate("dense", (lengths[0], 1.0), xytext=(0, 3), textcoords="offset points", color="0.4", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [length(tokens) for tokens in lengths])
        panel.minorticks_off()
        panel.set_xlabel("context length in tokens")
        panel.set_title(f"{heads} heads", fontsize=10)
        tidy(panel)
        panel.margins(x=0.08)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast as the best dense kernel")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", frameon=False, fontsize=9,
        ncols=min(len(batches), 3 * len(shapes)), title=f"Quest + top-p, one layer's attention, {data['gpu']}",
        title_fontsize=11,
    )  # fmt: skip
    return figure


def stages(data: dict[str, Any]) -> Figure:
    """Draw the stages of Quest with top-p as shares of the step: a panel for each shape of heads, a bar for each cell.

    Stages are timed apart: together they can take more than the step, which is at 100 %, or less.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shapes = _shapes(data)
    most = max(len(cells) for cells in shapes.values())
    figure = Figure(figsize=(1.4 + 4.8 * len(shapes), 1.6 + 0.36 * most), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False)[0]
    for panel, (heads, cells) in zip(panels, shapes.items(), strict=True):
        for y, cell in enumerate(cells):
            row = cell["methods"][QUEST]
            whole, left = row["total"]["us"], 0.0
            for stage, (colour, hatch) in STAGES.items():
                if stage in row:
                    share = 100 * row[stage]["us"] / whole
                    panel.barh(y, share, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.72)
                    left += share
            panel.text(max(left, 100.0), y, f"  {number(whole)} µs, {row['speedup']:.1f}×", va="center", fontsize=9)
        panel.axvline(100, color="0.3", linewidth=1, linestyle="--")
        panel.set_yticks(range(len(cells)), [f"b={cell['batch']}, {length(cell['length'])}" for cell in cells])
        panel.invert_yaxis()
        panel.margins(y=0.02)
        panel.set_xlim(0, 1.35 * max(100.0, panel.get_xlim()[1] / 1.05))
        panel.set_xticks(range(0, 101, 25))
        panel.set_xlabel("stages as launches of their own, in % of the step in one;\nµs a layer, and × dense")
        panel.set_title(f"{heads} heads", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    drawn = {stage for cells in shapes.values() for cell in cells for stage in cell["methods"][QUEST]}
    patches = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=stage)
        for stage, (colour, hatch) in STAGES.items() if stage in drawn
    ]  # fmt: skip
    figure.legend(
        handles=patches, loc="outside upper center", ncols=len(patches), frameon=False, fontsize=9,
        title=f"Where a step of Quest + top-p spends its time, {data['gpu']}", title_fontsize=11,
    )  # fmt: skip
    return figure


def _shapes(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in data["cells"]:
        if QUEST in cell["methods"]:
            found.setdefault(f"{cell['q_heads']}/{cell['kv_heads']}", []).append(cell)
    return found
