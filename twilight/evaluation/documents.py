"""Questions over documents from a local JSON file, in the form of SQuAD (``qa_1``) or HotpotQA (``qa_2``)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

Document = str


@dataclass(frozen=True)
class AskedOf:
    """A question, its references, and the numbers of the documents that it is about."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Documents, each once, and the questions about them."""

    documents: tuple[Document, ...]
    questions: tuple[AskedOf, ...]


_FORMS = {
    "qa_1": """SQuAD: {"data": [{"paragraphs": [{"context": …,
  "qas": [{"question": …, "answers": [{"text": …}]}]}]}]}""",
    "qa_2": """HotpotQA: [{"question": …, "answer": …, "context": [[title, [sentence, …]], …]}, …]""",
}


@lru_cache(maxsize=2)
def load_documents(kind: str, path: str | None) -> QuestionSet:
    """Read a file.

    Args:
        kind: ``"qa_1"`` or ``"qa_2"``.
        path: the file; nothing is downloaded.

    Raises:
        ValueError, FileNotFoundError: no file was named or is there, or it has another form.
    """
    if path is None:
        raise ValueError(
            f"kinds: {kind} needs a data set, which is not part of this package\n"
            f"  name a JSON file of the form of {_FORMS[kind]}\n"
            f"  as in task.data.{kind}=FILE"
        )
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"task.data.{kind}: no file '{path}'")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = _squad(data) if kind == "qa_1" else _hotpot(data)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"task.data.{kind}: '{path}' has not the form of {_FORMS[kind]}") from error
    if not found.questions:
        raise ValueError(f"task.data.{kind}: '{path}' has no question with an answer")
    return found


def _squad(data: Any) -> QuestionSet:
    numbers: dict[str, int] = {}
    questions = []
    for article in data["data"]:
        for paragraph in article["paragraphs"]:
            number = numbers.setdefault(paragraph["context"], len(numbers))
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible"):
                    questions.append(AskedOf(asked["question"], answers, (number,)))
    return QuestionSet(tuple(numbers), tuple(questions))


def _hotpot(data: Any) -> QuestionSet:
    numbers: dict[str, int] = {}
    questions = []
    for asked in data:
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in asked["context"]]
        own = tuple(dict.fromkeys(numbers.setdefault(text, len(numbers)) for text in texts))
        questions.append(AskedOf(asked["question"], (asked["answer"],), own))
    return QuestionSet(tuple(numbers), tuple(questions))
