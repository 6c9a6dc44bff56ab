"""Lines that a run prints as it goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .tables import COLUMNS, QUEST, TOP_K

Say = Callable[[str], None]


def say_dense(cell: dict[str, Any], dense_bytes: float, say: Say) -> None:
    """Print the dense kernels' times and their share of the floor, and what was not timed."""
    floor = dense_bytes / cell["bandwidth"] / 1e6
    for name, times in cell["dense"].items():
        best = "   <- best" if name == cell["best_dense"] else ""
        say(f"  {name:24s} {times['us']:9.1f} us   {floor / times['us']:5.0%} of the floor{best}")
    for name, reason in cell["skipped"].items():
        say(f"  {name:24s} not timed: {reason}")


def say_method(name: str, row: dict[str, Any], say: Say, *, head: bool) -> None:
    """Print a method's times, below the columns' names if it is the first."""
    if head:
        say(f"  {'us a layer':24s} " + " ".join(f"{column:>8s}" for column in COLUMNS) + "    GB/s  floor dense x")
    times = " ".join(f"{row[column]['us']:8.1f}" if column in row else f"{'-':>8s}" for column in COLUMNS)
    say(f"  {name:24s} {times} {row['gbps']:7.0f} {row['floor_fraction']:6.0%} {row['speedup']:6.2f}x")


def say_budgets(cell: dict[str, Any], say: Say) -> None:
    """Print what Quest with top-p kept, and each stage's share of its own floor."""
    row = cell["methods"].get(QUEST)
    if row is None:
        return
    shares = ", ".join(
        f"{stage} {moved / row[stage]['us'] / 1e6 / cell['bandwidth']:.0%}" for stage, moved in row["bytes"].items()
    )
    union, heads = row["budgets"]["union"], row["budgets"]["query_head"]
    say(f"  of the floor: {shares}; pruning {row['prune']['us'] / row['total']['us']:.0%} of the total")
    say(
        f"  union {union['mean']:.0f} (N/64 = {row['budgets']['target_union']:.0f}; {union['min']:.0f} to "
        f"{union['max']:.0f}), query head {heads['mean']:.0f}; true mass kept {row['check']['true_mass_kept']:.3f}; "
        f"budgets {row['budget']['us']:.1f} us a step"
    )
    if TOP_K in cell["methods"]:
        say(f"  {cell['methods'][TOP_K]['total']['us'] / row['total']['us']:.2f}x as fast as {TOP_K}")
