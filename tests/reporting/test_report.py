"""`twilight report` as it is called."""

from __future__ import annotations

import importlib.util
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from twilight import cli

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class Page(HTMLParser):
    """What a page holds, and what it would fetch."""

    VOID = {"meta", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.fetched, self.open, self.text, self.titles = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def needs_matplotlib():
    pytest.importorskip("matplotlib", reason="needs the extra 'report'")


def test_everything_at_once(tmp_path, fake, capsys):
    needs_matplotlib()
    fake.everything(tmp_path / "runs", ps=(None, 0.8, 0.9))
    assert cli.main(["report", str(tmp_path / "runs"), str(RESULTS), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "index.html" in out and "1 runs failed and 1 do not apply" in err
    assert "1 runs have a newer one of the same configuration" in err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for stem in ("quality-facts-accuracy", "p-perplexity-bits_per_byte", "budgets", "needle-needle", "positions"):
        assert {f"{stem}.png", f"{stem}.svg"} <= names
    assert {"rows.csv", "stages-1.png", "speed-1.svg"} <= names
    assert not [name for name in names if name.endswith(".part")]
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    pictures = len([name for name in names if name.endswith(".svg")])
    assert len(page.fetched) == pictures and all(each.startswith("data:image/svg+xml;base64,") for each in page.fetched)
    assert "twilight run task=facts selector=pqcache p=0.9 budget=0.25" in page.text
    assert "RuntimeError: out of memory <b>" in page.text and "Traceback" in page.text
    assert "torch 2.13.0" in page.text and "5e1ec7ed0123" in page.text
    assert f"twilight report {tmp_path / 'runs'}" in page.text
    assert "Failed: 2" in page.titles and "Rows: facts" in page.titles


def test_what_beats_dense_is_said_on_the_page_and_the_console(tmp_path, fake, capsys):
    needs_matplotlib()
    fake.lm_eval(tmp_path / "runs", "quest", 0.9, 0.7)
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    said = "value beats dense by 0.2 (error bar 0.036)"
    assert f"check: quest, top_p p=0.9, budget 0.25, task=lm_eval lm_task=gsm8k: {said}" in capsys.readouterr().err
    page = Page((tmp_path / "index.html").read_text())
    assert "Better than dense: to be checked" in page.titles and said in page.text


def test_the_same_runs_make_the_same_files(tmp_path, fake, monkeypatch):
    needs_matplotlib()
    fake.facts(tmp_path / "runs", "quest", 0.9)
    monkeypatch.chdir(tmp_path)
    before = None
    for _ in range(2):
        assert cli.main(["report", "runs"]) == 0
        files = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
        assert before is None or files == before
        before = files


def test_settings_that_differ_are_said(tmp_path, fake, capsys):
    needs_matplotlib()
    fake.facts(tmp_path / "runs", "quest", 0.9)
    fake.facts(tmp_path / "runs", "quest", 0.8, model_hash="another")
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    assert "facts: 2 values of weights (5e1ec7ed0123; another); they are drawn apart" in capsys.readouterr().err


def test_of_options_and_versions_that_differ_only_those_are_said(tmp_path, fake, capsys):
    needs_matplotlib()
    for samples, torch in ((4, "2.1"), (8, "2.2")):
        of = fake.config("facts", "quest", 0.9, page_size=16, samples=samples)
        row = {"kind": "needle", "context": 64, "asked": 4, "correct": 4, "accuracy": 1.0}
        fake.write(tmp_path / "runs", of, [row], versions={"python": "3.11", "torch": torch})
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "facts: 2 values of options (samples=4; samples=8); they are drawn apart" in told
    assert "facts: 2 values of versions (torch 2.1; torch 2.2); they are drawn apart" in told


def test_a_baseline(tmp_path, fake, capsys):
    needs_matplotlib()
    fake.lm_eval(tmp_path / "new", "quest", 0.9, 0.4)
    fake.lm_eval(tmp_path / "old", "quest", 0.9, 0.45)
    words = ["report", str(tmp_path / "new"), "--out", str(tmp_path), "--baseline", str(tmp_path / "old")]
    assert cli.main(words) == 0
    assert "quality has changed in 1 rows" in capsys.readouterr().err
    page = Page((tmp_path / "index.html").read_text())
    assert "Against the baseline" in page.titles and "-0.05" in page.text


def test_markup_in_results_is_text(tmp_path, fake):
    needs_matplotlib()
    row = {"context": 64, "kind": "<script>alert(1)</script>", "asked": 1, "correct": 1, "accuracy": 1.0, "b1_group": 5}
    fake.write(tmp_path / "runs", fake.config("facts", "quest", 0.9), [row])
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    assert "<script>alert" not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("failed", [False, True])
def test_nothing_to_show_says_what_to_run(tmp_path, fake, capsys, failed):
    (tmp_path / "runs").mkdir()
    if failed:
        fake.write_error(tmp_path / "runs", fake.config("facts", "nsa", 0.9))
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "nothing to show" in error and "twilight sweep 'selector=glob(*)'" in error
    assert ("again: twilight run task=facts selector=nsa p=0.9" in error) is failed
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_tables_are_written_and_the_extra_is_named(tmp_path, fake, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    fake.facts(tmp_path / "runs", "quest", 0.9)
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 1
    assert "twilight-attn[report]" in capsys.readouterr().err
    assert (tmp_path / "rows.csv").read_text().startswith("task,method,model")


def test_rows_without_a_known_metric_are_tables_only(tmp_path, fake, capsys):
    needs_matplotlib()
    fake.write(tmp_path / "runs", fake.config("mine", "quest", 0.9), [{"tea": 3}, {"tea": None}])
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "1 runs, 2 rows, 0 pictures" in out and "no row has a metric" in err
    assert re.search(r"\btea\b", (tmp_path / "index.html").read_text())


@pytest.mark.slow
def test_five_hundred_runs_take_seconds(tmp_path, fake):
    needs_matplotlib()
    for seed in range(25):
        for p in (0.7, 0.8, 0.9, 0.95):
            for selector in fake.SKILL:
                fake.facts(tmp_path / "runs", selector, p, seed=seed)
    before = time.perf_counter()
    assert cli.main(["report", str(tmp_path / "runs"), "--out", str(tmp_path)]) == 0
    # 8 s on two slow cores; the bound is for machines that are busy.
    assert time.perf_counter() - before < 60
