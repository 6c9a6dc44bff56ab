"""The main job on the small model, through the command line's own function."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from twilight.cli import decode  # noqa: E402


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> dict:
    assert decode([*words, "task.json=result.json"]) == 0
    return json.loads(Path("result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selector", "remembers"),
    [("quest", True), ("double_sparsity", True), ("full", True), ("streaming_llm", False)],
)
def test_facts_planted_in_8k_are_answered_as_by_dense(selector, remembers):
    result = run(f"selector={selector}", "p=0.95", "task.num_facts=4")
    assert result["context_tokens"] == 8192
    assert result["correct"]["dense"] == 4
    if remembers:
        assert result["correct"]["twilight"] == 4
        assert result["agreement"] == 1.0
    else:
        # The window of 2048 tokens holds the last of four facts; the others are out of its sight.
        assert result["correct"]["twilight"] <= 1
    assert result["kv_bytes"]["sparse_layers"] < 0.35 * result["kv_bytes"]["sparse_layers_dense"]


def test_everything_kept_decodes_what_dense_does(capsys):
    result = run("selector=full", "p=1", "task.prompt_tokens=1000", "task.num_facts=3", "task.plot=budget.png")
    assert result["agreement"] == 1.0
    assert result["twilight"]["tokens"] == result["dense"]["tokens"]
    for row in result["layers"]:
        assert row["b0"]["mean"] == row["b1_query"]["mean"] == row["b1_group"]["mean"] == row["seq_len"]
        assert row["mass"]["p5"] == pytest.approx(1.0)
    # 3 rows, each fed a 24-byte question and 5 of 6 digits, from a cache of 1000 tokens on.
    steps = 24 + 5
    assert result["layers"][0]["steps"] == steps
    expected = 5 * 3 * 2 * sum(1000 + i + 1 for i in range(steps)) * (2 * 64 * 4)  # layers, rows, kv heads, K and V
    assert result["kv_bytes"]["sparse_layers_dense"] == expected
    assert result["kv_bytes"]["sparse_layers"] == pytest.approx(expected * (1 + 36 / 512))
    assert Path("budget.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = capsys.readouterr().out
    assert "facts answered" in shown and "agreement with dense" in shown and "4-bit keys" in shown


def test_a_prompt_file_is_continued():
    Path("prompt.py").write_text("def add(a, b):\n    return a + b\n\n\n" * 40)
    result = run("task.prompt=prompt.py", "task.max_new_tokens=12", "selector=quest", "p=0.99", "budget=1.0")
    assert result["context_tokens"] == 40 * 34 - 1
    assert len(result["twilight"]["tokens"][0]) == 12
    assert result["agreement"] == 1.0
    assert "correct" not in result


def test_p_and_budget_bound_what_is_read():
    low, high = (
        run(f"p={p}", "budget=128", "task.prompt_tokens=1000", "task.num_facts=2", "task.compare_dense=false")
        for p in (0.5, 0.99)
    )
    for a, b in zip(low["layers"], high["layers"], strict=True):
        assert a["b1_query"]["mean"] < b["b1_query"]["mean"] <= b["b0"]["mean"] <= 128
    assert low["dense"] is None and "agreement" not in low


def test_data_alone_goes_to_standard_output(capfd):
    assert decode(["task.prompt_tokens=600", "task.num_facts=1", "task.compare_dense=false", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["context_tokens"] == 600
    assert "facts answered" in err


def test_min_context_decodes_densely_and_says_so():
    result = run("task.min_context=4096", "task.prompt_tokens=600", "task.num_facts=1")
    assert all(row["dense_steps"] == row["steps"] for row in result["layers"])
    assert result["kv_bytes"]["all_layers"] == result["kv_bytes"]["all_layers_dense"]


def test_text_that_looks_like_markup_is_shown_as_it_is(capsys):
    Path("prompt.py").write_text("table[red][i] = [/b] d['k']\n" * 20 + "[bold]")
    run("task.prompt=prompt.py", "task.max_new_tokens=2", "task.compare_dense=false")
    assert "]" in capsys.readouterr().out.split("asked")[1]


def test_what_cannot_be_written_is_refused_before_the_run(monkeypatch, capfd):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    Path("folder").mkdir()
    for word, message in (
        ("task.plot=x.png", "pip install 'twilight-attn[plots]'"),
        ("task.json=folder", "cannot write"),
    ):
        monkeypatch.setattr("twilight.decoding.load", lambda _: pytest.fail("the run began"))
        assert decode([word]) != 0
        assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task.prompt=nowhere.txt"], "task.prompt: no file 'nowhere.txt'"),
        (["task.prompt=empty.txt"], "'empty.txt' is empty: expected at least 2 tokens, got 0"),
        (["task.prompt=latin.txt"], "'latin.txt' is not UTF-8 text"),
        (["task.prompt=long.txt"], "more than the 32768 positions"),
        (["task.prompt_tokens=40000"], "more than the 32768 positions"),
        (["task.prompt_tokens=0"], "task.prompt_tokens: expected at least 1, got 0"),
        (["task.prompt_tokens=100"], "task.prompt_tokens: 100 with task.num_facts=8: num_bytes: 8 facts need at least"),
        (["task.num_facts=0"], "task.num_facts: expected at least 1, got 0"),
        (["task.max_new_tokens=0"], "task.max_new_tokens: expected at least 1, got 0"),
        (["p=0"], "p: expected a float in (0, 1], got 0"),
        (["p=1.2"], "got 1.2"),
        (["budget=0"], "budget: expected at least 1, got 0"),
        (["budget=50000"], "50000 tokens are more than the 32768 positions"),
        (["model=hf"], "model.path: model=hf needs a local folder or hub name"),
        (["model=hf", "model.path=empty_folder"], "model.path: cannot load 'empty_folder'"),
        (["model=hf", "model.path=/not/there"], "model.path: cannot load '/not/there': no such folder"),
        (["model=hf", "model.path=./there"], "model.path: cannot load './there': no such folder"),
        (["model.dtype=int8"], "model.dtype: expected auto"),
        (["model.device=foo"], "model.device: expected auto, cpu or cuda, got 'foo'"),
        (["model.dense_layers=7"], "no layer is left to be sparse"),
        (["selector=double_sparsity", "selector.calibration=gone.json"], "no file 'gone.json'"),
        (["selector=double_sparsity", "selector.channels=65"], "channels: "),
    ],
)
def test_bad_input_gets_one_clear_line(words, message, capfd):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9")
    Path("long.txt").write_text("x" * 40000)
    Path("empty_folder").mkdir()
    status = decode([*words, "task.json=result.json"])
    _, err = capfd.readouterr()
    assert status != 0
    assert message in err and "Traceback" not in err
    assert not Path("result.json").exists()
