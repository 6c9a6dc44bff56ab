"""Planted facts: where they are, and that they are there once."""

from __future__ import annotations

import re

import pytest

from twilight.evaluation.facts import build_fact_prompt


@pytest.mark.parametrize(("num_bytes", "num_facts"), [(400, 1), (4096, 8), (9999, 50)])
def test_each_fact_stands_once_at_a_line_start_at_its_depth(num_bytes: int, num_facts: int) -> None:
    prompt = build_fact_prompt(num_bytes, num_facts, seed=5)
    assert len(prompt.context) == num_bytes and prompt.context.endswith(b"\n")
    assert len(set(prompt.answers)) == len(set(prompt.questions)) == num_facts
    assert len({len(question) for question in prompt.questions}) == 1
    for question, answer, depth in zip(prompt.questions, prompt.answers, prompt.depths, strict=True):
        assert re.fullmatch(rb"\d{6}", answer)
        line = question + answer + b"\n"
        place = prompt.context.find(b"\n" + line) + 1 if not prompt.context.startswith(line) else 0
        assert prompt.context.count(line) == 1 and place == round(depth * num_bytes)
    assert list(prompt.depths) == sorted(prompt.depths)


def test_depths_are_spread_over_the_context() -> None:
    depths = build_fact_prompt(16384, 8).depths
    for index, depth in enumerate(depths):
        assert depth == pytest.approx((2 * index + 1) / 16, abs=0.05)


def test_the_seed_decides() -> None:
    text = b"word\n" * 1000
    assert build_fact_prompt(2000, 3, 1, text) == build_fact_prompt(2000, 3, 1, text)
    assert build_fact_prompt(2000, 3, 1, text).answers != build_fact_prompt(2000, 3, 2, text).answers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1000, 0), "num_facts: expected at least 1, got 0"),
        ((100, 8), "num_bytes: 8 facts need at least 249, got 100"),
        ((1000, 2, 0, b"short"), "text: expected at least"),
    ],
)
def test_impossible_requests_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_fact_prompt(*arguments)
