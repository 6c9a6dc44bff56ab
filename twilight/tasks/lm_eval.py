"""Tasks of lm-evaluation-harness, generated through the decode path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from twilight.errors import missing_extra
from twilight.evaluation.reading import Reading
from twilight.evaluation.session import DENSE, TWILIGHT, Session, dense_once, open_session
from twilight.tasks import TaskResult


def run(cfg: DictConfig) -> TaskResult:
    """Evaluate, sparsely and densely; a row a method, task and metric.

    Raises:
        MissingExtraError: lm_eval is not installed.
        ValueError, FileNotFoundError: options out of range, tasks that it does not know.
    """
    task = cfg.task
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise missing_extra("lm_eval", "eval", "task=lm_eval") from error
    if not task.tasks:
        raise ValueError("task.tasks: needs names of lm-evaluation-harness, as in task.tasks=[gsm8k]")
    if task.batch_size < 1:
        raise ValueError(f"task.batch_size: expected at least 1, got {task.batch_size}")
    if task.include_path is not None and not Path(task.include_path).is_dir():
        raise FileNotFoundError(f"task.include_path: no folder '{task.include_path}'")
    if not isinstance(task.gen_kwargs, (DictConfig, type(None))):
        raise ValueError(f"task.gen_kwargs: expected a mapping, as in {{max_gen_toks: 64}}, got {task.gen_kwargs}")
    metadata: dict[str, Any] = {"pretrained": cfg.model.path}
    if task.lengths is not None:
        metadata["max_seq_lengths"] = list(task.lengths)
    manager = TaskManager(include_path=task.include_path, metadata=metadata)
    unknown = [name for name in task.tasks if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(
            f"task.tasks: lm-evaluation-harness knows no '{unknown[0]}'\n"
            "  task.include_path=FOLDER adds task files of your own; lm_eval ls tasks lists the others"
        )
    with open_session(cfg) as session:
        metadata["pretrained"] = session.loaded.path
        mine, reading = _evaluate(session, task, manager, metadata, TWILIGHT)
        kinds = session.handle.layers
        rows = []
        if task.compare_dense:
            dense, read = dense_once(cfg, "", lambda: _evaluate(session, task, manager, metadata, DENSE))
            rows += [{"method": DENSE, **row, **read.columns(kinds)} for row in dense]
    rows += [{"method": TWILIGHT, **row, **reading.columns(kinds)} for row in mine]
    return TaskResult(rows, {"budgets": reading.table()})


def _evaluate(
    session: Session, task: DictConfig, manager: Any, metadata: dict[str, Any], method: str
) -> tuple[list[dict[str, Any]], Reading]:
    from lm_eval import simple_evaluate

    from twilight.integrations.lm_eval import TwilightLM

    options = None if task.gen_kwargs is None else OmegaConf.to_container(task.gen_kwargs)
    limit = task.limit
    if limit is not None and limit >= 1:
        limit = int(limit)
    lm = TwilightLM(
        session.handle,
        session.model,
        session.loaded.tokenizer,
        batch_size=task.batch_size,
        max_length=task.max_length,
    )
    with session.measuring(method) as reading:
        found = simple_evaluate(
            lm,
            tasks=list(task.tasks),
            num_fewshot=task.num_fewshot,
            limit=limit,
            task_manager=manager,
            gen_kwargs=options,
            apply_chat_template=task.apply_chat_template,
            log_samples=False,
            random_seed=task.seed,
            numpy_random_seed=task.seed,
            torch_random_seed=task.seed,
            fewshot_random_seed=task.seed,
            metadata=metadata,
        )
    return metric_rows(found), reading


def metric_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task and metric of what `simple_evaluate` returned.

    RULER marks lengths that were not asked for with -1; they are left out.
    """
    rows = []
    for name, metrics in found["results"].items():
        samples = found.get("n-samples", {}).get(name, {}).get("effective")
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not kind or metric.endswith("_stderr") or (metric.isdecimal() and value == -1):
                continue
            stderr = metrics.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "lm_task": name,
                    "metric": key,
                    "value": float(value),
                    "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
                    "samples": samples,
                }
            )
    return rows
