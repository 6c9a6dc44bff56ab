"""Runs and sweeps, with a task that costs nothing: what is on disk, what is run again, and what is said."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from twilight import runs
from twilight.cli import main
from twilight.composing import Composer
from twilight.config import CONFIG_NAMES
from twilight.overrides import check, expand_budget
from twilight.running import gpu_of_worker
from twilight.sweeper import ResumingSweeper
from twilight.tasks import TASKS

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
    from twilight.tasks import TASKS

    monkeypatch.setitem(TASKS, "toy", "twx_toy")
    yield work
    for name in [name for name in sys.modules if name.startswith("twx_toy")]:
        del sys.modules[name]


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


# What a run is.


def test_the_hash_is_of_what_determines_the_result(toy):
    base = config("task=toy", "p=0.9", "selector=quest")
    same = [
        ("selector=quest", "p=0.90", "task=toy"),
        ("task=toy", "pruner.p=0.9", "p=0.5"),
        ("task=toy", "p=0.9", "model.device=cuda:1"),
        ("task=toy", "p=0.9", "task.plot=${hydra:runtime.output_dir}/a.png"),
        ("task=toy", "p=0.9", "hydra.sweep.dir=elsewhere"),
    ]
    for words in same:
        assert runs.config_hash(config(*words)) == runs.config_hash(base), words
    other = [
        ("task=toy", "p=0.91"),
        ("task=toy", "p=0.9", "selector=full"),
        ("task=toy", "p=0.9", "selector.reduce=max"),
        ("task=toy", "p=0.9", "task.seed=1"),
        ("task=toy", "p=0.9", "budget=0.5"),
        ("task=toy", "p=0.9", "model.dtype=bfloat16"),
        ("task=toy", "p=0.9", "model.dense_layers=1"),
        ("task=decode", "p=0.9"),
    ]
    digests = {runs.config_hash(config(*words)) for words in other}
    assert len(digests) == len(other)
    assert runs.config_hash(base) not in digests


def test_the_hash_looks_at_no_order():
    assert runs.config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == runs.config_hash({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_token_and_the_whole_length_are_two_budgets(toy):
    assert runs.config_hash(config("budget=1")) != runs.config_hash(config("budget=1.0"))


def test_without_a_p_to_prune_by_p_is_no_part_of_a_run(toy):
    one, two = (config("task=toy", "pruner=none", f"p={p}") for p in (0.7, 0.8))
    assert one == two
    assert one["p"] is None


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["p=0.9"], r"toy/quest-top_p-p0\.9-b0\.25-[0-9a-f]{12}"),
        (["pruner=none", "budget=1024"], r"toy/quest-none-b1024-[0-9a-f]{12}"),
        (["budget=pyramid"], r"toy/quest-top_p-p0\.95-bpyramid_0\.25-[0-9a-f]{12}"),
        (["selector.reduce=max"], r"toy/quest_reduce_max-top_p-p0\.95-b0\.25-[0-9a-f]{12}"),
        (["pruner=bounded_top_p", "pruner.tail=mean"], r"toy/quest-bounded_top_p_tail_mean-p0\.95-b0\.25-[0-9a-f]{12}"),
        (
            ["selector=double_sparsity", f"selector.calibration={'a/' * 150}b"],
            r"toy/double_sparsity_calibration[a_]{1,32}-top_p-p0\.95-b0\.25-[0-9a-f]{12}",
        ),
        (["model=hf", "model.path=Qwen/Qwen3-0.6B"], r"toy/Qwen3_0\.6B-quest-top_p-p0\.95-b0\.25-[0-9a-f]{12}"),
    ],
)
def test_folders_can_be_read(toy, words, pattern):
    assert re.fullmatch(pattern, runs.run_path(config("task=toy", *words)))


def test_rows_begin_with_what_made_them(toy):
    columns = runs.common_columns(config("task=toy", "selector.reduce=max", "pruner=bounded_top_p", "pruner.tail=mean"))
    assert (columns["selector"], columns["selector_options"]) == ("quest", "reduce=max")
    assert (columns["pruner"], columns["pruner_options"], columns["p"]) == ("bounded_top_p", "tail=mean", 0.95)
    assert (columns["budget"], columns["budget_value"], columns["seed"]) == ("fraction", 0.25, 0)
    assert (columns["task"], columns["model"]) == ("toy", "tiny")


def test_models_change_least_and_p_most(toy):
    words = [
        ["selector=quest", "p=0.7"], ["selector=full", "p=0.7", "model.dtype=bfloat16"], ["selector=full", "p=0.7"],
        ["selector=quest", "p=0.8"], ["selector=full", "p=0.8"], ["selector=quest", "p=0.7", "model.dtype=bfloat16"],
    ]  # fmt: skip
    assert runs.sweep_order([config("task=toy", *each) for each in words]) == [0, 3, 2, 4, 5, 1]


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        runs.write_json(path, {"a": [1, object()]})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["result.json"]


# One run.


def test_run_leaves_a_result_and_does_it_once(toy, capfd):
    assert main(["run", "task=toy", "p=0.9", "task.seed=3"]) == 0
    (path,) = toy.glob("runs/**/result.json")
    assert {each.name for each in path.parent.iterdir()} == {"result.json"}
    result = json.loads(path.read_text())
    assert result["schema"] == 1
    assert result["overrides"] == ["task=toy", "p=0.9", "task.seed=3"]
    assert path.parent.name.endswith(result["config_hash"])
    assert result["config_hash"] == runs.config_hash(result["config"])
    assert result["provenance"]["versions"]["torch"]
    assert result["rows"][1]["accuracy"] == pytest.approx(0.9 * 5 + 3)
    assert result["rows"][0]["method"] == "dense"
    assert result["rows"][1]["config_hash"] == result["config_hash"]
    assert result["tables"]["budgets"][0]["selector"] == "quest"
    before = path.read_text()
    assert main(["run", "task.seed=3", "p=0.9", "task=toy"]) == 0
    assert "finished before" in capfd.readouterr().err
    assert (len(ran(toy)), path.read_text()) == (1, before)
    assert main(["run", "task.seed=3", "p=0.9", "task=toy", "--rerun"]) == 0
    assert len(ran(toy)) == 2


def test_a_run_that_fails_leaves_why(toy, capfd):
    assert main(["run", "task=toy", "p=0.8", "task.fail_at=0.8", "--out", "some where"]) == 1
    (path,) = toy.glob("some where/toy/*/error.json")
    error = json.loads(path.read_text())
    assert error["error"] == "RuntimeError: cannot do 0.8"
    assert "in run" in error["traceback"]
    assert not results(toy)
    assert "RuntimeError: cannot do 0.8" in capfd.readouterr().err


# Sweeps.


def test_a_sweep_orders_skips_and_tells(toy, capfd):
    words = ["task=toy", "p=0.7,0.8", "selector=quest,full"]
    assert main(["sweep", *words]) == 0
    assert ran(toy) == ["quest 0.7", "quest 0.8", "full 0.7", "full 0.8"]
    told = capfd.readouterr().err
    assert "[4/4] done: toy/full-top_p-p0.8-b0.25-" in told
    assert "4 done, 0 failed, 0 skipped" in told
    before = results(toy)
    assert main(["run", "-m", "p=0.7,0.8,0.9", "selector=full,quest", "task=toy"]) == 0
    assert ran(toy)[4:] == ["full 0.9", "quest 0.9"]
    assert "2 done, 0 failed, 4 skipped" in capfd.readouterr().err
    after = results(toy)
    assert len(after) == 6
    assert {name: after[name] for name in before} == before
    assert main(["sweep", *words, "--rerun"]) == 0
    assert len(ran(toy)) == 10


def test_a_summary_has_a_table_a_task_and_the_options_that_differ(toy, capfd, monkeypatch):
    words = ["task=toy,other", "task.seed=3,4", "task.fail_at=0.7", "selector=streaming_llm", "p=0.8,0.7"]
    (toy / "conf/task").mkdir(parents=True)
    (toy / "conf/task/other.yaml").write_text(CONF.replace("toy", "other"))
    monkeypatch.setitem(TASKS, "other", "twx_toy")
    assert main(["sweep", "--config-dir", str(toy / "conf"), *words]) == 1
    told = capfd.readouterr().err
    rows = [line.split() for line in told.splitlines() if line.startswith("  streaming_llm")]
    assert told.index("\ntoy") < told.index("\nother")
    assert "seed" in told and "fail_at  " not in told and "seconds  " not in told
    assert rows.count(["streaming_llm", "top_p", "0.8", "0.25", "4", "14.4"]) == 2
    assert rows.count(["streaming_llm", "top_p", "0.7", "0.25", "3", "failed"]) == 2


def test_selectors_that_differ_in_options_do_not_look_alike(toy, capfd):
    words = ["selector=oracle_topp", "selector.mass=0.85", "selector.bits=2,4,null", "pruner=none"]
    assert main(["sweep", "task=toy", *words]) == 0
    told = capfd.readouterr().err
    rows = [line for line in told.splitlines() if line.startswith("  oracle_topp")]
    assert len(rows) == 3 and len({row[:40] for row in rows}) == 3
    assert any("oracle_topp (mass=0.85 bits=2)" in row for row in rows)
    names = {name.rpartition("-")[0] for name in results(toy)}
    assert {"oracle_topp_mass_0.85_bits_2-none-b0.25", "oracle_topp_mass_0.85-none-b0.25"} < names and len(names) == 3


@pytest.fixture
def plan(site, tmp_path, monkeypatch, capfd) -> Any:
    """Makes the configurations of a sweep, and runs none."""
    monkeypatch.chdir(tmp_path)

    def made(*words: str, status: int = 1) -> list[dict[str, Any]]:
        seen: list[Any] = []
        monkeypatch.setattr(ResumingSweeper, "jobs", lambda self, todo: seen.extend(todo) or [])
        assert main(["sweep", *words]) == status, capfd.readouterr().err  # 1: nothing was run
        return [each.config for each in seen]

    return made


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("task.haystack=null", None),
        ("task.haystack='~/x'", "~/x"),
        ('task.haystack="it\'s"', "it's"),
        ("task.haystack=a\\,b", "a,b"),
        ("task.kinds=[planted,vt]", ["planted", "vt"]),
        ("task.data={qa_1: null, qa_2: 'a b'}", {"qa_1": None, "qa_2": "a b"}),
        ("model.path=null", None),
        ("model.path='${p}'", "0.8"),
    ],
)
def test_values_are_what_hydra_takes_them_for(plan, word, value):
    group, option = word.partition("=")[0].split(".")
    for words in (["task=facts"], ["task=facts", "p=0.8,0.9"], ["task=facts,perplexity", "model=tiny,hf", "p=0.8"]):
        if word == "model.path='${p}'" and "p=0.8,0.9" not in words and "p=0.8" not in words:
            continue
        made = plan(*words, word)
        values = [each[group][option] for each in made if option in each[group]]
        assert values and value in values


def test_an_option_of_a_task_is_for_the_jobs_whose_task_has_it(plan, capfd):
    made = plan("task=facts,fidelity,perplexity", "task.context=512", "task.num_facts=2,3", "task.positions=9", "p=0.9")
    found = [
        (task["name"], task["context"], task.get("num_facts"), task.get("positions"))
        for task in (each["task"] for each in made)
    ]
    assert found == [
        ("facts", 512, 2, None), ("facts", 512, 3, None), ("fidelity", 512, None, None), ("perplexity", 512, None, 9)
    ]  # fmt: skip
    capfd.readouterr()
    plan("task=facts,fidelity", "task.num_fact=2", status=2)
    told = capfd.readouterr().err
    assert "no option 'task.num_fact' with task=facts or task=fidelity. Did you mean 'task.num_facts'?" in told
    assert "task.steps" in told and "(twilight sweep --help)" in told
    plan("task=facts,toys", "task.context=512", status=2)


@pytest.fixture
def mine(tmp_path) -> Any:
    """Writes an experiment; returns the words that choose it."""

    def write(text: str) -> list[str]:
        folder = tmp_path / "mine" / "experiment"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "parts.yaml").write_text(f"# @package _global_\n{text}")
        return ["--config-dir", str(tmp_path / "mine"), "experiment=parts"]

    return write


def test_yaml_values_of_an_experiment_are_taken_as_yaml_means_them(plan, mine):
    words = mine(
        "defaults: [override /task: facts]\nhydra:\n  sweeper:\n"
        "    params: {task.haystack: null, task.kinds: [planted, 'v,t'], task.compare_dense: false, p: 0.9}\n"
        "    arms: [{task.data: {qa_1: null, qa_2: \"it's\"}, task.context: '512,1024'}]\n"
    )
    made = plan(*words)
    assert [each["task"]["context"] for each in made] == [512, 1024]
    for each in made:
        assert each["task"]["haystack"] is None and each["task"]["compare_dense"] is False
        assert each["task"]["kinds"] == ["planted", "v,t"]
        assert each["task"]["data"] == {"qa_1": None, "qa_2": "it's"}


def test_a_wrong_option_in_an_experiment_is_an_error(plan, mine, capfd):
    words = mine("hydra: {sweeper: {arms: [{task: perplexity, task.contxt: 512}, {task: facts}]}}\n")
    plan(*words, status=2)
    assert "no option 'task.contxt' with task=perplexity. Did you mean 'task.context'?" in capfd.readouterr().err


def test_a_choice_of_arms_is_a_choice_among_arms(plan, mine):
    words = mine(
        "hydra:\n  sweeper:\n    params: {p: '0.8,0.9'}\n    arms:\n"
        "      - {task: perplexity, task.context: 4096, selector: 'quest,full'}\n"
        "      - {task: speed, task.context: 1024, task.batch: '1,2', selector: quest}\n"
    )

    def made(*more: str) -> list[tuple[Any, ...]]:
        tasks = ((each["task"], each["selector"]["name"]) for each in plan(*words, "p=0.9", *more))
        return [(task["name"], task["context"], task.get("batch"), selector) for task, selector in tasks]

    assert made("task=perplexity") == [("perplexity", 4096, None, "quest"), ("perplexity", 4096, None, "full")]
    assert made("selector=full") == [("perplexity", 4096, None, "full")]
    assert made("task=speed", "task.context=512") == [("speed", 512, 1, "quest"), ("speed", 512, 2, "quest")]
    # What no arm chooses replaces what they choose; of their options it takes those that it has.
    assert set(made("task=facts")) == {
        ("facts", 4096, None, "quest"), ("facts", 4096, None, "full"), ("facts", 1024, None, "quest")
    }  # fmt: skip


def test_flags_may_stand_anywhere(plan, mine, tmp_path, capfd):
    config_dir, folder, experiment = mine("hydra: {sweeper: {params: {task: facts, p: '0.8,0.9'}}}\n")
    first = plan(experiment, config_dir, folder, "task.context=512", "--out", "o2")
    assert len(first) == 2 and first == plan("task.context=512", "--out", "o2", config_dir, folder, experiment)
    plan("task=facts", "--config-dir", "nowhere", "p=0.9", status=2)
    assert "--config-dir: no folder 'nowhere'" in capfd.readouterr().err
    with pytest.raises(SystemExit):  # argparse's way
        main(["sweep", "task=facts", "--wat"])
    assert "twilight sweep: error: " in capfd.readouterr().err


def test_the_configuration_of_a_sweep_can_be_looked_at(site, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "experiment=table4_tiny", "task.num_facts=3", "--cfg", "job"]) == 0
    told = capfd.readouterr()
    assert "num_facts: 3" in told.out and "context: 2048" in told.out
    assert "task=facts" in told.err
    assert main(["run", "experiment=table4_tiny", "--cfg", "job"]) == 0
    assert list(tmp_path.glob("*")) == [tmp_path / "site"]


def test_run_does_not_take_a_sweep_for_a_run(toy, mine, capfd):
    lists = mine("defaults: [override /task: toy]\nhydra: {sweeper: {params: {p: '0.8,0.9'}}}\n")
    assert main(["run", *lists, "task.seed=1"]) == 2
    assert "  twilight sweep experiment=parts task.seed=1\n" in capfd.readouterr().err
    assert ran(toy) == []
    assert main(["run", *mine("defaults: [override /task: toy]\np: 0.8\n")]) == 0
    assert ran(toy) == ["quest 0.8"]
    assert main(["run", "task=toy", "p=0.8,0.9"]) == 2
    assert "twilight sweep" in capfd.readouterr().err


def test_folders_of_runs_have_no_other_names(toy, capfd):
    assert main(["sweep", "task=toy", "hydra.sweep.subdir=x"]) == 2
    assert "hydra.sweep.subdir=x: " in capfd.readouterr().err
    assert main(["sweep", "experiment=table2_tiny,table3_tiny"]) == 2
    assert "one at a time" in capfd.readouterr().err
    assert ran(toy) == []


@pytest.mark.parametrize(
    "job",
    [
        ["selector=full", "pruner=top_p", "p=0.7", "task=facts", "task.depths=[0,0.5]", "task.context=512"],
        ["selector=quest", "selector.reduce=max", "budget=pyramid", "budget.value=64", "task=perplexity", "p=1"],
        ["task=fidelity", "+task.more=1", "task.more=2", "experiment=table2_tiny"],
        ["pruner=bounded_top_p", "pruner.tail=page_mean", "p=0.5", "selector=oracle_topk"],
    ],
)
def test_a_job_is_composed_as_hydra_composes_it(job, site, monkeypatch):
    seen = []

    def compare(self, arguments):
        composer = Composer(self.context.config_loader, self.config)
        for words in (job, [*job, "p=0.6"]):  # the second from what the first has read
            seen.append((composer.compose(words), self.context.config_loader.load_sweep_config(self.config, words)))

    monkeypatch.setattr(ResumingSweeper, "sweep", compare)
    assert main(["sweep", "task=facts,perplexity"]) == 0
    assert len(seen) == 2
    for got, want in seen:
        del got.hydra, want.hydra
        assert OmegaConf.to_container(got) == OmegaConf.to_container(want)
        assert OmegaConf.to_container(got, resolve=True) == OmegaConf.to_container(want, resolve=True)


def test_a_failure_is_told_at_once_and_mended_by_the_next_sweep(toy, capfd, monkeypatch):
    words = ["sweep", "task=toy", "p=0.7,0.8,0.9", "task.fail_at=0.8", "task.seconds=0.5"]
    assert main(words) == 1
    assert ran(toy) == ["quest 0.7", "quest 0.8", "quest 0.9"]
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1
    assert told.index("RuntimeError: cannot do 0.8") < told.index("done: toy/quest-top_p-p0.9")
    assert "2 done, 1 failed, 0 skipped" in told
    assert len(list(toy.glob("runs/**/error.json"))) == 1
    monkeypatch.setenv("TOY_MENDED", "1")
    assert main(words) == 0
    assert ran(toy)[3:] == ["quest 0.8"]
    assert not list(toy.glob("runs/**/error.json"))
    assert len(results(toy)) == 3


def test_what_does_not_apply_is_no_failure_where_a_glob_found_it(toy, capfd):
    assert main(["sweep", "task=toy", "selector=glob([nsa,full])"]) == 0
    told = capfd.readouterr().err
    assert "1 done, 0 failed, 0 skipped, 1 not applicable" in told
    assert "UnsupportedModelError: nsa: not with this model" in told
    assert "Traceback" not in told
    assert main(["sweep", "task=toy", "selector=nsa,full"]) == 1
    assert "0 done, 1 failed, 1 skipped" in capfd.readouterr().err


def test_p_is_not_swept_where_nothing_prunes_by_it(toy):
    assert main(["sweep", "task=toy", "pruner=none,top_p", "p=0.7,0.8", "selector=full"]) == 0
    assert sorted(ran(toy)) == ["full 0.7", "full 0.8", "full None"]


def test_an_experiment_brings_lists_in_parts(toy, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "parts.yaml").write_text(
        "# @package _global_\ndefaults: [override /task: toy]\nhydra:\n  sweeper:\n"
        "    params: {selector: 'quest,full'}\n"
        "    arms: [{pruner: none, budget.value: '256,1024'}, {pruner: top_p, budget.value: 8192}]\n"
    )
    words = ["sweep", "--config-dir", str(tmp_path / "mine"), "experiment=parts"]
    assert main([*words, "p=0.9"]) == 0
    made = [(r["config"]["selector"]["name"], r["config"]["budget"]["value"], r["config"]["p"])
            for r in results(toy).values()]  # fmt: skip
    parts = [(256, None), (1024, None), (8192, 0.9)]
    assert sorted(made, key=str) == sorted([(name, *part) for name in ("quest", "full") for part in parts], key=str)
    # The command line's list wins over the file's, and what both parts then make is run once.
    assert main([*words, "selector=full", "pruner=none", "budget.value=512,256"]) == 0
    assert ran(toy)[6:] == ["full None"]


def test_a_job_of_several_runs_has_one_model(toy, monkeypatch):
    launched = []
    launch = ResumingSweeper.jobs
    monkeypatch.setattr(ResumingSweeper, "jobs", lambda self, todo: launched.extend(launch(self, todo)) or launched)
    words = ["sweep", "task=toy", "p=0.7,0.8,0.9", "model.dtype=float32,bfloat16", "task.fail_at=0.8"]
    assert main([*words, "hydra.sweeper.runs_per_job=2"]) == 1
    assert len(launched) == 4  # two and one of each type
    assert ran(toy) == ["quest 0.7", "quest 0.8", "quest 0.9"] * 2
    assert {result["config"]["model"]["dtype"] for result in results(toy).values()} == {"float32", "bfloat16"}
    assert len(results(toy)) == 4
    assert {tuple(result["overrides"]) for result in results(toy).values()} == {
        ("task=toy", f"p={p}", f"model.dtype={kind}", "task.fail_at=0.8")
        for p in (0.7, 0.9) for kind in ("float32", "bfloat16")
    }  # fmt: skip


def test_nothing_runs_where_a_job_cannot_be_made(toy, capfd):
    for words in (["p=0.8,1.5"], ["selector=qest"], ["pruner=none,bounded_top_p", "pruner.tail=mean"]):
        assert main(["sweep", "task=toy", *words]) == 2
        assert "error: " in capfd.readouterr().err
    assert ran(toy) == []


def test_half_a_result_is_none(toy):
    assert main(["run", "task=toy"]) == 0
    (path,) = toy.glob("runs/**/result.json")
    whole = path.read_text()
    for broken in (whole[: len(whole) // 2], "", "[]", whole.replace(path.parent.name[-12:], "0" * 12)):
        path.write_text(broken)
        assert main(["sweep", "task=toy"]) == 0
        assert json.loads(path.read_text())["rows"] == json.loads(whole)["rows"]
    assert len(ran(toy)) == 5


def test_a_killed_sweep_loses_nothing(toy):
    words = ["sweep", "task=toy", "selector=quest,full", "p=0.6,0.7,0.8,0.9", "task.seconds=0.4"]
    command = [sys.executable, "-m", "twilight.cli", *words]

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    for kill, finished in ((signal.SIGKILL, 2), (signal.SIGINT, 5)):
        sweep = start()
        deadline = time.monotonic() + 120
        # In the middle of a run: the marker of the next is there.
        while len(results(toy)) < finished or not list(toy.glob("runs/**/running.json")):
            assert sweep.poll() is None and time.monotonic() < deadline, sweep.communicate()
            time.sleep(0.02)
        os.kill(sweep.pid, kill)
        told = sweep.communicate()[1]
        assert sweep.returncode == (130 if kill == signal.SIGINT else -9)
        assert finished <= len(results(toy)) < 8
    assert "not run: the same command goes on from here" in told
    kept = {path: path.read_text() for path in toy.glob("runs/**/result.json")}
    sweep = start()
    assert "0 failed" in sweep.communicate(timeout=120)[1]
    assert sweep.returncode == 0
    assert all(path.read_text() == text for path, text in kept.items())
    assert {path.name for path in toy.glob("runs/toy/*/*")} == {"result.json"}

    straight = ["--out", "straight"]
    assert main([*words, *straight]) == 0
    ours, theirs = results(toy / "runs"), results(toy / "straight")
    assert len(ours) == 8 and ours.keys() == theirs.keys()
    for name in ours:
        for result in (ours[name], theirs[name]):
            result.pop("provenance")
            result["rows"][1].pop("pid")
        assert ours[name] == theirs[name]
    # Two were cut short and run again.
    assert len(ran(toy)) == 8 + 2 + 8


# Launchers.


@pytest.mark.parametrize(
    ("launcher", "package", "options"),
    [
        ("joblib", "hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"]),
        ("ray", "ray", ["hydra.launcher.workers=2"]),
        ("submitit_local", "hydra_plugins.hydra_submitit_launcher", ["hydra.sweeper.runs_per_job=3"]),
    ],
)
@pytest.mark.slow
def test_launchers_run_and_record_the_same(toy, capfd, launcher, package, options):
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed: pip install 'twilight-attn[sweep]'")
    words = ["task=toy", "selector=quest,full", "p=0.7,0.8", "task.fail_at=0.8", "task.seconds=0.3"]
    command = [sys.executable, "-m", "twilight.cli", "sweep", *words, f"hydra/launcher={launcher}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert sorted(ran(toy)) == ["full 0.7", "full 0.8", "quest 0.7", "quest 0.8"]
    assert str(os.getpid()) not in processes(toy)
    assert len(results(toy)) == 2
    assert "2 done, 2 failed, 0 skipped" in done.stderr
    assert done.stderr.count("RuntimeError: cannot do 0.8") == 2
    assert len(processes(toy)) == 2
    assert main(["sweep", *words]) == 1
    assert len(ran(toy)) == 6


def test_a_launcher_that_is_not_installed_says_what_to_install(toy, capfd, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    assert main(["sweep", "task=toy", "hydra/launcher=ray"]) == 2
    assert "pip install 'twilight-attn[sweep]'" in capfd.readouterr().err
    assert ran(toy) == []


def test_workers_take_turns_at_gpus():
    assert [gpu_of_worker(f"LokyProcess-{n}", ["2", "5"]) for n in (1, 2, 3)] == ["2", "5", "2"]
    assert gpu_of_worker("MainProcess", ["0", "1"]) is None
    assert gpu_of_worker("LokyProcess-1", []) is None


def test_experiments_are_not_for_decode(toy, capfd):
    assert main(["decode", "experiment=p_table_tiny"]) == 2
    assert "twilight sweep experiment=p_table_tiny" in capfd.readouterr().err


def test_the_model_is_loaded_once_for_every_selector_and_p(toy, monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    import torch

    from twilight import config as built
    from twilight import loading, running
    from twilight.integrations.transformers import attach

    def run(cfg: Any) -> SimpleNamespace:
        options = dict(cfg.model)
        layers = options.pop("dense_layers")
        model = loading.load_model(**options).model
        selector, pruner = built.build_selector(cfg), built.build_pruner(cfg)
        with attach(model, selector, pruner=pruner, budget=0.5, dense_layers=layers, stats=True) as handle:
            tokens = torch.arange(300)[None] % 250
            model.generate(tokens, max_new_tokens=3, past_key_values=handle.cache(), do_sample=False)
            kept = [row["b1_query"]["mean"] for row in handle.stats().summary()]
        return SimpleNamespace(rows=[{"method": "twilight", "b1_query": sum(kept) / len(kept)}], tables={})

    monkeypatch.setattr(running, "task_module", lambda name: SimpleNamespace(run=run))
    loading.load_model.cache_clear()
    words = ["sweep", "task=toy", "selector=quest,full", "p=0.7,0.9", "model.device=cpu"]
    assert main(words) == 0
    assert loading.load_model.cache_info().misses == 1
    found = {(r["rows"][0]["selector"], r["rows"][0]["p"]): r for r in results(toy).values()}
    for name in ("quest", "full"):
        # Each p has run as itself, not as what the first of them had compiled or cached.
        assert found[name, 0.7]["rows"][0]["b1_query"] < found[name, 0.9]["rows"][0]["b1_query"]
    assert found["full", 0.7]["provenance"]["dtype"] == "float32"
    assert found["full", 0.7]["provenance"]["kernels"] is None
    assert found["full", 0.7]["provenance"]["model_hash"] == loading.model_hash(loading.tiny_path())


def test_a_models_folder_has_a_hash_of_its_own(tmp_path):
    from twilight.loading import model_hash

    digests = set()
    for name, weights in (("a", b"1"), ("b", b"2"), ("c", b"2" + bytes(3 << 20)), ("d", b"2" + bytes((3 << 20) + 1))):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(weights)
        digests.add(model_hash(str(folder)))
    assert len(digests) == 4
    # A calibration put into a folder leaves the model what it was: `a` again, under another path.
    (tmp_path / "e").mkdir()
    for name, data in (("config.json", b"{}"), ("model.safetensors", b"1"), ("c.json", b"{}"), ("c.safetensors", b"3")):
        (tmp_path / "e" / name).write_bytes(data)
    assert model_hash(str(tmp_path / "e")) == model_hash(str(tmp_path / "a"))
    assert model_hash(str(tmp_path / "nowhere")) is None
