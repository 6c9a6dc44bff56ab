"""Fidelity: what decode steps keep and return, against exact attention, by layer and head."""

from __future__ import annotations

from omegaconf import DictConfig

from twilight.evaluation.fidelity import Observer
from twilight.evaluation.session import TWILIGHT, open_session
from twilight.evaluation.texts import read_windows
from twilight.tasks import TaskResult

DEFAULT_P = 0.95
"""Of the oracle, where the pruner has none."""


def run(cfg: DictConfig) -> TaskResult:
    """Decode a text, measure chosen steps; one row, and tables by head and by position.

    Raises:
        ValueError, FileNotFoundError, MissingExtraError: options out of range, a text that is not there or too short.
    """
    task = cfg.task
    for name in ("context", "steps", "every", "windows"):
        if task[name] < 1:
            raise ValueError(f"task.{name}: expected at least 1, got {task[name]}")
    if task.every > task.steps:
        raise ValueError(f"task.every: expected at most task.steps={task.steps}, or no step is measured")
    with open_session(cfg) as session:
        kinds = session.handle.layers
        sparse = [index for index, kind in kinds.items() if kind == "sparse"]
        layers = sparse if task.layers is None else list(task.layers)
        wrong = sorted(set(layers) - set(sparse))
        if wrong or not layers:
            raise ValueError(f"task.layers: expected some of the sparse layers, {sparse}, got {layers}")
        p = task.oracle_p
        if p is None:
            p = getattr(session.handle.attention.pruner, "p", DEFAULT_P)
        length = task.context + task.steps
        if length > session.loaded.max_tokens:
            raise ValueError(
                f"task.context: {length} tokens with those that are decoded are more than the "
                f"{session.loaded.max_tokens} positions of '{session.loaded.path}'"
            )
        texts = read_windows(
            task.text, session.loaded.tokenizer, task.windows, length, seed=task.seed, split=task.text_split,
            column=task.text_column, subset=task.text_subset,
        )  # fmt: skip
        cache = session.read(texts.tokens[:, : task.context])
        ids = texts.tokens.to(session.model.device)
        observer = Observer(p, set(layers))
        attention = session.handle.attention
        with (
            session.measuring(TWILIGHT) as reading,
            session.branch(cache),
            session.steps(cache, task.steps, capture=False) as step,
        ):
            for number in range(task.steps):
                attention.observer = observer if (number + 1) % task.every == 0 else None
                try:
                    step(ids[:, task.context + number])
                finally:
                    attention.observer = None
    context = {"context": task.context}
    row = {
        "method": TWILIGHT,
        "text": texts.name,
        **context,
        "oracle_p": p,
        **observer.summary(),
        **reading.columns(kinds),
    }
    tables = {
        "fidelity_heads": observer.heads(**context),
        "positions": observer.positions(**context),
        "budgets": reading.table(**context),
    }
    return TaskResult([row], tables)
