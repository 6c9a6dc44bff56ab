"""The search for p: what it settles on, what it measures, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twilight import running
from twilight.calibrate_p import Search, drop, lower_layers, main, quality_of
from twilight.cli import main as twilight
from twilight.reporting import which_p


def search(quality: Any, allowed: float, metric: str = "perplexity") -> Search:
    return Search(metric, quality(1.0), allowed, lambda p: (quality(p), 10 * p, p))


@pytest.mark.parametrize("edge", [0.51, 0.72, 0.87, 0.99, 1.0])
def test_the_smallest_p_that_holds_is_found_in_few_steps(edge):
    found = search(lambda p: 2.0 if p >= edge - 1e-9 else 2.1, 0.01)
    assert found.smallest() == edge
    assert len(found.measured) <= 8


def test_the_ends():
    assert search(lambda p: 2.0, 0).smallest() == 0.5
    worse = Search("perplexity", 1.9, 0.01, lambda p: (2.0, None, None))
    assert worse.smallest() is None
    assert list(worse.measured) == [100]


def test_layers_are_lowered_one_after_the_other():
    """What may be lost in all is spent on the first layers; the second cannot be lowered at all."""
    tried = []

    def holds(ps):
        tried.append(ps)
        return ps[1] == 90 and sum(90 - p for p in ps) <= 55

    assert lower_layers(90, 3, holds) == (50, 90, 75)
    assert len(tried) == len(set(tried)) <= 12
    assert lower_layers(90, 2, lambda ps: False) == (90, 90)
    assert lower_layers(50, 2, holds) == (50, 50)


def test_a_drop_is_relative_for_perplexity_and_absolute_for_facts():
    assert drop("perplexity", 2.2, 2.0) == pytest.approx(0.1)
    assert drop("facts", 0.75, 1.0) == pytest.approx(0.25)
    assert drop("facts", 1.0, 0.75) < 0


def test_quality_weighs_rows_by_what_they_hold():
    rows = [
        {"method": "twilight", "nll": 1.0, "scored_tokens": 100, "asked": 4, "correct": 4},
        {"method": "twilight", "nll": 2.0, "scored_tokens": 300, "asked": 12, "correct": 0},
        {"method": "dense", "nll": 9.0, "scored_tokens": 1, "asked": 1, "correct": 1},
    ]
    assert quality_of("perplexity", rows, "twilight") == pytest.approx(math.exp(1.75))
    assert quality_of("facts", rows, "twilight") == 0.25
    with pytest.raises(ValueError, match="no row of 'dense'"):
        quality_of("facts", rows[:2], "dense")


@pytest.fixture
def task(site, monkeypatch, tmp_path) -> list[float]:
    """A task whose nll grows below p = 0.8; dense is better by 2 %. Returns the p's that it is run with."""
    ran: list[float] = []

    def run(cfg: Any) -> Any:
        ps = cfg.pruner.layer_p or [cfg.pruner.p]
        ran.append(cfg.pruner.p if len(ps) == 1 else tuple(ps))
        nll = 1.02 + max(0.0, 0.8 - sum(ps) / len(ps))
        row = {"text": "book abc", "scored_tokens": 10, "b1_query": 100 * sum(ps) / len(ps), "kv_fraction": 0.1}
        row["sparse_layers"] = 2
        return SimpleNamespace(rows=[{**row, "method": "dense", "nll": 1.0}, {**row, "method": "twilight", "nll": nll}])

    # Two tasks of the names that are asked for, should the package have none.
    hooks = 'import twilight\n@twilight.hookimpl\ndef twilight_config_searchpath():\n    return ["pkg://twx_p_conf"]\n'
    confs = {f"twx_p_conf/task/{name}.yaml": f"name: {name}\nseed: 0\n" for name in ("perplexity", "facts")}
    site.install("twx-p", {"p": "twx_p"}, {"twx_p.py": hooks, "twx_p_conf/__init__.py": "", **confs})
    monkeypatch.setattr(running, "task_module", lambda name: SimpleNamespace(run=run))
    monkeypatch.chdir(tmp_path)
    return ran


