"""Texts to be read and scored: held-out source, a file, or a data set of the hub; cut into windows of tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight.errors import missing_extra
from twilight.evaluation.corpus import heldout_text

HELDOUT, HUB = "heldout", "hf:"
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Windows:
    """Pieces of a text that follow each other.

    Attributes:
        name: of the text, and 12 hexadecimal digits of sha256 over what of it is in the windows.
        tokens: `[windows, length]` int64.
    """

    name: str
    tokens: torch.Tensor


def read_windows(
    source: str,
    tokenizer: Any,
    windows: int,
    length: int,
    *,
    seed: int = 0,
    split: str = "test",
    column: str = "text",
    subset: str | None = None,
) -> Windows:
    """Return windows of `length` tokens, each beginning as the tokenizer begins a text.

    Args:
        source: ``"heldout"``, ``"hf:NAME"`` for a data set of the hub, or a UTF-8 file.
        tokenizer: a transformers tokenizer.
        windows: how many.
        length: tokens of each.
        seed: order of the held-out files.
        split, column, subset: of a data set; it is streamed, no more than is needed.

    Raises:
        ValueError, FileNotFoundError, MissingExtraError: no such text, not text, or too little of it.
    """
    if windows < 1 or length < 2:
        raise ValueError(f"windows: expected at least 1 of at least 2 tokens, got {windows} of {length}")
    begin = _begin(tokenizer)
    wanted = windows * (length - len(begin))
    ids: list[int] = []
    for text in _growing(source, 2 * wanted, seed, split, column, subset):
        # Not verbose: a text is longer than the model's positions, of which the tokenizer warns, until it is cut.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise ValueError(
            f"text: '{source}' has {len(ids)} tokens, {windows} windows of {length} need {wanted}\n"
            "  ask for fewer windows or a shorter context, or name a longer text"
        )
    body = torch.tensor(ids[:wanted]).view(windows, -1)
    start = torch.tensor([begin] * windows, dtype=torch.long).view(windows, len(begin))
    digest = hashlib.sha256(tokenizer.decode(ids[:wanted]).encode()).hexdigest()[:12]
    name = Path(source).name if source != HELDOUT and not source.startswith(HUB) else source
    return Windows(f"{name} {digest}", torch.cat([start, body], dim=1))


def num_bytes(tokenizer: Any, tokens: torch.Tensor) -> int:
    """Return the bytes of the text that rows of tokens `[n, m]` stand for."""
    return sum(len(tokenizer.decode(row).encode()) for row in tokens.tolist())


def _begin(tokenizer: Any) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    with_them = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = next((i for i in range(len(with_them)) if with_them[i : i + len(plain)] == plain), 0)
    return list(with_them[:found])


def _growing(source: str, size: int, seed: int, split: str, column: str, subset: str | None) -> Iterator[str]:
    """Yield more and more of a text, until there is no more: of what need not be read as a whole."""
    if source == HELDOUT:
        for factor in (1, 2, 4, 8):
            try:
                text = heldout_text(factor * size, seed).decode()
            except ValueError:
                return
            yield text
    elif source.startswith(HUB):
        documents = _hub(source[len(HUB) :], split, column, subset)
        text = ""
        for share in (2, 2, 4, 8):
            need = len(text) + share * size
            text += "".join(_until(documents, need - len(text)))
            yield text
    else:
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(
                f"task.text: no file '{source}' (else there are '{HELDOUT}', and {HUB}NAME of the hub)"
            )
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"task.text: '{source}' is not UTF-8 text ({error})") from error


def _until(documents: Iterator[str], size: int) -> Iterator[str]:
    total = 0
    while total < size:
        document = next(documents, None)
        if document is None:
            return
        total += len(document)
        yield document


def _hub(name: str, split: str, column: str, subset: str | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing_extra("datasets", "eval", f"task.text={HUB}{name}") from error
    rows = iter(load_dataset(name, subset, split=split, streaming=True))
    first = next(rows, None)
    if first is None or not isinstance(first.get(column), str):
        there = "none" if first is None else ", ".join(first)
        raise ValueError(f"task.text_column: '{name}' has no text in '{column}' (there is: {there})")
    return (row[column] + "\n\n" for row in itertools.chain([first], rows))
