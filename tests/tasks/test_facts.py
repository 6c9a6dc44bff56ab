"""Facts on the small model, and what runs share."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from twilight.errors import UnknownNameError  # noqa: E402
from twilight.evaluation import session  # noqa: E402
from twilight.tasks.facts import wilson  # noqa: E402

SIZE = ("task=facts", "task.context=1500", "task.num_facts=3", "task.samples=2")


def by_method(found):
    return {method: [row for row in found.rows if row["method"] == method] for method in ("dense", "twilight")}


def test_a_row_for_each_depth_and_what_a_window_cannot_see(run_task):
    rows = by_method(run_task(*SIZE, "selector=streaming_llm", "p=0.95", "budget=500"))
    for method in rows:
        assert [(row["kind"], row["context"], row["depth"]) for row in rows[method]] == [
            ("planted", 1500, depth) for depth in (1 / 6, 3 / 6, 5 / 6)
        ]
        assert {row["asked"] for row in rows[method]} == {2}
    assert [row["correct"] for row in rows["dense"]] == [2, 2, 2]
    # 500 tokens before the question hold the last sixth of the context and no more than half of what is before it.
    assert [row["correct"] for row in rows["twilight"]] == [0, 0, 2]
    assert rows["twilight"][2]["accuracy"] == 1 and rows["twilight"][2]["agreement"] == 1
    assert rows["twilight"][0]["agreement"] < 1
    assert rows["twilight"][0]["b0"] == 500 and rows["dense"][0]["kv_fraction"] == 1


def test_runs_that_differ_in_p_share_model_contexts_and_dense(run_task, monkeypatch):
    reads, decoded = [], []
    forward, measuring = session.Session.read, session.Session.measuring
    monkeypatch.setattr(session, "_OPEN", {})
    monkeypatch.setattr(session, "_DENSE_RESULTS", {})

    def read(self, tokens):
        before = len(self._kept)
        cache = forward(self, tokens)
        reads.append(len(self._kept) - before)
        return cache

    def measure(self, method, pruner=None):
        decoded.append(method)
        return measuring(self, method, pruner)

    monkeypatch.setattr(session.Session, "read", read)
    monkeypatch.setattr(session.Session, "measuring", measure)
    first, second, third = (run_task(*SIZE, f"p={p}") for p in (0.95, 0.6, 0.95))
    assert sum(reads) == 2  # contexts
    assert decoded.count("dense") == 2 and decoded.count("twilight") == 6
    assert first.rows == third.rows  # what was done in between has left nothing
    assert second.rows[-1]["b1_query"] < first.rows[-1]["b1_query"]
    assert first.tables["budgets"] == third.tables["budgets"]
    # Another selector reads anew, dense stays.
    run_task(*SIZE, "selector=full")
    assert sum(reads) == 4 and decoded.count("dense") == 2


def test_the_model_is_left_as_it_was(run_task):
    from twilight.loading import load_model

    run_task("task=facts", "task.context=500", "task.num_facts=1", "task.compare_dense=false")
    model = load_model("tiny", None, dtype="auto", device="auto", revision=None, trust_remote_code=False).model
    assert model.config._attn_implementation != "twilight"


def test_depths_of_ones_own_and_rulers_kinds(run_task):
    words = ("task=facts", "task.context=1200", "task.depths=[0.9,0.2]", "task.max_new_tokens=4")
    found = run_task(*words, "task.kinds=[planted,niah_single_1,vt]", "task.compare_dense=false")
    assert [(row["kind"], row["depth"], row["asked"]) for row in found.rows] == [
        ("planted", 0.2, 1), ("planted", 0.9, 1), ("niah_single_1", 0.2, 1), ("niah_single_1", 0.9, 1), ("vt", None, 5)
    ]  # fmt: skip
    assert {row["agreement"] for row in found.rows} == {None}


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["task.kinds=[needle]"], UnknownNameError, "needle"),
        (["task.kinds=[]"], ValueError, "task.kinds: expected at least one"),
        (["task.samples=0"], ValueError, "task.samples: expected at least 1, got 0"),
        (["task.depths=[2]"], ValueError, r"task.depths: expected fractions from 0 to 1, got \[2"),
        (["task.context=100"], ValueError, "task.context: 100 with 8 facts: num_bytes: 8 facts need at least"),
        (["task.context=40000"], ValueError, "more than the 32768 positions"),
        (["task.kinds=[qa_1]"], ValueError, "qa_1 needs a data set, which is not part of this package"),
        (["task.haystack=gone.txt"], FileNotFoundError, "task.haystack: no file 'gone.txt'"),
    ],
)
def test_bad_input_is_told(run_task, words, error, message):
    with pytest.raises(error, match=message):
        run_task("task=facts", *words)


def test_errors_of_shares():
    # Wilson's 95 % interval of 8 of 8 is 0.6756 to 1, of 4 of 8 0.2152 to 0.7848.
    assert 2 * 1.96 * wilson(8, 8) == pytest.approx(1 - 0.6756, abs=1e-4)
    assert wilson(4, 8) == pytest.approx(0.1453, abs=1e-4)
