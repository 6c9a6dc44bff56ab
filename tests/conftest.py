"""Fixtures that several test files share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import hypothesis
import pytest
import torch

from twilight.registry import Registry, registry

NEWEST = '''
from dataclasses import dataclass
import twilight

@dataclass
class Newest(twilight.Selector):
    """Keep the newest tokens."""
    name = "newest"
    window: int = 8
    def select(self, q, layer, budget):
        raise NotImplementedError
'''

# Runs repeat: hypothesis draws the same examples every time, and keeps nothing on disk.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    # Small tensors: more threads only wait for each other, and for whoever else uses the machine.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return
    skip = pytest.mark.skip(reason="no GPU of compute capability 8.0 or more")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@dataclass
class Site:
    """A folder on `sys.path` for distributions of the test's own, beside those that are really installed."""

    folder: Path

    def install(
        self, name: str, entry_points: dict[str, str], files: dict[str, str] | None = None, version: str = "0.2"
    ) -> None:
        """Write a .dist-info with entry points, as an installer would, and the modules that they name.

        Without `files`, there is ``newest.py`` with a selector `Newest`.
        """
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"{entry} = {value}" for entry, value in entry_points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[twilight.plugins]", *lines, ""]))
        for path, text in ({"newest.py": NEWEST} if files is None else files).items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(dedent(text))

    @property
    def registry(self) -> Registry:
        """The registry that the package looks at while the test runs; it has loaded nothing before."""
        return registry()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A `Site`, a fresh registry, and an environment that allows everything."""
    for variable in ("TWILIGHT_PLUGINS", "TWILIGHT_DISABLE_PLUGINS", "TWILIGHT_STRICT", "TWILIGHT_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("twilight.registry._REGISTRY", Registry())
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield Site(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]
