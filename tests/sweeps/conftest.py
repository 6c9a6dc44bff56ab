"""A folder to work in with the task that costs nothing, and one of experiments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.sweeps.helpers import CONF, TASK
from twilight.tasks import TASKS


@pytest.fixture
def toy(site, tmp_path, monkeypatch) -> Path:
    """A folder to work in, and the task `toy` by way of a plugin; the log says what ran."""
    files = {"twx_toy.py": TASK, "twx_toy_conf/__init__.py": "", "twx_toy_conf/task/toy.yaml": CONF}
    site.install("twx-toy", {"toy": "twx_toy"}, files)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(site.folder))

    monkeypatch.setitem(TASKS, "toy", "twx_toy")
    yield work
    for name in [name for name in sys.modules if name.startswith("twx_toy")]:
        del sys.modules[name]


@pytest.fixture
def mine(tmp_path) -> Any:
    """Writes an experiment; returns the words that choose it."""

    def write(text: str) -> list[str]:
        folder = tmp_path / "mine" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parts.yaml").write_text(f"# @package _global_\n{text}")
        return ["--config-dir", str(tmp_path / "mine"), "experiment=parts"]

    return write