def test_calibrate_p_writes_what_it_found(task, capsys):
    assert twilight(["calibrate", "p", "--drop", "0.05", "budget=0.5", "--selector", "full"]) == 0
    found = json.loads(Path("p.json").read_text())
    # exp(0.02 + 0.8 - p) <= 1.05 from p = 0.7713 on.
    assert found["p"] == 0.78
    assert (found["method"], found["metric"], found["text"]) == ("p", "perplexity", "book abc")
    assert (found["selector"]["name"], found["budget"]["value"]) == ("full", 0.5)
    assert len(task) == len(set(task)) == len(found["measured"])
    table = {each["p"]: each for each in found["measured"]}
    assert table[0.78]["tokens"] == pytest.approx(78)
    assert table[0.5]["drop"] == pytest.approx(math.exp(0.32) - 1)
    told = capsys.readouterr().out
    assert "p.json: p = 0.78 keeps perplexity within 5 % of dense" in told
    assert "dense: perplexity 2.7183; allowed drop 5 %" in told and "drop  +37.7 %" in told and "+0.3" not in told


def test_a_p_for_each_layer(task, capsys):
    assert twilight(["calibrate", "p", "--drop", "0.08", "--layers"]) == 0
    found = json.loads(Path("p.json").read_text())
    # exp(0.02 + 0.8 - p) <= 1.08 from a mean of 0.7431 on: 0.75 everywhere, and no layer may be lowered alone.
    assert found["p"] == 0.75 and found["layer_p"] == [0.75, 0.75]
    assert twilight(["calibrate", "p", "--drop", "0.2", "--layers"]) == 0
    found = json.loads(Path("p.json").read_text())
    # From 0.6377 on: 0.64 everywhere; a layer at 0.6 makes the mean 0.62.
    assert found["p"] == 0.64 and found["layer_p"] == [0.64, 0.64] and (0.6, 0.64) in task
    assert "pruner.layer_p=[0.64,0.64]" in capsys.readouterr().out


def test_calibrate_p_draws_what_it_found(task, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    assert twilight(["calibrate", "p", "--drop", "0.05", "--out", "found.json"]) == 0
    assert Path("found.png").read_bytes().startswith(b"\x89PNG")
    assert "found.png: " in capsys.readouterr().out
    assert twilight(["calibrate", "p", "--drop", "0.05", "--plot", "which.svg"]) == 0
    text = Path("which.svg").read_text()
    assert "<svg" in text and not Path("p.png").exists()
    for words, message in (
        (["--plot", "p.gif"], "expected a name that ends in .png"),
        (["--plot", "nowhere/p.png"], "no folder 'nowhere'"),
    ):
        ran = len(task)
        assert twilight(["calibrate", "p", *words]) == 1
        assert message in capsys.readouterr().err and len(task) == ran


def test_the_picture_shows_the_drop_and_the_choice(tmp_path, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure", reason="needs the extra 'plots'")
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))

    def found(metric: str, qualities: dict[float, float], reference: float, allowed: float, p: float | None) -> Any:
        rows = [
            {"p": each, "quality": value, "drop": drop(metric, value, reference), "tokens": 100 * each,
             "kv_fraction": 0.1}
            for each, value in qualities.items()
        ]  # fmt: skip
        about = {"metric": metric, "against": "dense", "reference": reference, "allowed_drop": allowed, "p": p}
        about |= {"lowest_p": 0.5, "budget_used": metric == "facts"}
        choices = {name: {"name": name, "value": 0.25} for name in ("selector", "budget", "model")}
        return {**about, **choices, "measured": rows}

    def legend(panel: Any) -> list[str]:
        return [text.get_text() for text in panel.get_legend().get_texts()]

    which_p.draw(found("perplexity", {0.5: 9.0, 0.8: 2.01, 1.0: 2.0}, 2.0, 0.01, 0.8), tmp_path / "a.png")
    quality, tokens = drawn[0].axes
    lines = {line.get_label(): line.get_ydata()[0] for line in quality.get_lines()}
    assert lines["dense: 2"] == 2.0 and lines["allowed: 2.02"] == pytest.approx(2.02)
    assert quality.get_ylim()[1] == pytest.approx(2.16) and [text.get_text() for text in quality.texts] == ["9"]
    assert list(tokens.get_lines()[0].get_ydata()) == [50, 80, 100]
    assert [text.get_text() for text in tokens.texts] == ["p = 0.8: 80 tokens, 10.0 % of the KV bytes"]
    rings = [line.get_xydata()[0].tolist() for line in quality.get_lines() if line.get_markersize() == 14]
    assert rings == [[0.8, 2.01]]
    assert drawn[0].get_suptitle() == "p = 0.8 keeps perplexity within 1 % of dense\nmodel, selector"
    assert [panel.get_xlim() for panel in drawn[0].axes] == [pytest.approx((0.48, 1))] * 2
    assert legend(quality) == ["dense: 2", "allowed: 2.02", "holds", "does not hold", "p = 0.8"]
    which_p.draw(found("facts", {1.0: 0.5}, 1.0, 0.1, None), tmp_path / "b.png")
    assert "No p keeps facts within 10 percentage points of dense" in drawn[1].get_suptitle()
    quality = drawn[1].axes[0]
    assert quality.get_ylim() == (-0.03, 1.05) and quality.get_xlim()[1] == 1
    assert legend(quality) == ["dense: 100.0 %", "allowed: 90.0 %", "does not hold"]
    (said,) = [text.get_text() for text in quality.texts]
    assert "p = 1 itself loses 50 percentage points: the selector's own loss" in said and "--against unpruned" in said
    which_p.draw(found("facts", {0.5: 1.0, 1.0: 1.0}, 1.0, 0.0, 0.5), tmp_path / "c.png")
    assert "p = 0.5, the smallest that is tried, keeps facts within 0 percentage" in drawn[2].get_suptitle()
    assert "budget 0.25" in drawn[2].get_suptitle()


