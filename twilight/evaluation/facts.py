"""Planted facts: made-up names with codes, hidden in source text and asked for later.

A model that finds a code must attend to one line among thousands, which is what sparse attention may lose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from twilight.evaluation.corpus import cut, heldout_text

CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aeiou"


@dataclass(frozen=True)
class FactPrompt:
    """A text with facts in it, and one question for each fact in order of place.

    Attributes:
        context: the text; it ends in a newline, so a question is appended as it is.
        questions: what to append to the context, all of one length in bytes.
        answers: the six digits that must follow each question.
        depths: where each fact's line starts, as a fraction of the context, ascending.
    """

    context: bytes
    questions: tuple[bytes, ...]
    answers: tuple[bytes, ...]
    depths: tuple[float, ...]


def random_names(rng: random.Random, n: int) -> list[str]:
    """Return `n` different pronounceable six-letter names, such as "zolamu"."""
    names: dict[str, None] = {}
    while len(names) < n:
        names["".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(3))] = None
    return list(names)


def random_codes(rng: random.Random, n: int) -> list[str]:
    """Return `n` different six-digit codes, none with a leading zero."""
    return [str(code) for code in rng.sample(range(100_000, 1_000_000), n)]


def question(name: str) -> bytes:
    """Return the start of the fact's line, up to its code."""
    return f"# the code of {name} is ".encode()


def fact_line(name: str, code: str) -> bytes:
    """Return the fact's line with its newline."""
    return question(name) + f"{code}\n".encode()


FACT_BYTES = len(fact_line("zolamu", "483920"))
QUESTION_BYTES = len(question("zolamu"))
ANSWER_BYTES = len("483920")


def line_start(text: bytes, position: int) -> int:
    """Return where the line that holds `position` starts."""
    return text.rfind(b"\n", 0, position) + 1


def build_fact_prompt(
    num_bytes: int,
    num_facts: int = 8,
    seed: int = 0,
    text: bytes | None = None,
    *,
    depths: Sequence[float] | None = None,
) -> FactPrompt:
    """Plant facts in held-out text, at line starts spread evenly over the context.

    Args:
        num_bytes: length of the context, in bytes.
        num_facts: how many facts to plant.
        seed: names, codes and text.
        text: text to plant them in; by default `heldout_text` of the same seed.
        depths: instead of `num_facts`, where to plant one each, as fractions of the text: ascending, from 0 to 1.

    Raises:
        ValueError: `depths` are not that, `num_facts` is below 1, `num_bytes` leaves no room for text, or `text` is
            too short.
    """
    if depths is not None:
        if not depths or sorted(depths) != list(depths) or not 0 <= depths[0] <= depths[-1] <= 1:
            raise ValueError(f"depths: expected fractions from 0 to 1, ascending, got {list(depths)}")
        num_facts = len(depths)
    if num_facts < 1:
        raise ValueError(f"num_facts: expected at least 1, got {num_facts}")
    needed = num_facts * FACT_BYTES + 1
    if num_bytes < needed:
        raise ValueError(f"num_bytes: {num_facts} facts need at least {needed}, got {num_bytes}")
    room = num_bytes - num_facts * FACT_BYTES
    if text is None:
        text = heldout_text(room, seed)
    if len(text) < room:
        raise ValueError(f"text: expected at least {room} bytes, got {len(text)}")
    text = cut(text, room - 1) + b"\n"

    rng = random.Random(seed)
    names, codes = random_names(rng, num_facts), random_codes(rng, num_facts)
    if depths is None:
        places = [(2 * i + 1) * room // (2 * num_facts) for i in range(num_facts)]
    else:
        places = [int(depth * room) for depth in depths]
    starts = [line_start(text, place) for place in places]
    parts = []
    for start, end, name, code in zip(starts, [*starts[1:], room], names, codes, strict=True):
        parts += [fact_line(name, code), text[start:end]]
    return FactPrompt(
        context=text[: starts[0]] + b"".join(parts),
        questions=tuple(question(name) for name in names),
        answers=tuple(code.encode() for code in codes),
        depths=tuple((start + i * FACT_BYTES) / num_bytes for i, start in enumerate(starts)),
    )
