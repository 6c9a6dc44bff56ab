"""Sweeps, with a task that costs nothing: what is run, what again, by whom, and what is said."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sweeps.helpers import CONF, processes, ran, results
from twilight.cli import main
from twilight.running import gpu_of_worker
from twilight.sweeper import ResumingSweeper
from twilight.tasks import TASKS


def test_a_sweep_orders_skips_and_tells(toy, capfd):
    words = ["task=toy", "p=0.7,0.8", "selector=quest,full"]
    assert main(["sweep", *words]) == 0
    assert ran(toy) == ["quest 0.7", "quest 0.8", "full 0.7", "full 0.8"]
    told = capfd.readouterr().err
    assert "[4/4] done: toy/full-bounded_top_p-p0.8-b0.25-" in told
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
    assert rows.count(["streaming_llm", "bounded_top_p", "0.8", "0.25", "4", "14.4"]) == 2
    assert rows.count(["streaming_llm", "bounded_top_p", "0.7", "0.25", "3", "failed"]) == 2


def test_selectors_that_differ_in_options_do_not_look_alike(toy, capfd):
    words = ["selector=oracle_topp", "selector.mass=0.85", "selector.bits=2,4,null", "pruner=none"]
    assert main(["sweep", "task=toy", *words]) == 0
    told = capfd.readouterr().err
    rows = [line for line in told.splitlines() if line.startswith("  oracle_topp")]
    assert len(rows) == 3 and len({row[:40] for row in rows}) == 3
    assert any("oracle_topp (mass=0.85 bits=2)" in row for row in rows)
    names = {name.rpartition("-")[0] for name in results(toy)}
    assert {"oracle_topp_mass_0.85_bits_2-none-b0.25", "oracle_topp_mass_0.85-none-b0.25"} < names and len(names) == 3


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


def test_a_failure_is_told_at_once_and_mended_by_the_next_sweep(toy, capfd, monkeypatch):
    words = ["sweep", "task=toy", "p=0.7,0.8,0.9", "task.fail_at=0.8", "task.seconds=0.5"]
    assert main(words) == 1
    assert ran(toy) == ["quest 0.7", "quest 0.8", "quest 0.9"]
    told = capfd.readouterr().err
    assert told.count("Traceback") == 1
    assert told.index("RuntimeError: cannot do 0.8") < told.index("done: toy/quest-bounded_top_p-p0.9")
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

    for cut, (kill, finished) in enumerate(((signal.SIGKILL, 2), (signal.SIGINT, 5)), 1):
        sweep = start()
        deadline = time.monotonic() + 120
        # In the middle of a run: it has begun, as those before that were cut short. Its marker alone comes earlier.
        while len(results(toy)) < finished or len(ran(toy)) < len(results(toy)) + cut:
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
