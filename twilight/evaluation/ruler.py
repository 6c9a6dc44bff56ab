"""RULER's synthetic tasks (Hsieh et al., arXiv 2404.06654, section 3), of any length, from a seed.

Thirteen kinds under RULER's names: eight needles in a haystack, variable tracking, common and frequent words, and two
of questions over documents, whose data the user brings (`twilight.evaluation.documents`). The wording follows RULER's;
the words are made up here instead of taken from lists, and the haystack of ``essay`` kinds is any text: held-out Python
source by default, where RULER has essays. So scores compare between methods here, not with published ones.
"""

from __future__ import annotations

import contextlib
import random
import string
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from twilight.evaluation.corpus import heldout_text
from twilight.evaluation.documents import Document, QuestionSet, load_documents
from twilight.evaluation.examples import Example, Question
from twilight.evaluation.facts import random_names

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

NEEDLES: dict[str, dict[str, Any]] = {
    "niah_single_1": {"haystack": "noise", "keys": "words", "values": "numbers"},
    "niah_single_2": {"haystack": "essay", "keys": "words", "values": "numbers"},
    "niah_single_3": {"haystack": "essay", "keys": "words", "values": "uuids"},
    "niah_multikey_1": {"haystack": "essay", "keys": "words", "values": "numbers", "num_keys": 4},
    "niah_multikey_2": {"haystack": "needles", "keys": "words", "values": "numbers"},
    "niah_multikey_3": {"haystack": "needles", "keys": "uuids", "values": "uuids"},
    "niah_multivalue": {"haystack": "essay", "keys": "words", "values": "numbers", "num_values": 4},
    "niah_multiquery": {"haystack": "essay", "keys": "words", "values": "numbers", "num_keys": 4, "num_asked": 4},
}
WITH_DEPTH = tuple(kind for kind in NEEDLES if "multivalue" not in kind and "multiquery" not in kind)
"""Kinds with one needle that is asked for: its depth is a parameter."""
KINDS = (*NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")

_NEW_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
"""RULER's limits, which are of tokens of some four characters."""
_HOPS, _COMMON, _COMMON_TIMES, _UNCOMMON_TIMES, _FREQUENT, _ALPHA = 4, 10, 30, 3, 3, 2.0


def make_example(
    kind: str,
    num_tokens: int,
    tokenizer: Any,
    seed: int = 0,
    *,
    depth: float | None = None,
    text: str | None = None,
    data: str | None = None,
) -> Example:
    """Return an example whose context has at most `num_tokens` tokens, and as nearly so many as whole units allow.

    Args:
        kind: one of `KINDS`.
        num_tokens: of the context; question and answer come on top.
        tokenizer: a transformers tokenizer.
        seed: of everything random.
        depth: where the needle is, of those in `WITH_DEPTH`; random by default.
        text: haystack of the ``essay`` kinds; held-out source by default.
        data: JSON file for ``qa_1`` (SQuAD) and ``qa_2`` (HotpotQA).

    Raises:
        ValueError, FileNotFoundError: no such kind, no data, no room for the smallest example, or too little to read.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got '{kind}'")
    if kind.startswith("niah"):
        spec = NEEDLES[kind]
        if spec["haystack"] == "essay":
            lines = (_source(num_tokens, seed) if text is None else text).splitlines()
        else:
            lines = []

        def build(units: int, rng: random.Random) -> Example:
            return _needles(kind, units, rng, depth, lines, **spec)

        most = len(lines) if lines else None
    elif kind.startswith("qa"):
        questions = load_documents(kind, data)
        most = len(questions.documents)

        def build(units: int, rng: random.Random) -> Example:
            return _documents(kind, units, rng, questions)

    else:
        build, most = {"vt": _variables, "cwe": _common, "fwe": _frequent}[kind], None
    return _fit(build, num_tokens, most, tokenizer, f"{kind}/{seed}")


def _source(num_tokens: int, seed: int) -> str:
    """Return held-out source of 16 bytes a token, of which it is seldom more; of fewer if there is no more."""
    for each in (16, 8, 4):
        with contextlib.suppress(ValueError):
            return heldout_text(each * num_tokens, seed).decode()
    return heldout_text(num_tokens, seed).decode()


def _fit(
    build: Callable[[int, random.Random], Example], num_tokens: int, most: int | None, tokenizer: Any, seed: str
) -> Example:
    """Return the example of most units whose context has at most `num_tokens` tokens, by bisection."""

    def example(units: int) -> tuple[Example, bool]:
        made = build(units, random.Random(seed))
        return made, len(tokenizer(made.context)["input_ids"]) <= num_tokens

    best, fits = example(1)
    if not fits:
        length = len(tokenizer(best.context)["input_ids"])
        raise ValueError(f"{best.kind}: the smallest context has {length} tokens, {num_tokens} are too few")
    low, high = 1, 2
    while most is None or high < most:
        made, fits = example(high)
        if not fits:
            break
        best, low, high = made, high, 2 * high
    high = high if most is None else min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        made, fits = example(middle)
        if fits:
            best, low = made, middle
        else:
            high = middle
    length = len(tokenizer(best.context)["input_ids"])
    if low == most and length < 0.9 * num_tokens:
        raise ValueError(f"{best.kind}: all there is to read makes {length} tokens, {num_tokens} were asked for")
    return best


def _value(rng: random.Random, what: str) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4)) if what == "uuids" else str(rng.randrange(10**6, 10**7))


def _keys(rng: random.Random, what: str, count: int) -> list[str]:
    if what == "uuids":
        return [_value(rng, "uuids") for _ in range(count)]
    names = random_names(rng, 2 * count)
    return [f"{first}-{second}" for first, second in zip(names[::2], names[1::2], strict=True)]


def _needles(
    kind: str,
    units: int,
    rng: random.Random,
    depth: float | None,
    lines: Sequence[str],
    *,
    haystack: str,
    keys: str,
    values: str,
    num_keys: int = 1,
    num_values: int = 1,
    num_asked: int = 1,
) -> Example:
    what = "uuid" if values == "uuids" else "number"
    names = _keys(rng, keys, num_keys)
    hidden = [(name, _value(rng, values)) for name in names for _ in range(num_values)]
    fractions = [rng.random() for _ in hidden]
    if depth is not None:
        fractions[0] = depth
    others = [_needle(what, *each) for each in _distractors(rng, units, keys, values)] if haystack == "needles" else []
    hay = {"noise": [NOISE] * units, "essay": list(lines[:units]), "needles": others}[haystack]
    # From the back, so that earlier places stay where they are.
    for fraction, (name, value) in sorted(zip(fractions, hidden, strict=True), reverse=True):
        hay.insert(round(fraction * units), _needle(what, name, value))
    asked = names[:num_asked]
    wanted = tuple(value for name, value in hidden if name in asked)
    many = len(wanted) > 1
    listed = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + ", and " + asked[-1]
    noun, verb = (f"{what}s", "are") if many else (what, "is")
    head = (
        f"Some special magic {noun} are hidden within the following text. Make sure to memorize it. "
        if many
        else f"A special magic {noun} is hidden within the following text. Make sure to memorize it. "
    )
    return Example(
        kind,
        f"{head}I will quiz you about the {noun} afterwards.\n" + "\n".join(hay) + "\n",
        (
            Question(
                f"What {verb} {'all ' if many else ''}the special magic {noun} for {listed} mentioned in the provided "
                f"text? The special magic {noun} for {listed} mentioned in the provided text {verb}",
                wanted,
                depth if kind in WITH_DEPTH else None,
            ),
        ),
        "all",
        _NEW_TOKENS["niah"],
    )


def _needle(what: str, key: str, value: str) -> str:
    return f"One of the special magic {what}s for {key} is: {value}."


def _distractors(rng: random.Random, count: int, keys: str, values: str) -> list[tuple[str, str]]:
    return [(key, _value(rng, values)) for key in _keys(rng, keys, count)]


def _variables(units: int, rng: random.Random) -> Example:
    """One chain of assignments in noise, after a solved small one."""
    shown, answer = _chain(4, rng)
    asked, wanted = _chain(units, rng)
    names = " ".join(answer.answers)
    return Example("vt", f"{shown}{answer.text} {names}\n\n{asked}", (wanted,), "all", _NEW_TOKENS["vt"])


def _chain(units: int, rng: random.Random) -> tuple[str, Question]:
    names = _unique(rng, _HOPS + 1, 5)
    value = str(rng.randrange(10_000, 100_000))
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {name} = VAR {before}" for before, name in zip(names, names[1:], strict=False)]
    lines = [NOISE] * units
    places = sorted(rng.randint(0, units) for _ in steps)
    for place, step in reversed(list(zip(places, steps, strict=True))):
        lines.insert(place, step)
    text = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    asked = (
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {len(names)} variables are assigned the value {value}, "
        "they are:"
    )
    return text, Question(asked, tuple(names))


def _unique(rng: random.Random, count: int, length: int, letters: str = string.ascii_uppercase) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(letters) for _ in range(length))] = None
    return list(found)


def _common(units: int, rng: random.Random) -> Example:
    """Ten words that come 30 times among others that come 3 times, after a solved small list."""
    shown, answer = _word_list(8, rng, 10, 1)
    asked, wanted = _word_list(units, rng, _COMMON_TIMES, _UNCOMMON_TIMES)
    names = " ".join(f"{i}. {word}" for i, word in enumerate(answer.answers, 1))
    return Example("cwe", f"{shown}{answer.text} {names}\n\n{asked}", (wanted,), "all", _NEW_TOKENS["cwe"])


def _word_list(units: int, rng: random.Random, often: int, seldom: int) -> tuple[str, Question]:
    words = random_names(rng, _COMMON + units)
    common = words[:_COMMON]
    bag = [word for word in common for _ in range(often)] + [w for w in words[_COMMON:] for _ in range(seldom)]
    rng.shuffle(bag)
    listed = " ".join(f"{i}. {word}" for i, word in enumerate(bag, 1))
    text = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{listed}\n"
    )
    asked = (
        f"Question: What are the {_COMMON} most common words in the above list? Answer: The top {_COMMON} words that "
        "appear most often in the list are:"
    )
    return text, Question(asked, tuple(common))


def _frequent(units: int, rng: random.Random) -> Example:
    """Coded words whose frequencies follow a zeta distribution; the most frequent of all is dots, which is noise."""
    total = 32 * units
    vocabulary = [f"{'.' * 4}", *_unique(rng, max(_FREQUENT + 1, total // 16), 6, string.ascii_lowercase)]
    norm = sum(rank**-_ALPHA for rank in range(1, len(vocabulary) + 1))
    bag = [
        word
        for rank, word in enumerate(vocabulary, 1)
        for _ in range(max(int(total * rank**-_ALPHA / norm), (_FREQUENT + 3 - rank) if rank <= _FREQUENT + 1 else 0))
    ]
    rng.shuffle(bag)
    text = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(bag)}\n"
    )
    asked = (
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    return Example("fwe", text, (Question(asked, tuple(vocabulary[1 : _FREQUENT + 1])),), "all", _NEW_TOKENS["fwe"])


def _documents(kind: str, units: int, rng: random.Random, data: QuestionSet) -> Example:
    """A question's own documents among others, shuffled."""
    asked = rng.choice(data.questions)
    own = list(asked.documents)
    others = [i for i in range(len(data.documents)) if i not in set(own)]
    rng.shuffle(others)
    chosen = own + others[: max(0, units - len(own))]
    rng.shuffle(chosen)
    told = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    documents: list[Document] = [data.documents[i] for i in chosen]
    listed = "\n\n".join(f"Document {i}:\n{each}" for i, each in enumerate(documents, 1))
    context = f"{told}\n\nThe following are given documents.\n\n{listed}\n\n"
    question = Question(f"{told}\n\nQuestion: {asked.text} Answer:", asked.answers)
    return Example(kind, context, (question,), "any", _NEW_TOKENS["qa"])
