"""Facts: planted in a context and asked for, by depth and length; RULER's synthetic kinds too."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import tensor

from twilight.errors import unknown_name
from twilight.evaluation import ruler
from twilight.evaluation.asking import ask, text_of
from twilight.evaluation.examples import Example, even_depths, planted, score
from twilight.evaluation.reading import Reading
from twilight.evaluation.session import DENSE, TWILIGHT, Session, dense_once, open_session
from twilight.tasks import TaskResult

KINDS = ("planted", *ruler.KINDS)


@dataclass
class _Tally:
    """What became of the questions of one kind and depth."""

    asked: int = 0
    correct: int = 0
    same: int = 0
    tokens: int = 0
    reading: Reading = field(default_factory=Reading)


def run(cfg: DictConfig) -> TaskResult:
    """Ask, sparsely and densely; a row a method, kind and depth.

    Raises:
        ValueError, FileNotFoundError: options out of range, contexts that do not fit, data that is missing.
    """
    task = cfg.task
    _check(task)
    tallies: dict[tuple[str, str, float | None], _Tally] = {}
    total = Reading()
    with open_session(cfg) as session:
        examples = _examples(task, session)
        kinds = session.handle.layers
        for number, example in enumerate(examples):
            mine, reading = _answer(session, example, task, TWILIGHT)
            total.merge(reading)
            sides = {TWILIGHT: (mine, reading)}
            if task.compare_dense:
                sides[DENSE] = dense_once(
                    cfg, f"example {number}", functools.partial(_answer, session, example, task, DENSE)
                )
            for method, (tokens, read) in sides.items():
                _count(tallies, session, example, method, tokens, read, sides.get(DENSE))
    rows = [_row(key, tally, task.context, kinds) for key, tally in sorted(tallies.items(), key=_order)]
    return TaskResult(rows, {"budgets": total.table(context=task.context)})


def _check(task: DictConfig) -> None:
    for kind in task.kinds:
        if kind not in KINDS:
            raise unknown_name("kind of fact", kind, list(KINDS), see="docs/evaluation.md")
    if not task.kinds:
        raise ValueError(f"task.kinds: expected at least one of {', '.join(KINDS)}")
    for name in ("context", "samples", "num_facts"):
        if task[name] < 1:
            raise ValueError(f"task.{name}: expected at least 1, got {task[name]}")
    if task.max_new_tokens is not None and task.max_new_tokens < 1:
        raise ValueError(f"task.max_new_tokens: expected at least 1, got {task.max_new_tokens}")
    if task.depths is not None and not (task.depths and all(0 <= depth <= 1 for depth in task.depths)):
        raise ValueError(f"task.depths: expected fractions from 0 to 1, got {list(task.depths)}")


def _examples(task: DictConfig, session: Session) -> list[Example]:
    """Make all examples, so that what cannot be made is known before anything is read."""
    depths = even_depths(task.num_facts) if task.depths is None else sorted(set(task.depths))
    tokenizer = session.loaded.tokenizer
    data = OmegaConf.to_container(task.data)
    assert isinstance(data, dict)
    text = None if task.haystack is None else _haystack(task.haystack)
    made = []
    for kind in task.kinds:
        for sample in range(task.samples):
            seed = task.seed + sample
            if kind == "planted":
                try:
                    made.append(planted(task.context, depths, seed, tokenizer))
                except ValueError as error:
                    raise ValueError(f"task.context: {task.context} with {len(depths)} facts: {error}") from error
                continue
            for depth in depths if kind in ruler.WITH_DEPTH else [None]:
                made.append(
                    ruler.make_example(kind, task.context, tokenizer, seed, depth=depth, text=text, data=data.get(kind))
                )
    for example in made:
        longest = max(len(question) for question in _questions(example, tokenizer))
        length = len(_ids(tokenizer, example.context)) + longest + _new_tokens(example, task, tokenizer)
        if length > session.loaded.max_tokens:
            raise ValueError(
                f"task.context: {length} tokens with what is decoded are more than the {session.loaded.max_tokens} "
                f"positions of '{session.loaded.path}'"
            )
    return made


def _haystack(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"task.haystack: no file '{path}'")
    return Path(path).read_text(encoding="utf-8")


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    return list(tokenizer(text, **options)["input_ids"])


def _questions(example: Example, tokenizer: Any) -> list[list[int]]:
    return [_ids(tokenizer, question.text, add_special_tokens=False) for question in example.questions]


def _new_tokens(example: Example, task: DictConfig, tokenizer: Any) -> int:
    if task.max_new_tokens is not None:
        return int(task.max_new_tokens)
    if example.new_tokens is not None:
        return example.new_tokens
    answers = [answer for question in example.questions for answer in question.answers]
    # An answer may take one token more after a question than on its own, unless a token is a byte.
    lengths = [len(_ids(tokenizer, answer, add_special_tokens=False)) for answer in answers]
    return max(lengths) + (max(lengths) < max(map(len, answers)))


def _answer(session: Session, example: Example, task: DictConfig, method: str) -> tuple[list[list[int]], Reading]:
    tokenizer = session.loaded.tokenizer
    cache = session.read(tensor([_ids(tokenizer, example.context)]))
    with session.measuring(method) as reading:
        new = _new_tokens(example, task, tokenizer)
        tokens = ask(session, cache, _questions(example, tokenizer), new)
    return tokens, reading


def _count(
    tallies: dict[tuple[str, str, float | None], _Tally],
    session: Session,
    example: Example,
    method: str,
    tokens: list[list[int]],
    reading: Reading,
    dense: tuple[list[list[int]], Reading] | None,
) -> None:
    for number, (question, said) in enumerate(zip(example.questions, tokens, strict=True)):
        tally = tallies.setdefault((method, example.kind, question.depth), _Tally())
        correct, asked = score(text_of(session.loaded.tokenizer, said), question.answers, example.match)
        tally.correct += correct
        tally.asked += asked
        if dense is not None:
            tally.same += sum(a == b for a, b in zip(said, dense[0][number], strict=True))
            tally.tokens += len(said)
    # What was read is known of the example's questions together, which are of one batch.
    for depth in {question.depth for question in example.questions}:
        tallies[method, example.kind, depth].reading.merge(reading)


def _row(key: tuple[str, str, float | None], tally: _Tally, context: int, kinds: dict[int, str]) -> dict[str, Any]:
    method, kind, depth = key
    share = tally.correct / tally.asked
    return {
        "method": method,
        "kind": kind,
        "context": context,
        "depth": depth,
        "asked": tally.asked,
        "correct": tally.correct,
        "accuracy": share,
        "stderr": wilson(tally.correct, tally.asked),
        "agreement": tally.same / tally.tokens if tally.tokens else None,
        **tally.reading.columns(kinds),
    }


def wilson(correct: int, asked: int, z: float = 1.96) -> float:
    """Return a standard error of a share: half of Wilson's interval over `z`, which is not 0 where all are right."""
    share = correct / asked
    return math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2)) / (1 + z**2 / asked)


def _order(item: tuple[tuple[str, str, float | None], _Tally]) -> tuple[bool, int, float]:
    method, kind, depth = item[0]
    return method != DENSE, KINDS.index(kind), -1.0 if depth is None else depth
