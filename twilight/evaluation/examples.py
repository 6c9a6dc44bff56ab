"""Examples: a context, questions about it, and how an answer is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from twilight.evaluation.facts import build_fact_prompt

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Question:
    """What is asked, decoded token by token after the context.

    Attributes:
        text: continues the context as it is.
        answers: the references.
        depth: where in the context the answer stands, as a fraction; None where several places hold it.
    """

    text: str
    answers: tuple[str, ...]
    depth: float | None = None


@dataclass(frozen=True)
class Example:
    """A context and its questions, which are independent of each other.

    Attributes:
        kind: what it is an example of.
        context: prefilled densely.
        questions: one or more.
        match: ``"start"``: the output begins with the one reference; ``"all"``: each reference that the output contains
            counts; ``"any"``: the output contains one of them.
        new_tokens: tokens to generate; None for as many as the references have.
    """

    kind: str
    context: str
    questions: tuple[Question, ...]
    match: Literal["start", "all", "any"]
    new_tokens: int | None = None


def score(output: str, answers: tuple[str, ...], match: str) -> tuple[int, int]:
    """Return how many references were found, and how many were asked for: RULER's string matches, counted.

    ``"all"`` counts every reference (RULER's score is the mean share found), ``"any"`` and ``"start"`` count one.
    Case is ignored but by ``"start"``.
    """
    if match == "start":
        return int(output.startswith(answers[0])), 1
    found = [answer.lower() in output.lower() for answer in answers]
    return (sum(found), len(found)) if match == "all" else (int(any(found)), 1)


def even_depths(count: int) -> list[float]:
    """Return `count` depths in the middles of as many equal parts."""
    return [(2 * i + 1) / (2 * count) for i in range(count)]


def planted(num_tokens: int, depths: list[float], seed: int, tokenizer: Any) -> Example:
    """Return a context of about `num_tokens` tokens of source with a fact at each depth, and a question for each.

    Raises:
        ValueError: too short for the facts, or longer than the held-out text.
    """
    sample = build_fact_prompt(_SAMPLE_BYTES, 1, seed)
    per_byte = len(tokenizer(sample.context.decode())["input_ids"]) / _SAMPLE_BYTES
    facts = build_fact_prompt(max(1, int(num_tokens / per_byte)), seed=seed, depths=depths)
    asked = zip(facts.questions, facts.answers, depths, strict=True)
    return Example(
        kind="planted",
        context=facts.context.decode(),
        questions=tuple(Question(text.decode(), (answer.decode(),), depth) for text, answer, depth in asked),
        match="start",
    )
