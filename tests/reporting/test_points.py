"""Points are rows pooled rightly; the Pareto line holds those that no other beats."""

from __future__ import annotations

import itertools
import random

import pytest

from twilight.reporting.collect import collect
from twilight.reporting.metrics import Metric, wilson_interval
from twilight.reporting.points import Choice, Point, pareto, points, representatives
from twilight.reporting.settings import Setting
from twilight.reporting.table import merge

UP, DOWN = Metric("t", "accuracy", "", True), Metric("t", "output_error", "", False)


def point(tokens, value):
    where = Setting("t", *("",) * 9)
    how = Choice("quest", "", "top_p", "", "fraction", 0.25, 0.9)
    return Point(where, (), how, tokens, None, value, None, None, None, "", 1)


def pairs(found):
    return [(each.tokens, each.value) for each in found]


def test_the_line_by_hand():
    of = [point(*each) for each in [(10, 0.5), (20, 0.4), (30, 0.7), (30, 0.6), (40, 0.7), (5, 0.1), (None, 0.9)]]
    assert pairs(pareto(of, UP)) == [(5, 0.1), (10, 0.5), (30, 0.7)]
    assert pairs(pareto(of, DOWN)) == [(5, 0.1)]


@pytest.mark.parametrize("metric", [UP, DOWN])
def test_the_line_is_what_nothing_dominates(metric):
    rng = random.Random(0)
    for _ in range(30):
        of = [point(rng.randint(1, 12), rng.randint(1, 12)) for _ in range(rng.randint(0, 25))]
        sign = 1 if metric.higher_is_better else -1

        def beats(one, other, sign=sign):
            no_worse = one.tokens <= other.tokens and sign * one.value >= sign * other.value
            return no_worse and (one.tokens, one.value) != (other.tokens, other.value)

        best = {(each.tokens, each.value) for each in of if not any(beats(other, each) for other in of)}
        line = pairs(pareto(of, metric))
        assert line == sorted(best)


def rows_of(folder):
    return merge(collect([folder])).rows


def test_shares_are_pooled_by_question_over_kinds_and_depths(tmp_path, fake):
    rows = [
        {"method": method, "kind": kind, "context": 64, "depth": 0.5, "asked": asked, "correct": n,
         "accuracy": n / asked, "b1_group": tokens}
        for kind, asked, right, tokens in (("needle", 10, (10, 9), 100), ("multi_key", 30, (15, 12), 200))
        for method, n in zip(("dense", "twilight"), right, strict=True)
    ]  # fmt: skip
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    (found,) = points(rows_of(tmp_path), Metric("facts", "accuracy", "", True))
    assert (found.value, found.dense, found.num_rows) == (21 / 40, 25 / 40, 2)
    assert found.bar == pytest.approx(wilson_interval(21, 40)) and found.dense_bar == pytest.approx(
        wilson_interval(25, 40)
    )
    assert found.tokens == 150 and found.panel == (("context", 64),)


def test_seeds_are_one_point_and_p_and_context_are_not(tmp_path, fake):
    for seed, p in itertools.product((0, 1, 2), (0.8, 0.9)):
        fake.facts(tmp_path, "quest", p, contexts=(4096, 8192), seed=seed)
    found = points(rows_of(tmp_path), Metric("facts", "accuracy", "", True))
    assert sorted((dict(each.panel)["context"], each.choice.p) for each in found) == [
        (4096, 0.8), (4096, 0.9), (8192, 0.8), (8192, 0.9),
    ]  # fmt: skip
    assert {each.num_rows for each in found} == {18}


def test_errors_of_means_shrink_with_the_number_of_rows(tmp_path, fake):
    for seed in range(4):
        row = {"context": 64, "text": "a", "bits_per_byte": 1.0 + seed, "delta_stderr": 0.1}
        fake.write(tmp_path, fake.config("perplexity", "quest", 0.9, seed=seed), [row])
    (found,) = points(rows_of(tmp_path), Metric("perplexity", "bits_per_byte", "", False))
    assert found.value == 2.5 and found.bar == pytest.approx((2.5 - 1.96 * 0.05, 2.5 + 1.96 * 0.05))


def test_an_error_that_one_row_lacks_is_no_error_of_the_point(tmp_path, fake):
    for seed, error in enumerate((0.1, None)):
        row = {"context": 64, "text": "a", "bits_per_byte": 1.0, "delta_stderr": error}
        fake.write(tmp_path, fake.config("perplexity", "quest", 0.9, seed=seed), [row])
    (found,) = points(rows_of(tmp_path), Metric("perplexity", "bits_per_byte", "", False))
    assert found.num_rows == 2 and found.bar is None


def test_without_dense_on_all_of_the_questions_there_is_no_comparison(tmp_path, fake):
    row = {"context": 64, "asked": 10, "correct": 9, "accuracy": 0.9}
    rows = [
        {**row, "kind": "a"},
        {**row, "kind": "b"},
        {**row, "kind": "a", "method": "dense", "accuracy": 0.1, "correct": 1},
    ]
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    (found,) = points(rows_of(tmp_path), Metric("facts", "accuracy", "", True))
    assert found.dense is None and not found.flag


def test_flags_of_pooled_rows_see_what_single_rows_cannot(tmp_path, fake):
    rows = [
        {"method": method, "kind": f"k{i}", "context": 64, "asked": 10, "correct": n, "accuracy": n / 10}
        for i in range(20) for method, n in (("dense", 5), ("twilight", 7))
    ]  # fmt: skip
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    table = merge(collect([tmp_path]))
    (found,) = points(table.rows, Metric("facts", "accuracy", "", True))
    assert not table.flagged and "accuracy beats dense by 0.2" in found.flag


def test_tokens_fall_back_on_what_a_head_keeps(tmp_path, fake):
    fake.write(tmp_path, fake.config("fidelity", "quest", 0.9), [{"context": 64, "output_error": 0.1, "b1_query": 7}])
    (found,) = points(rows_of(tmp_path), Metric("fidelity", "output_error", "", False))
    assert found.tokens == 7


def test_representatives_share_what_most_were_run_with(tmp_path, fake):
    for selector, ps in (
        ("quest", (0.8, 0.95)),
        ("full", (0.8, 0.95)),
        ("streaming_llm", (0.8, 0.9)),
        ("oracle_topp", (None,)),
    ):
        for p in ps:
            fake.facts(tmp_path, selector, p)
    groups, chosen = representatives(rows_of(tmp_path))
    assert {name: how.p for name, how in chosen.items()} == {
        "quest": 0.8, "full": 0.8, "streaming_llm": 0.8, "oracle_topp": None,
    }  # fmt: skip
    assert all({row.values["p"] for row in group} == {chosen[name].p} for name, group in groups.items())


def test_of_what_all_were_run_with_the_p_nearest_to_the_papers_is_taken(tmp_path, fake):
    for p in (None, 0.7, 0.88, 0.95):
        fake.facts(tmp_path, "quest", p)
    assert representatives(rows_of(tmp_path))[1]["quest"].p == 0.88


def test_top_p_stands_for_a_selector_rather_than_another_pruner(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.7)
    of = fake.config("facts", "quest", 0.9)
    of["pruner"]["name"] = "bounded_top_p"
    fake.write(tmp_path, of, [{"context": 64, "accuracy": 0.5}])
    assert representatives(rows_of(tmp_path))[1]["quest"].pruner == "top_p"
