"""How pictures look: colours, markers, sizes, and how they are saved. Shared with the benchmarks' pictures."""

from __future__ import annotations

import contextlib
import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twilight.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers and in grey; a marker or hatch goes with each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX<>*d"
LINES = ("-", "--", ":", "-.")
STAGES = {
    "select": ("#56B4E9", ""), "estimate": ("#0072B2", "//"), "prune": ("#E69F00", ".."), "attend": ("#009E73", "\\\\"),
}  # fmt: skip

# 11 points at 150 dpi are 11 pixels high at half size, the least that is read with ease.
_FONT = 11
_LOOK: dict[Any, Any] = {
    "font.size": _FONT, "axes.titlesize": _FONT, "axes.labelsize": _FONT, "legend.fontsize": _FONT,
    "xtick.labelsize": _FONT, "ytick.labelsize": _FONT, "figure.titlesize": _FONT + 1, "svg.hashsalt": "twilight",
    "hatch.linewidth": 0.6,
}  # fmt: skip


@dataclass
class Picture:
    """A figure, with what a reader needs beside it."""

    stem: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Series:
    """What a curve looks like: the same in all pictures of a report."""

    colour: str
    marker: str
    line: str


def series(names: Iterable[str]) -> dict[str, Series]:
    """Give each name a look. Colour and marker together are of one name only, up to 66."""
    return {
        name: Series(
            COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], LINES[index // len(COLOURS) % len(LINES)]
        )
        for index, name in enumerate(sorted(set(names)))
    }


def check_matplotlib(extra: str, purpose: str) -> None:
    """Raise a `MissingExtraError` that names `extra` if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", extra, purpose)


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw with this package's sizes, and without a display."""
    import matplotlib

    with matplotlib.rc_context(_LOOK):
        yield


def grid(count: int, *, columns: int = 3, width: float = 4.3, height: float = 3.6, legend: float = 0.0,
         **options: Any) -> tuple[Figure, list[Any]]:  # fmt: skip
    """Make a figure of `count` panels, and return them.

    Args:
        columns: how many stand side by side at most.
        width, height: of a panel, in inches.
        legend: inches to the right of them for a legend.
        options: of ``Figure.subplots``.
    """
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    # A title is wrapped to 60 characters, which want 5 inches.
    size = (max(5.2, 0.6 + width * columns + legend), 0.9 + height * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    return figure, panels[:count]


def title(figure: Figure, text: str, *, legend: float = 0.0) -> None:
    """Put a title over all panels, wrapped to what of the figure's width is left of a legend."""
    characters = int((figure.get_size_inches()[0] - legend) * 11)
    lines = [line for part in text.split("\n") for line in textwrap.wrap(part, characters)]
    figure.suptitle("\n".join(lines), x=0.01, ha="left")


def tidy(panel: Any) -> None:
    """Take away what a panel does not need."""
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def line(**options: Any) -> Any:
    """Return a line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **options)


def colour_bar(figure: Figure, image: Any, panels: Sequence[Any], label: str) -> Any:
    """Put a colour bar beside the panels at their top, no longer than is needed to read it, and return it."""
    long = min(1.0, 3.0 / figure.get_size_inches()[1])
    return figure.colorbar(image, ax=list(panels), label=label, shrink=long, aspect=16, anchor=(0.0, 1.0), pad=0.02)


def legend(figure: Figure, handles: Sequence[Any], **options: Any) -> None:
    """Put a legend beside the panels, where it hides nothing."""
    figure.legend(handles=list(handles), loc="outside right upper", frameon=False, handlelength=2.4, **options)


def length(tokens: float) -> str:
    """Return 32768 as 32k."""
    whole = round(tokens)
    return f"{whole // 1024}k" if whole and whole % 1024 == 0 else str(whole)


def token_axis(axis: Any, values: Iterable[float]) -> None:
    """Make an axis logarithmic, with the powers of two of tokens as its ticks."""
    import numpy as np

    found = [value for value in values if value > 0]
    if not found:
        return
    lowest, highest = min(found), max(found)
    getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
    first, last = int(np.floor(np.log2(lowest))), int(np.ceil(np.log2(highest)))
    step = max(1, -(-(last - first) // 6))
    ticks = [2.0**power for power in range(first, last + 1, step)]
    axis.set_ticks(ticks, [length(tick) if tick >= 1 else f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


def plain_log(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 of powers of ten, or at the powers if many."""
    import math

    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    low, high = axis.get_view_interval()
    wide = low > 0 and math.log10(high / low) > 2.2
    axis.set_major_locator(LogLocator(10, (1.0,) if wide else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def save(picture: Picture, folder: Path) -> list[Path]:
    """Write a picture as PNG and SVG; the same picture is the same file every time."""
    png, svg = (folder / f"{picture.stem}{suffix}" for suffix in (".png", ".svg"))
    with drawing():
        # The layout takes longer than the drawing, and is the same for both.
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")
        picture.figure.savefig(png, dpi=150, metadata={"Software": None})
        picture.figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
