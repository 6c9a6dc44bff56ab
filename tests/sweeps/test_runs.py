"""Runs: what they are called, what is on disk, and what is said where one fails."""

from __future__ import annotations

import json
import re

import pytest

from tests.sweeps.helpers import config, ran, results
from twilight import runs
from twilight.cli import main


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
        (["p=0.9"], r"toy/quest-bounded_top_p-p0\.9-b0\.25-[0-9a-f]{12}"),
        (["pruner=none", "budget=1024"], r"toy/quest-none-b1024-[0-9a-f]{12}"),
        (["budget=pyramid"], r"toy/quest-bounded_top_p-p0\.95-bpyramid_0\.25-[0-9a-f]{12}"),
        (["selector.reduce=max"], r"toy/quest_reduce_max-bounded_top_p-p0\.95-b0\.25-[0-9a-f]{12}"),
        (["pruner=bounded_top_p", "pruner.tail=mean"], r"toy/quest-bounded_top_p_tail_mean-p0\.95-b0\.25-[0-9a-f]{12}"),
        (
            ["selector=double_sparsity", f"selector.calibration={'a/' * 150}b"],
            r"toy/double_sparsity_calibration[a_]{1,32}-bounded_top_p-p0\.95-b0\.25-[0-9a-f]{12}",
        ),
        (["model=hf", "model.path=Qwen/Qwen3-0.6B"], r"toy/Qwen3_0\.6B-quest-bounded_top_p-p0\.95-b0\.25-[0-9a-f]{12}"),
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