def test_without_matplotlib_the_answer_is_given_still(task, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name))
    assert twilight(["calibrate", "p", "--drop", "0.05"]) == 0
    assert "pip install 'twilight-attn[plots]'" in capsys.readouterr().out
    ran = len(task)
    assert twilight(["calibrate", "p", "--drop", "0.05", "--plot", "x.png"]) == 1
    assert len(task) == ran and not Path("x.png").exists()


def test_what_the_selector_loses_is_no_ps_fault(task, capsys):
    assert main(["--drop", "0.015", "task.seed=3", "--out", "dense.json", "budget=0.3"]) == 1
    told = capsys.readouterr().out
    assert "no p keeps perplexity within 1.5 % of dense" in told
    assert "p = 1 itself loses 2.02 %: the selector's own loss" in told
    # What to run next is what was run, but for what is to be changed.
    same = "    twilight calibrate p --drop 0.015"
    assert f"{same} --against unpruned --out dense.json task.seed=3 budget=0.3\n" in told
    assert f"{same} --out dense.json task.seed=3 budget=0.6\n" in told
    assert json.loads(Path("dense.json").read_text())["p"] is None
    assert main(["--drop", "0.01", "--against", "unpruned"]) == 0
    assert json.loads(Path("p.json").read_text())["p"] == 0.8


def test_a_selector_without_a_budget_is_offered_none(task, capsys):
    assert main(["--selector", "full"]) == 1
    told = capsys.readouterr().out
    assert "--selector full --against unpruned" in told and "budget" not in told
    assert json.loads(Path("p.json").read_text())["budget_used"] is False


def test_the_smallest_that_is_tried_is_said_to_be(task, capsys):
    assert main(["--drop", "0.9"]) == 0
    assert "p = 0.5, the smallest that is tried, keeps perplexity within 90 % of dense" in capsys.readouterr().out


def test_help_says_defaults_and_what_is_relative(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("(default perplexity)", "(default dense)", "0.01, the default,", "(relative)", "(absolute)"):
        assert part in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "-1"], "--drop: expected 0 or more"),
        (["--text", "nowhere.txt"], "--text: no file 'nowhere.txt'"),
        (["--metric", "facts", "--text", "x"], "--text: --metric facts makes its own text"),
        (["pruner=none"], "pruner=none: it has no p to calibrate"),
        (["selector=qest"], "Did you mean 'quest'?"),
    ],
)
def test_wrong_words(task, capsys, words, message):
    assert twilight(["calibrate", "p", *words]) in (1, 2)
    assert message in capsys.readouterr().err
    assert task == []
