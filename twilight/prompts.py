"""What a decode run is given: a file's text, or planted facts in held-out source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twilight.evaluation.facts import FactPrompt, build_fact_prompt

_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Prompt:
    """Token ids of a context that is prefilled, and of what is decoded after it.

    Attributes:
        context: tokens to prefill densely.
        questions: token lists fed one token a step in decode mode, each continuing the context on its own.
        answers: expected texts, one a question; empty for a prompt from a file.
        texts: the questions as text, for showing.
        new_tokens: tokens to generate after each question.
    """

    context: list[int]
    questions: list[list[int]]
    answers: list[str]
    texts: list[str]
    new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence at its end."""
        return len(self.context) + max(map(len, self.questions)) + self.new_tokens


def prompt_from_file(path: str, tokenizer: Any, new_tokens: int) -> Prompt:
    """Read a text file. All of it but the last token is prefilled; the last one starts the decoding.

    Raises:
        FileNotFoundError, ValueError: no such file, not UTF-8, or fewer than two tokens.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"task.prompt: no file '{path}'")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"task.prompt: '{path}' is not UTF-8 text ({error})") from error
    ids = tokenizer(text)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"task.prompt: '{path}' is empty: expected at least 2 tokens, got {len(ids)}")
    return Prompt(ids[:-1], [ids[-1:]], [], [tokenizer.decode(ids[-1:])], new_tokens)


def prompt_with_facts(num_tokens: int, num_facts: int, seed: int, tokenizer: Any) -> Prompt:
    """Build a context of about `num_tokens` tokens with planted facts, and a question for each.

    Raises:
        ValueError: too short for the facts, or longer than the held-out text.
    """
    if num_tokens < 1:
        raise ValueError(f"task.prompt_tokens: expected at least 1, got {num_tokens}")
    if num_facts < 1:
        raise ValueError(f"task.num_facts: expected at least 1, got {num_facts}")
    sample = build_fact_prompt(_SAMPLE_BYTES, 1, seed)
    per_byte = len(tokenizer(sample.context.decode())["input_ids"]) / _SAMPLE_BYTES
    try:
        facts: FactPrompt = build_fact_prompt(max(1, int(num_tokens / per_byte)), num_facts, seed)
    except ValueError as error:
        raise ValueError(f"task.prompt_tokens: {num_tokens} with task.num_facts={num_facts}: {error}") from error
    ids = tokenizer(facts.context.decode())["input_ids"]
    texts = [question.decode() for question in facts.questions]
    answers = [answer.decode() for answer in facts.answers]
    plain = {"add_special_tokens": False}
    return Prompt(
        context=ids,
        questions=[tokenizer(text, **plain)["input_ids"] for text in texts],
        answers=answers,
        texts=texts,
        # An answer may take one token more after a question than on its own.
        new_tokens=max(len(tokenizer(answer, **plain)["input_ids"]) for answer in answers) + (per_byte < 1),
    )
