"""Markdown tables from results, and the blocks of documents that hold them.

A document holds a block as

    <!-- bench:speed benchmarks/results/decode-nvidia-h200.json -->
    ...
    <!-- /bench -->

with the table's kind, a path from the document's folder and, if not all cells are wanted, words like ``64:32k``. What
is between the marks is written by `twilight bench report --update FILE` and by nobody else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from twilight.errors import unknown_name
from twilight.reporting.style import length

from .cells import parse_length
from .results import load

COLUMNS = ("select", "estimate", "prune", "attend", "total", "append", "decode")
"""Columns of a method, in the order of a step; a method has some of them."""
QUEST, TOP_K = "quest + top-p", "quest top-k, N/8"
_LABELS = {
    QUEST: "Quest + top-p", TOP_K: "Quest top-k, N/8", "full + top-p": "full + top-p",
    "quest + bounded top-p": "Quest + bounded top-p",
    "quest + bounded top-p + tail": "Quest + bounded top-p, page tail",
    "block_mean + top-p": "block mean + top-p", "double_sparsity + top-p": "Double Sparsity + top-p",
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- bench:(\S+) (\S+)((?: \S+)*) -->\n).*?(<!-- /bench -->)", flags=re.S)


def speed(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return a row a cell: best dense kernel, Quest with top-p, its ratio, and the other methods' times."""
    others = [name for name in _LABELS if name != QUEST and any(name in cell["methods"] for cell in cells)]
    sizes, which = _sizes(cells)
    rows = []
    for cell, words in zip(cells, which, strict=True):
        row = cell["methods"][QUEST]
        dense = cell["dense"][cell["best_dense"]]["us"]
        words += [
            f"{number(dense)} ({cell['best_dense']})",
            number(row["total"]["us"]), f"{row['speedup']:.2f}×", percent(row["floor_fraction"]),
        ]  # fmt: skip
        words += [number(cell["methods"][name]["total"]["us"]) if name in cell["methods"] else "–" for name in others]
        rows.append(words)
    first = [*sizes, "best dense", "Quest + top-p", "ratio", "of the floor"]
    return markdown([*first, *(_LABELS[name] for name in others)], rows)


def stages(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return a row a cell and method: microseconds of each stage, and the stages' share of their own floors."""
    columns = [c for c in COLUMNS if any(c in row for cell in cells for row in cell["methods"].values())]
    sizes, which = _sizes(cells)
    rows = []
    for cell, size in zip(cells, which, strict=True):
        for name, row in cell["methods"].items():
            words = [*size, _LABELS.get(name, name)]
            for column in columns:
                words.append(_stage(cell, row, column) if column in row else "–")
            rows.append([*words, f"{row['gbps']:.0f}", percent(row["floor_fraction"]), f"{row['speedup']:.2f}×"])
    return markdown([*sizes, "", *columns, "GB/s", "of the floor", "ratio to dense"], rows)


def dense(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return a row a cell: microseconds of every dense kernel."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["dense"]))
    rows = [
        [f"{cell['q_heads']}/{cell['kv_heads']}", str(cell["batch"]), length(cell["length"])]
        + [number(cell["dense"][name]["us"]) if name in cell["dense"] else "–" for name in names]
        for cell in cells
    ]
    return markdown(["heads", "b", "N", *names], rows)


def model(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return a row a batch size and way to attend: milliseconds a token, ratio, share of attention."""
    rows = []
    for cell in cells:
        for name, way in cell["ways"].items():
            best = " (best dense)" if name == cell["best_dense"] else ""
            rows.append(
                [str(cell["batch"]), length(cell["length"]), name + best, f"{way['ms']:.2f}", f"{way['ratio']:.2f}×",
                 percent(way["attention_share"])]
            )  # fmt: skip
    return markdown(["b", "N", "attention", "ms a token", "against best dense", "share of attention"], rows)


def launch(data: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    """Return a row a call: microseconds of the host in each cell, and without its launches in the last."""
    names = list(dict.fromkeys(name for cell in cells for name in cell["calls"]))
    rows = []
    for name in names:
        found = [cell["calls"].get(name) for cell in cells]
        times = [number(row["us"]) if row else "–" for row in found]
        last = found[-1] or {}
        rows.append([name, *times, number(last["around"]) if "around" in last else "–"])
    return markdown(
        ["", *(f"b={cell['batch']}, N={length(cell['length'])}" for cell in cells), "around launches"], rows
    )


TABLES: dict[str, Callable[[dict[str, Any], Sequence[dict[str, Any]]], str]] = {
    "speed": speed, "stages": stages, "dense": dense, "model": model, "launch": launch,
}  # fmt: skip


def chosen(data: dict[str, Any], words: Sequence[str]) -> list[dict[str, Any]]:
    """Return the cells that words like ``64:32k`` name, all without any.

    Raises:
        ValueError: a word names none.
    """
    found = []
    for word in words:
        batch, _, tokens = word.partition(":")
        cells = [c for c in data["cells"] if (str(c["batch"]), c["length"]) == (batch, parse_length(tokens))]
        if not cells:
            there = ", ".join(f"{c['batch']}:{length(c['length'])}" for c in data["cells"]) or "none"
            raise ValueError(f"cells: the results have no '{word}' (there is: {there})")
        found += cells
    return found if words else list(data["cells"])


def render(kind: str, data: dict[str, Any], words: Sequence[str] = ()) -> str:
    """Return a table of a kind that `TABLES` knows."""
    if kind not in TABLES:
        raise unknown_name("table", kind, list(TABLES), see="twilight bench report --help")
    return TABLES[kind](data, chosen(data, words))


def update(document: Path) -> bool:
    """Write a document's blocks anew; return whether that changed it.

    Raises:
        ValueError: it has none.
    """
    text = document.read_text(encoding="utf-8")

    def block(match: re.Match[str]) -> str:
        start, kind, path, words, end = match.groups()
        return f"{start}{render(kind, load(document.parent / path), words.split())}{end}"

    new, count = _BLOCK.subn(block, text)
    if not count:
        raise ValueError(f"--update: '{document}' has no block <!-- bench:KIND RESULTS --> ... <!-- /bench -->")
    if new != text:
        document.write_text(new, encoding="utf-8")
    return new != text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its lines ended."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(words)} |\n" for words in lines)


def number(us: float) -> str:
    """Return microseconds with three digits or so."""
    return f"{us:.1f}" if us < 99.95 else f"{us:.0f}"


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.0f} %"


def _sizes(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns that say what a cell is, heads among them if they differ, and their words for each cell."""
    heads = [f"{cell['q_heads']}/{cell['kv_heads']}" for cell in cells]
    words = [[str(cell["batch"]), length(cell["length"])] for cell in cells]
    if len(set(heads)) < 2:
        return ["b", "N"], words
    return ["heads", "b", "N"], [[head, *rest] for head, rest in zip(heads, words, strict=True)]


def _stage(cell: dict[str, Any], row: dict[str, Any], column: str) -> str:
    us, moved = row[column]["us"], row["bytes"].get(column, 0)
    share = f" ({percent(moved / us / 1e6 / cell['bandwidth'])})" if moved else ""
    return f"{number(us)}{share}"
