"""A sweep's words: which configurations they make, and what is said of those that make none."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from twilight.cli import main
from twilight.composing import Composer
from twilight.sweeper import ResumingSweeper


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
