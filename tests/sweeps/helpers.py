"""The task that costs nothing, and what it has left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twilight import runs
from twilight.config import CONFIG_NAMES
from twilight.overrides import check, expand_budget

TASK = """
import os, time
from types import SimpleNamespace
from twilight.errors import UnsupportedModelError
from twilight.hookspecs import hookimpl
from twilight.tasks import TASKS

TASKS["toy"] = "twx_toy"

@hookimpl
def twilight_config_searchpath():
    return ["pkg://twx_toy_conf"]


def run(cfg):
    with open(os.environ["TOY_LOG"], "a") as log:
        log.write(f"{cfg.selector.name} {cfg.pruner.get('p')} {os.getpid()}\\n")
    time.sleep(cfg.task.seconds)
    if cfg.selector.name in ("nsa", "double_sparsity"):
        raise UnsupportedModelError(f"{cfg.selector.name}: not with this model")
    if cfg.pruner.get("p") == cfg.task.fail_at and not os.environ.get("TOY_MENDED"):
        raise RuntimeError(f"cannot do {cfg.p}")
    score = cfg.p * len(cfg.selector.name) + cfg.task.seed
    return SimpleNamespace(
        rows=[{"method": "dense", "accuracy": 1.0}, {"method": "twilight", "accuracy": score, "pid": os.getpid()}],
        tables={"budgets": [{"layer": 2, "b1_query": score}]},
    )
"""


CONF = "name: toy\nseconds: 0\nfail_at: 2\nseed: 0\nplot: null\n"


def ran(work: Path) -> list[str]:
    """What ran, in order: selector and p."""
    log = work.parent / "log"
    return [line.rpartition(" ")[0] for line in log.read_text().splitlines()] if log.exists() else []


def processes(work: Path) -> set[str]:
    return {line.split()[-1] for line in (work.parent / "log").read_text().splitlines()}


def results(folder: Path) -> dict[str, Any]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("**/result.json"))}


def config(*words: str) -> dict[str, Any]:
    (cfg,) = check(expand_budget(words), multirun=False, config_name=CONFIG_NAMES["run"])
    return runs.run_config(cfg)
