"""What ``twilight decode`` does, as a task: one prompt, without showing what came out."""

from __future__ import annotations

import io
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from twilight.decoding import measure
from twilight.evaluation.reading import Reading
from twilight.tasks import TaskResult


def run(cfg: DictConfig) -> TaskResult:
    """Decode a prompt; rows say how many answers are right, how many tokens as dense chooses them, and how fast."""
    result, stats, layers = measure(cfg, Console(file=io.StringIO()))
    reading = Reading()
    reading.add(stats.records)
    context = result["context_tokens"]
    rows: list[dict[str, Any]] = []
    for method in ("dense", "twilight"):
        side = result[method]
        if side is None:
            continue
        row: dict[str, Any] = {"method": method, "context": context, "asked": None, "correct": None, "accuracy": None}
        if result["expected"]:
            asked, correct = len(result["expected"]), result["correct"][method]
            row |= {"asked": asked, "correct": correct, "accuracy": correct / asked}
        row |= {name: side[name] for name in ("prefill_seconds", "decode_seconds", "tokens_per_second")}
        if method == "twilight":
            row |= {"agreement": result.get("agreement"), **reading.columns(layers)}
        rows.append(row)
    return TaskResult(rows, {"budgets": reading.table(context=context)})
