"""Windows of a text: where they come from, and that they are what they say."""

from __future__ import annotations

import hashlib
import sys
from types import SimpleNamespace

import pytest
import torch

from twilight.errors import MissingExtraError
from twilight.evaluation.corpus import heldout_text
from twilight.evaluation.texts import num_bytes, read_windows


class Bytes:
    """A tokenizer with a token a byte, and a first token of its own."""

    def __init__(self, begin=()):
        self.begin = list(begin)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return {"input_ids": (self.begin if add_special_tokens else []) + list(text.encode())}

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def test_a_long_text_that_is_cut_is_no_reason_to_warn(tmp_path):
    class Strict(Bytes):
        def __call__(self, text, add_special_tokens=True, verbose=True):
            assert not verbose or len(text) < 10, "longer than the specified maximum"
            return super().__call__(text, add_special_tokens)

    file = tmp_path / "long.txt"
    file.write_text("abc" * 100)
    assert read_windows(str(file), Strict(), 2, 5).tokens.shape == (2, 5)


def test_windows_follow_each_other_and_begin_as_a_text_does(tmp_path):
    file = tmp_path / "some.txt"
    file.write_text("abcdefghijkl")
    plain = read_windows(str(file), Bytes(), 2, 5)
    assert [bytes(row) for row in plain.tokens.tolist()] == [b"abcde", b"fghij"]
    assert plain.name == f"some.txt {hashlib.sha256(b'abcdefghij').hexdigest()[:12]}"
    begun = read_windows(str(file), Bytes([300]), 2, 5)
    assert begun.tokens.tolist() == [[300, *b"abcd"], [300, *b"efgh"]]
    assert read_windows(str(file), Bytes(), 2, 6).name != plain.name


def test_heldout_source_is_of_the_seed():
    one, two = (read_windows("heldout", Bytes(), 3, 50, seed=seed) for seed in (0, 1))
    assert bytes(one.tokens.flatten().tolist()) == heldout_text(300, 0)[:150]
    assert one.name.startswith("heldout ") and one.name != two.name


def test_bytes_are_of_the_text():
    assert num_bytes(Bytes(), torch.tensor([list("né".encode()), list(b"abc")])) == 6


def test_a_data_set_of_the_hub_is_streamed_no_further_than_needed(monkeypatch):
    taken = []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield {"title": f"t{number}", "body": f"Document {number}. "}

    asked = []
    fake = SimpleNamespace(load_dataset=lambda *words, **options: asked.append((words, options)) or rows())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = read_windows("hf:some/books", Bytes(), 2, 40, split="train", column="body", subset="en")
    assert asked[0] == (("some/books", "en"), {"split": "train", "streaming": True})
    assert bytes(found.tokens.flatten().tolist()).startswith(b"Document 0. \n\nDocument 1. \n\n")
    assert found.name.startswith("hf:some/books ") and len(taken) < 30
    with pytest.raises(
        ValueError, match=r"task.text_column: 'some/books' has no text in 'text' \(there is: title, body"
    ):
        read_windows("hf:some/books", Bytes(), 2, 40)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="has 5 tokens, 2 windows of 4 need 8"):
        read_windows(str(tmp_path / "short.txt"), Bytes(), 2, 4)
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_windows(str(tmp_path / "latin.txt"), Bytes(), 2, 4)
    with pytest.raises(FileNotFoundError, match="task.text: no file 'gone.txt'"):
        read_windows("gone.txt", Bytes(), 2, 4)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'twilight-attn\[eval\]'"):
        read_windows("hf:x", Bytes(), 2, 4)
