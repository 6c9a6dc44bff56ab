"""RULER's kinds: what is hidden can be found, where it should be, and what is asked for is the answer."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from twilight.evaluation import ruler
from twilight.evaluation.documents import load_documents
from twilight.evaluation.examples import score
from twilight.evaluation.ruler import KINDS, NEEDLES, WITH_DEPTH, make_example


class Bytes:
    """A tokenizer with a token a byte."""

    def __call__(self, text, **options):
        return {"input_ids": list(text.encode())}


class Words:
    """A tokenizer with a token a word."""

    def __call__(self, text, **options):
        return {"input_ids": text.split()}


SQUAD = {"data": [{"paragraphs": [
    {"context": f"Text {i} says that the answer is {i}{i}.",
     "qas": [{"question": f"What does text {i} say?", "answers": 2 * [{"text": f"{i}{i}"}]}]}
    for i in range(90)
]}]}  # fmt: skip
HOTPOT = [
    {"question": f"Which comes after {i}?", "answer": str(i + 1),
     "context": [[f"T{i}", [f"Of {i}. ", "More."]], ["Same", ["x"]]]}
    for i in range(90)
]  # fmt: skip


@pytest.fixture
def data(tmp_path):
    files = {"qa_1": tmp_path / "squad.json", "qa_2": tmp_path / "hotpot.json"}
    files["qa_1"].write_text(json.dumps(SQUAD))
    files["qa_2"].write_text(json.dumps(HOTPOT))
    return {kind: str(path) for kind, path in files.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokenizer", "size"), [(Bytes(), 6000), (Words(), 1500)])
def test_contexts_are_as_long_as_asked_and_of_the_seed(kind, tokenizer, size, data):
    size = size // 5 if kind.startswith("qa") else size
    made = make_example(kind, size, tokenizer, 3, data=data.get(kind))
    again, other = (make_example(kind, size, tokenizer, seed, data=data.get(kind)) for seed in (3, 4))
    length = len(tokenizer(made.context)["input_ids"])
    assert 0.9 * size < length <= size
    assert made == again and made.questions != other.questions
    assert made.context.endswith("\n") and made.kind == kind


@pytest.mark.parametrize("kind", NEEDLES)
def test_needles_hold_the_answers_and_no_others_of_the_asked_keys(kind):
    made = make_example(kind, 6000, Bytes(), 1, depth=0.5 if kind in WITH_DEPTH else None)
    (question,) = made.questions
    found = re.findall(r"One of the special magic (number|uuid)s for (\S+) is: (\S+)\.$", made.context, re.M)
    asked = [key for _, key, _ in found if key in question.text]
    assert sorted(value for _, key, value in found if key in asked) == sorted(question.answers)
    expected = {"niah_multivalue": 4, "niah_multiquery": 4}.get(kind, 1)
    assert len(question.answers) == len(set(question.answers)) == expected
    keys = {"niah_multikey_1": 4, "niah_multiquery": 4}.get(kind)
    if keys:
        assert len({key for _, key, _ in found}) == keys
    if NEEDLES[kind]["haystack"] == "needles":
        assert len(found) > 40
    shape = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}" if NEEDLES[kind]["values"] == "uuids" else r"\d{7}"
    assert all(re.fullmatch(shape, value) for value in question.answers)


@pytest.mark.parametrize("kind", WITH_DEPTH)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_lies_at_its_depth(kind, depth):
    made = make_example(kind, 8000, Bytes(), 2, depth=depth)
    (question,) = made.questions
    place = made.context.index(question.answers[0]) / len(made.context)
    # Lines of source differ in length, and the first one says what to do.
    assert place == pytest.approx(depth, abs=0.12)
    assert question.depth == depth


def test_variables_follow_from_each_other():
    made = make_example("vt", 4000, Bytes(), 5)
    (question,) = made.questions
    value = re.search(r"the value (\d{5}) in the text", question.text)[1]
    # The solved example comes first, with variables of its own.
    steps = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", made.context, re.M)
    holds: dict[str, str] = {}
    for name, source in steps:
        holds[name] = holds.get(source, source)
    assert [name for name, held in holds.items() if held == value] == list(question.answers)
    assert len(question.answers) == 5 and made.context.count("Memorize and track") == 2


def test_common_words_are_the_most_common():
    made = make_example("cwe", 8000, Bytes(), 5)
    (question,) = made.questions
    listed = made.context[made.context.rindex("Below is a numbered list") :]
    counts = Counter(re.findall(r"\d+\. (\w+)", listed))
    assert {word for word, _ in counts.most_common(10)} == set(question.answers)
    assert sorted(set(counts.values())) == [3, 30]


@pytest.mark.parametrize("size", [400, 1000, 3000, 12000])
def test_frequent_words_are_the_most_frequent_but_for_dots(size):
    made = make_example("fwe", size, Bytes(), 5)
    (question,) = made.questions
    words = made.context.split("coded words.")[1].split()
    (dots, most), *ranked = [*Counter(words).most_common(), ("", 0)]
    assert dots == "...." and most > ranked[0][1]
    assert [word for word, _ in ranked[:3]] == list(question.answers)
    # Three, without a tie for the last place.
    assert ranked[0][1] > ranked[1][1] > ranked[2][1] > ranked[3][1]


@pytest.mark.parametrize("kind", ["qa_1", "qa_2"])
def test_documents_have_the_answers_own_among_others(kind, data):
    made = make_example(kind, 900, Bytes(), 7, data=data[kind])
    (question,) = made.questions
    number = re.search(r"text (\d+) say|after (\d+)\?", question.text)
    index = int(number[1] or number[2])
    assert question.answers == ((f"{index}{index}",) if kind == "qa_1" else (str(index + 1),))
    assert (f"Text {index} says" if kind == "qa_1" else f"T{index}\nOf {index}. More.") in made.context
    numbers = [int(n) for n in re.findall(r"^Document (\d+):$", made.context, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 5
    bodies = re.split(r"Document \d+:\n", made.context)[1:]
    assert len(set(bodies[:-1])) == len(bodies) - 1


def test_data_is_asked_for_plainly(tmp_path):
    with pytest.raises(ValueError, match=r"needs a data set, which is not part of this package\n.*HotpotQA"):
        make_example("qa_2", 1000, Bytes())
    with pytest.raises(FileNotFoundError, match="task.data.qa_1: no file 'gone.json'"):
        make_example("qa_1", 1000, Bytes(), data="gone.json")
    for name, text in (("list", "[]"), ("broken", "{"), ("other", '{"data": [{"paragraphs": 3}]}')):
        path = tmp_path / name
        path.write_text(text)
        with pytest.raises(ValueError, match="has not the form of SQuAD"):
            load_documents("qa_1", str(path))
    empty = tmp_path / "empty.json"
    empty.write_text('{"data": []}')
    with pytest.raises(ValueError, match="has no question with an answer"):
        load_documents("qa_1", str(empty))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"vt: the smallest context has \d+ tokens, 50 are too few"):
        make_example("vt", 50, Bytes())
    with pytest.raises(ValueError, match=r"niah_single_2: all there is to read makes \d+ tokens, 3000 were asked for"):
        make_example("niah_single_2", 3000, Bytes(), text="hay\n" * 10)
    with pytest.raises(ValueError, match="kind: expected one of niah_single_1"):
        make_example("niah", 1000, Bytes())


def test_a_haystack_of_ones_own():
    made = make_example("niah_single_2", 3000, Bytes(), text="hay hay\n" * 1000)
    assert made.context.count("hay hay\n") > 300


@pytest.mark.parametrize(
    ("output", "answers", "match", "expected"),
    [
        ("483920\n", ("483920",), "start", (1, 1)),
        (" 483920", ("483920",), "start", (0, 1)),
        ("first ABC then def", ("abc", "DEF", "ghi"), "all", (2, 3)),
        ("it is Paris.", ("London", "paris"), "any", (1, 1)),
        ("", ("London", "Paris"), "any", (0, 1)),
    ],
)
def test_scores(output, answers, match, expected):
    assert score(output, answers, match) == expected


def test_all_of_rulers_thirteen_are_there():
    assert len(ruler.KINDS) == len(set(ruler.KINDS)) == 13
