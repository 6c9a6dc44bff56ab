"""Pictures of results: how much faster than dense, and where the time goes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twilight.errors import missing_extra

from .tables import QUEST, length

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey; a marker or hatch goes with each.
_BATCHES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_STAGES = {
    "select": ("#56B4E9", ""), "estimate": ("#0072B2", "//"), "prune": ("#E69F00", ".."), "attend": ("#009E73", "\\\\"),
}  # fmt: skip


def save_plots(data: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Draw what results hold, as ``<stem>-speedup.png`` and ``<stem>-stages.png``, and return the files.

    Raises:
        MissingExtraError: no matplotlib.
        ValueError: no cells, or results of another benchmark.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plots", "--plot")
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
        for number, batch in enumerate(batches):
            points = sorted(
                (cell["length"], cell["methods"][QUEST]["speedup"]) for cell in cells if cell["batch"] == batch
            )
            style = number % len(_BATCHES)
            panel.plot(
                [x for x, _ in points], [y for _, y in points], color=_BATCHES[style], marker=_MARKERS[style],
                label=f"batch {batch}", linewidth=1.8, markersize=6,
            )  # fmt: skip
        panel.axhline(1.0, color="0.4", linewidth=1, linestyle="--")
        panel.annotate("dense", (lengths[0], 1.0), xytext=(0, 3), textcoords="offset points", color="0.4", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [length(tokens) for tokens in lengths])
        panel.minorticks_off()
        panel.set_xlabel("context length in tokens")
        panel.set_title(f"{heads} heads", fontsize=10)
        panel.grid(axis="y", color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.08)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("times as fast as the best dense kernel")
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"Quest + top-p, one layer's attention, {data['gpu']}", fontsize=11)
    return figure


def stages(data: dict[str, Any]) -> Figure:
    """Draw the stages of Quest with top-p as shares of dense: a bar for each cell, and a tick for the step as a whole.

    Stages are timed apart: together they can take more than the step, whose launches overlap, or less.
    """
    from matplotlib.figure import Figure

    cells = [cell for shape in _shapes(data).values() for cell in shape]
    several = len(_shapes(data)) > 1
    figure = Figure(figsize=(7.5, 1.7 + 0.42 * len(cells)), layout="constrained")
    panel = figure.subplots()
    labels = []
    for y, cell in enumerate(cells):
        row = cell["methods"][QUEST]
        dense = cell["dense"][cell["best_dense"]]["us"]
        left = 0.0
        for stage, (colour, hatch) in _STAGES.items():
            if stage in row:
                share = row[stage]["us"] / dense
                panel.barh(
                    y, share, left=left, color=colour, hatch=hatch, edgecolor="white", height=0.68,
                    label=stage if y == 0 else None,
                )  # fmt: skip
                left += share
        whole = row["total"]["us"] / dense
        panel.plot([whole, whole], [y - 0.42, y + 0.42], color="black", linewidth=2, label="whole" if y == 0 else None)
        end = max(left, whole)
        panel.text(end, y, f"  {row['total']['us']:.0f} of {dense:.0f} µs", va="center", fontsize=9)
        heads = f"{cell['q_heads']}/{cell['kv_heads']}, " if several else ""
        labels.append(f"{heads}b={cell['batch']}, {length(cell['length'])}")
    panel.axvline(1.0, color="0.4", linewidth=1, linestyle="--")
    panel.set_yticks(range(len(cells)), labels)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max(1.0, panel.get_xlim()[1]))
    panel.set_xlabel("time, with the best dense kernel at 1 (dashed)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9, title=_title(data))
    return figure


def _title(data: dict[str, Any]) -> str:
    return f"Stages of Quest + top-p, one layer, {data['gpu']}"


def _shapes(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in data["cells"]:
        if QUEST in cell["methods"]:
            found.setdefault(f"{cell['q_heads']}/{cell['kv_heads']}", []).append(cell)
    return found
