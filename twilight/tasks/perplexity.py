"""Perplexity through the decode path: contexts are prefilled, and what follows is scored token by token."""

from __future__ import annotations

import math
from typing import Any

import torch
from omegaconf import DictConfig

from twilight.evaluation.likelihood import next_token_nll
from twilight.evaluation.reading import Reading
from twilight.evaluation.session import DENSE, TWILIGHT, Session, dense_once, open_session
from twilight.evaluation.texts import num_bytes, read_windows
from twilight.tasks import TaskResult


def run(cfg: DictConfig) -> TaskResult:
    """Score a text, sparsely and densely; a row a method.

    Raises:
        ValueError, FileNotFoundError, MissingExtraError: options out of range, a text that is not there or too short.
    """
    task = cfg.task
    for name in ("context", "positions", "windows"):
        if task[name] < 1:
            raise ValueError(f"task.{name}: expected at least 1, got {task[name]}")
    with open_session(cfg) as session:
        length = task.context + task.positions + 1
        if length > session.loaded.max_tokens:
            raise ValueError(
                f"task.context: {length} tokens with those that are scored are more than the "
                f"{session.loaded.max_tokens} positions of '{session.loaded.path}'"
            )
        tokenizer = session.loaded.tokenizer
        windows = read_windows(
            task.text, tokenizer, task.windows, length, seed=task.seed, split=task.text_split,
            column=task.text_column, subset=task.text_subset,
        )  # fmt: skip
        nll, reading = _score(session, windows.tokens, task.context, TWILIGHT)
        dense = None
        if task.compare_dense:
            dense = dense_once(cfg, "", lambda: _score(session, windows.tokens, task.context, DENSE))
        scored = windows.tokens[:, task.context + 1 :]
        size = num_bytes(tokenizer, scored)
        kinds = session.handle.layers
    shared = {"text": windows.name, "context": task.context, "scored_tokens": scored.numel()}
    rows = [] if dense is None else [_row(DENSE, dense[0], None, size, shared) | dense[1].columns(kinds)]
    rows.append(_row(TWILIGHT, nll, None if dense is None else dense[0], size, shared) | reading.columns(kinds))
    return TaskResult(rows, {"budgets": reading.table(context=task.context)})


def _score(session: Session, texts: torch.Tensor, context: int, method: str) -> tuple[torch.Tensor, Reading]:
    with session.measuring(method) as reading:
        nll = next_token_nll(session, texts, context)
    return nll, reading


def _row(
    method: str, nll: torch.Tensor, dense: torch.Tensor | None, size: int, shared: dict[str, Any]
) -> dict[str, Any]:
    """Return a row; `size` is the bytes of the scored tokens, which bits are counted for."""
    row = {
        "method": method,
        **shared,
        "nll": float(nll.mean()),
        "perplexity": math.exp(float(nll.mean())),
        "bits_per_byte": float(nll.sum()) / math.log(2) / size,
        "delta_bits": None,
        "delta_stderr": None,
    }
    if dense is not None:
        more = (nll - dense).flatten() / math.log(2)
        per_byte = len(more) / size
        row["delta_bits"] = float(more.mean()) * per_byte
        if len(more) > 1:
            row["delta_stderr"] = float(more.std()) / len(more) ** 0.5 * per_byte
    return row
