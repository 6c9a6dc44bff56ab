"""Results as tables, data and pictures."""

from __future__ import annotations

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")


def print_decode(console: Console, result: dict[str, Any]) -> None:
    """Print a decode run: what came out, how fast, and what was read."""
    console.print(_outputs(result))
    console.print(_budgets(result))
    console.print(_totals(result))


def _outputs(result: dict[str, Any]) -> Table:
    dense, sparse = result["dense"], result["twilight"]
    table = Table(title=f"{result['prompt']}, {result['context_tokens']} tokens", title_justify="left")
    columns = ["asked"] + (["expected"] if result["expected"] else [])
    for name in [*columns, "twilight"] + (["dense"] if dense else []):
        table.add_column(name, overflow="fold")
    for index, question in enumerate(result["questions"]):
        row = [question.strip() or repr(question)]
        if result["expected"]:
            row.append(result["expected"][index])
        row += [_shown(side["texts"][index], result, index) for side in (sparse, dense) if side]
        table.add_row(*row)
    return table


def _shown(text: str, result: dict[str, Any], index: int) -> str:
    if not result["expected"]:
        return text
    right = text.startswith(result["expected"][index])
    return f"[green]{text.strip()}[/]" if right else f"[red]{text.strip()} ✗[/]"


def _budgets(result: dict[str, Any]) -> Table:
    table = Table(title="tokens a step: mean (5th to 95th percentile)", title_justify="left")
    for name in ("layer", "in cache", "candidates B0", "kept B1, query head", "read B1, kv head", "mass", "KV bytes"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    dense = [index for index, kind in result["layer_kinds"].items() if kind != "sparse"]
    for index in dense:
        table.add_row(index, "", "", "", f"[dim]{result['layer_kinds'][index]}[/]", "", "100.0 %")
    for row in result["layers"]:
        table.add_row(
            str(row["layer"]),
            f"{row['seq_len']:.0f}",
            *(_spread(row[name]) for name in ("b0", "b1_query", "b1_group")),
            f"{row['mass']['mean']:.3f}",
            f"{100 * row['kv_bytes'] / row['dense_bytes']:.1f} %",
        )
    return table


def _spread(values: dict[str, float]) -> str:
    return f"{values['mean']:.0f} ({values['p5']:.0f}–{values['p95']:.0f})"


def _totals(result: dict[str, Any]) -> Table:
    sparse, dense, read, memory = result["twilight"], result["dense"], result["kv_bytes"], result["cache_bytes"]
    table = Table(show_header=False)
    if "correct" in result:
        counts = ", ".join(f"{name} {n}/{len(result['expected'])}" for name, n in result["correct"].items())
        table.add_row("facts answered", counts)
    if dense:
        table.add_row("agreement with dense", f"{100 * result['agreement']:.1f} % of {_count(sparse)} generated tokens")
    speed = f"{sparse['tokens_per_second']:.1f} twilight"
    if dense:
        speed += f", {dense['tokens_per_second']:.1f} dense ({sparse['tokens_per_second'] / dense['tokens_per_second']:.2f}×)"
    table.add_row("tokens per second", f"{speed}, {result['device']} {result['dtype']}")
    table.add_row("KV bytes read, sparse layers", _share(read["sparse_layers"], read["sparse_layers_dense"]))
    table.add_row("KV bytes read, all layers", _share(read["all_layers"], read["all_layers_dense"]))
    extra = memory["shadow"] + memory["metadata"]
    table.add_row(
        "memory beside K and V",
        f"{_mb(memory['shadow'])} 4-bit keys, {_mb(memory['metadata'])} selector, "
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
    try:
        import matplotlib
    except ImportError as error:
        raise missing_extra("matplotlib", "plots", "task.plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import LogNorm

    kept = {index: stats.query_heads(index) for index in sorted(stats.by_layer())}
    num_heads = len(next(iter(kept.values())))
    grid = np.full((len(layers), num_heads), np.nan)
    for index, heads in kept.items():
        grid[index] = heads
    longest = max(float(record.seq_lens.max()) for record in stats.records)
    figure, axes = plt.subplots(figsize=(1.5 + 0.75 * num_heads, 1.6 + 0.42 * len(layers)), layout="constrained")
    colours = plt.get_cmap("viridis").copy()
    colours.set_bad("0.88")
    image = axes.imshow(np.ma.masked_invalid(grid), cmap=colours, norm=LogNorm(1, longest), aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        if num_heads <= 16:
            text = "dense" if np.isnan(value) else f"{value:.0f}"
            dark = not np.isnan(value) and np.log(max(value, 1)) < 0.6 * np.log(longest)
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(num_heads)) if num_heads <= 16 else None
    axes.set_yticks(range(len(layers)))
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"Tokens kept by top-p\n{title}", fontsize=10)
    figure.colorbar(image, ax=axes, label=f"mean tokens kept a step (of {longest:.0f})")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
