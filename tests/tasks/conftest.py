"""Tasks as `twilight run` starts them: from a composed configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from twilight import config, overrides
from twilight.tasks import TASKS, TaskResult


@pytest.fixture
def run_task() -> Callable[..., TaskResult]:
    """Composes words such as ``task=facts p=0.9`` and runs the task."""

    def run(*words: str) -> TaskResult:
        config.setup()
        (cfg,) = overrides.check(
            overrides.expand_budget(list(words)), multirun=False, config_name=config.CONFIG_NAME
        )  # fmt: skip
        return importlib.import_module(TASKS[cfg.task.get("name", "decode")]).run(cfg)

    return run
