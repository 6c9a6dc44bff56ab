"""The presets: each makes the runs that its protocol is of, has a small variant, and names what it needs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from twilight import resources
from twilight.cli import main
from twilight.sweeper import ResumingSweeper

FOLDER = resources.folder("conf") / "experiment"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FULL = [name for name in NAMES if not name.endswith("_tiny")]
MISSING = {"facts", "fidelity", "lm_eval", "perplexity", "speed"} - {
    path.stem for path in (FOLDER.parent / "task").glob("*.yaml")
}
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def plan(site, monkeypatch, tmp_path) -> Any:
    """Makes the configurations of an experiment, and runs none."""
    if MISSING:
        pytest.skip(f"no task {', '.join(sorted(MISSING))} in conf/task")
    monkeypatch.chdir(tmp_path)

    def made(*words: str) -> list[dict[str, Any]]:
        seen: list[Any] = []
        monkeypatch.setattr(ResumingSweeper, "jobs", lambda self, todo: seen.extend(todo) or [])
        assert main(["sweep", *words]) == 1  # nothing was run
        return [each.config for each in seen]

    return made


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_makes_runs(plan, name):
    made = plan(f"experiment={name}")
    assert made
    assert {config["model"]["dense_layers"] for config in made} == {2}
    if name.endswith("_tiny"):
        assert {config["model"]["name"] for config in made} == {"tiny"}
        assert {config["model"]["path"] for config in made} == {None}


def test_every_preset_has_a_small_one_and_is_documented():
    assert set(NAMES) == {variant for name in FULL for variant in (name, f"{name}_tiny")}
    page = (DOCS / "paper.md").read_text()
    for name in FULL:
        assert f"| `{name}` |" in page
        assert "# Needs: " in (FOLDER / f"{name}.yaml").read_text()


def test_table_2_is_the_papers(plan):
    rows = json.loads((DOCS / "results" / "paper.json").read_text())["table2"]["rows"]
    mine = [row for row in rows if row["model"].startswith("LLaMA") and "MagicPIG" not in row["method"]]
    made = Counter(
        (config["selector"]["name"], config["pruner"]["name"], config["budget"]["value"])
        for config in plan("experiment=table2")
    )
    # Dense is a row of every run, not a run.
    assert len(made) == len(mine) - 1
    assert set(made.values()) == {12}
    budgets = {("quest", "none", row["budget"]) for row in mine if row["method"] == "Quest"}
    assert budgets == {key for key in made if key[:2] == ("quest", "none")}


@pytest.mark.parametrize("name", ["p_table", "p_table_tiny"])
def test_the_p_table_has_every_p_for_quality_and_time(plan, name):
    made = plan(f"experiment={name}")
    for task in ("perplexity", "speed"):
        assert {config["p"] for config in made if config["task"]["name"] == task} == {
            0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95
        }  # fmt: skip


def test_precision_has_four_bits_by_the_copy_and_the_others_by_the_oracle(plan):
    made = plan("experiment=precision")
    assert [(config["selector"].get("bits"), config["selector"].get("mass"), config["p"]) for config in made] == [
        (None, None, 0.85), (2, 0.85, None), (4, 0.85, None), (8, 0.85, None), (None, 0.85, None)
    ]  # fmt: skip
    assert {config["budget"]["value"] for config in made} == {1.0}


def test_the_command_line_has_the_last_word(plan):
    made = plan("experiment=p_table", "p=0.9,0.99", "model.path=mine")
    assert {config["p"] for config in made} == {0.9, 0.99}
    assert {config["model"]["path"] for config in made} == {"mine"}


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["experiment=p_table_tiny", "p=0.9", "task.context=512"], {"perplexity": 512, "speed": 512}),
        (["experiment=table4_tiny", "task.context=512", "task.num_facts=2"], {"facts": 512, "perplexity": 512}),
        (["experiment=p_table_tiny", "p=0.9", "task=perplexity"], {"perplexity": 4096}),
    ],
)
def test_options_of_a_task_that_the_preset_chooses(plan, words, options):
    made = plan(*words)
    assert {config["task"]["name"]: config["task"]["context"] for config in made} == options
    assert {config["task"]["num_facts"] for config in made if config["task"]["name"] == "facts"} <= {2}


def test_a_preset_in_small_by_its_tasks_limit(plan):
    made = plan("experiment=table4", "task.limit=10", "model=tiny", "model.path=null")
    assert {config["task"]["name"]: config["task"].get("limit") for config in made} == {
        "lm_eval": 10, "perplexity": None
    }  # fmt: skip


def test_an_option_that_no_task_of_the_preset_has(plan, capfd):
    assert main(["sweep", "experiment=table4_tiny", "task.batch=2"]) == 2
    assert "no option 'task.batch' with task=facts or task=perplexity" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["p_table_tiny", "table2", "precision_tiny"])
def test_a_preset_is_no_run(plan, capfd, name):
    assert main(["run", f"experiment={name}"]) == 2
    assert f"twilight sweep experiment={name}" in capfd.readouterr().err
