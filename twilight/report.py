"""Results as tables, data and pictures."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twilight.errors import missing_extra
from twilight.stats import Stats


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("twilight-attn", "torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def save_json(path: str, result: dict[str, Any]) -> None:
    """Write a result to a file, or to standard output if `path` is ``-``."""
    text = json.dumps(result, indent=2)
    if path == "-":
        sys.stdout.write(text + "\n")
        return
    Path(path).write_text(text + "\n", encoding="utf-8")


def check_outputs(json_path: str | None, plot_path: str | None) -> None:
    """Refuse what could not be written at the end of a run, before it begins. Folders are made.

    Raises:
        MissingExtraError: a picture without matplotlib.
        OSError: a folder that cannot be made or written to.
    """
    if plot_path and importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plots", "task.plot")
    for path in (json_path, plot_path):
        if path and path != "-":
            folder = Path(path).parent
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK) or Path(path).is_dir():
                raise PermissionError(f"cannot write '{path}'")


def print_decode(console: Console, result: dict[str, Any]) -> None:
    """Print a decode run: what came out, how fast, and what was read."""
    console.print(_outputs(result))
    console.print(_budgets(result))
    console.print(_totals(result))


def _outputs(result: dict[str, Any]) -> Table:
    dense, sparse = result["dense"], result["twilight"]
    title = escape(f"{result['prompt']}, {result['context_tokens']} tokens")
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = ["asked"] + (["expected"] if result["expected"] else [])
    for name in [*columns, "twilight"] + (["dense"] if dense else []):
        table.add_column(name, overflow="fold")
    for index, question in enumerate(result["questions"]):
        # Prompts are source text: what looks like markup in them is not.
        row = [escape(question.strip() or repr(question))]
        if result["expected"]:
            row.append(escape(result["expected"][index]))
        row += [_shown(side["texts"][index], result, index) for side in (sparse, dense) if side]
        table.add_row(*row)
    return table


def _shown(text: str, result: dict[str, Any], index: int) -> str:
    if not result["expected"]:
        return escape(text)
    right = text.startswith(result["expected"][index])
    return f"[green]{escape(text.strip())}[/]" if right else f"[red]{escape(text.strip())} ✗[/]"


def _budgets(result: dict[str, Any]) -> Table:
    kinds: dict[str, list[str]] = {}
    for index, kind in result["layer_kinds"].items():
        kinds.setdefault(kind, []).append(index)
    others = [f"layers {', '.join(layers)}: {kind}" for kind, layers in kinds.items() if kind != "sparse"]
    longest = max(float(row["seq_len"]) for row in result["layers"])
    table = Table(
        box=SIMPLE_HEAD,
        title=f"tokens a head and step, of {longest:.0f} in the cache: mean (5th to 95th percentile)",
        title_justify="left",
        caption="\n".join(["B1 kept: by one query head; B1 read: by the kv head, for its whole group", *others]),
        caption_justify="left",
    )
    for name in ("layer", "candidates B0", "B1 kept", "B1 read", "mass", "KV bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["layers"]:
        table.add_row(
            str(row["layer"]),
            *(_spread(row[name]) for name in ("b0", "b1_query", "b1_group")),
            f"{row['mass']['mean']:.3f}",
            f"{100 * row['kv_bytes'] / row['dense_bytes']:.1f} %",
        )
    return table


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.0f} ({values['p5']:.0f}–{values['p95']:.0f})"


def _totals(result: dict[str, Any]) -> Table:
    sparse, dense, read, memory = result["twilight"], result["dense"], result["kv_bytes"], result["cache_bytes"]
    table = Table(show_header=False, box=SIMPLE_HEAD)
    if "correct" in result:
        counts = ", ".join(f"{name} {n}/{len(result['expected'])}" for name, n in result["correct"].items())
        table.add_row("facts answered", counts)
    if dense:
        table.add_row("agreement with dense", f"{100 * result['agreement']:.1f} % of {_count(sparse)} generated tokens")
    fast = sparse["tokens_per_second"]
    speed = f"{fast:.1f} twilight"
    if dense:
        slow = dense["tokens_per_second"]
        speed += f", {slow:.1f} dense ({fast / slow:.2f}×)"
    table.add_row("tokens per second", f"{speed}, {result['device']} {result['dtype']}")
    table.add_row("KV bytes read, sparse layers", _share(read["sparse_layers"], read["sparse_layers_dense"]))
    table.add_row("KV bytes read, all layers", _share(read["all_layers"], read["all_layers_dense"]))
    extra = memory["shadow"] + memory["metadata"] + memory["state"]
    table.add_row(
        "memory beside K and V",
        f"{_mb(memory['shadow'])} 4-bit keys, {_mb(memory['metadata'] + memory['state'])} metadata, "
        f"{100 * extra / memory['kv']:.1f} % of {_mb(memory['kv'])} K and V (pool of the sparse layers)",
    )
    if result["device"] == "cpu":
        table.add_row("note", "on a CPU this is the torch reference, which specifies the kernels and is not fast")
    return table


def _count(side: dict[str, Any]) -> int:
    return sum(map(len, side["tokens"]))


def _share(part: float, whole: float) -> str:
    return f"{_mb(part)} of {_mb(whole)} dense ({100 * part / whole:.1f} %)"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


def save_budget_plot(path: str, stats: Stats, layers: dict[int, str], *, title: str) -> None:
    """Draw the tokens that each head keeps, a row a layer, as a PNG.

    Args:
        path: file to write.
        stats: records of the run.
        layers: what each layer is; dense ones are drawn as such.
        title: what the run was.
    """
    import numpy as np
    from matplotlib.figure import Figure

    from twilight.reporting.maps import draw_heads

    kept = {index: stats.query_heads(index) for index in sorted(stats.by_layer())}
    num_heads = len(next(iter(kept.values())))
    grid = np.full((len(layers), num_heads), np.nan)
    for index, heads in kept.items():
        grid[index] = heads
    longest = max(float(record.seq_lens.max()) for record in stats.records)
    figure = Figure(figsize=(1.5 + 0.75 * num_heads, 1.6 + 0.42 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = draw_heads(axes, grid.tolist(), longest)
    for (row, column), value in np.ndenumerate(grid):
        if num_heads <= 16:
            text = "dense" if np.isnan(value) else f"{value:.0f}"
            dark = not np.isnan(value) and np.log(max(value, 1)) < 0.6 * np.log(longest)
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    if num_heads <= 16:
        axes.set_xticks(range(num_heads))
    axes.set_yticks(range(len(layers)))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"Tokens kept by top-p\n{title}", fontsize=10)
    figure.colorbar(image, ax=axes, label=f"mean tokens kept a step (of {longest:.0f})")
    figure.savefig(path, dpi=150)
