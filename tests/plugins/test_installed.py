"""Plugins as they are installed: the example, one that `plugins new` wrote, and a broken one beside them, in a venv."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from twilight import scaffold

ROOT = Path(__file__).resolve().parents[2]
ENV = {key: value for key, value in os.environ.items() if not key.startswith(("TWILIGHT_", "PYTHON", "PYTEST_"))}

pytestmark = pytest.mark.slow


class Venv:
    """An environment with the plugins, which sees the one that the tests run in behind itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True, timeout=120)
        self.python = folder / "venv" / "bin" / "python"
        site = next((folder / "venv").glob("lib*/python*/site-packages"))
        # addsitedir, unlike a plain path, also follows an editable install.
        outer = sysconfig.get_path("purelib")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")

    def install(self, *sources: Path) -> None:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        command += ["install", "--no-deps", "--no-build-isolation", "--no-index", *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *words: str, cwd: Path | None = None, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [self.python, *words]
        done = subprocess.run(
            command, cwd=cwd or self.folder, env=ENV, capture_output=True, text=True, timeout=500
        )  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def twilight(self, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "twilight.cli", *words, status=status)


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Venv:
    made = Venv(tmp_path_factory.mktemp("plugins"))
    for source, name in ((ROOT / "examples" / "plugin", "plugin"), (ROOT / "tests" / "plugins" / "broken", "broken")):
        # Copies: building leaves files beside the sources.
        shutil.copytree(source, made.folder / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    mine = scaffold.new("my-selector", made.folder)
    made.install(made.folder / "plugin", made.folder / "broken", mine)
    return made


def test_they_are_listed_and_the_broken_one_is_blamed_alone(venv):
    listed = json.loads(venv.twilight("plugins", "list", "--json").stdout)
    by_name = {each["name"]: each for each in listed if not each["builtin"]}
    assert {name: each["status"] for name, each in by_name.items()} == {
        "broken": "failed",
        "group_max": "loaded",
        "my_selector": "loaded",
    }
    assert by_name["broken"]["problems"] == ["RuntimeError: this plugin is broken"]
    assert by_name["group_max"]["selectors"] == ["group_max"]
    assert by_name["my_selector"]["distribution"] == "twilight-my-selector"
    assert all(each["status"] == "loaded" for each in listed if each["builtin"])


@pytest.mark.parametrize("name", ["group_max", "my_selector"])
def test_they_conform(venv, name):
    report = json.loads(venv.twilight("plugins", "check", name, "recent=3", "--json").stdout)
    assert report["selector"] == name
    assert report["passed"]
    assert {"form", "budget", "dense", "host", "static"} <= {
        each["case"] for each in report["cases"] if each["status"] == "passed"
    }


@pytest.mark.parametrize("folder", ["plugin", "my-selector"])
def test_their_own_tests_pass(venv, folder):
    said = venv.run("-m", "pytest", "-v", "-p", "no:cacheprovider", cwd=venv.folder / folder).stdout
    assert "test_it_is_a_selector[form] PASSED" in said
    assert "test_it_is_a_selector[ranking] SKIPPED" in said


def test_they_decode_and_presets_are_found(venv):
    small = ["task.prompt_tokens=300", "task.max_new_tokens=2", "task.num_facts=1", "--json", "-"]
    done = venv.twilight("decode", "selector=group_max_wide", "p=0.9", *small)
    assert "twilight-broken 0.1.0" in done.stderr
    assert "this plugin is broken" in done.stderr
    result = json.loads(done.stdout)
    assert result["selector"] == {"name": "group_max", "recent": 8}


def test_they_are_in_sweeps(venv):
    composed = venv.run("-c", SWEEP).stdout.split()
    assert {"group_max", "group_max_wide", "my_selector", "my_selector_wide", "quest"} <= set(composed)


SWEEP = """
import warnings
warnings.simplefilter("ignore")
from twilight import config, overrides
config.setup()
jobs = overrides.check(["selector=glob(*)"], multirun=True, config_name=None, folders=[])
from hydra.core.global_hydra import GlobalHydra
for job in jobs: print(job.selector.name + ("_wide" if job.selector.get("recent") == 8 else ""))
"""


def test_the_benchmark_takes_them_by_name(venv):
    small = ["--device", "cpu", "--heads", "4/2", "--head-dim", "32", "--repeats", "1", "--cells", "1:128"]
    out = venv.folder / "bench.json"
    venv.twilight("bench", *small, "--selector", "group_max", "my_selector:recent=4", "--out", str(out))
    (cell,) = json.loads(out.read_text())["cells"]
    assert {"group_max + top-p", "my_selector:recent=4 + top-p"} <= set(cell["methods"])
