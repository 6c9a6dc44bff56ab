"""Ask questions after a context: each fed one token a step, through the attention that is measured."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from twilight.evaluation.session import Session, Step


def ask(session: Session, cache: Any, questions: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Return the `new_tokens` most likely tokens after each question; the cache is as before.

    Questions of equal length make a batch, whose rows share the context's pages.

    Args:
        cache: from `Session.read`, one context.
        questions: token lists, each continuing the context on its own.
        new_tokens: at least 1.
    """
    out: dict[int, list[int]] = {}
    for length, members in by_length(questions).items():
        forced = torch.tensor([questions[i] for i in members], device=session.model.device)
        with session.branch(cache, len(members)), session.steps(cache, length + new_tokens - 1) as step:
            chosen = greedy(step, forced, new_tokens)
        out |= dict(zip(members, chosen.tolist(), strict=True))
    return [out[i] for i in range(len(out))]


def by_length(questions: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    """Return the numbers of the questions of each length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[len(question)].append(index)
    return dict(groups)


def greedy(
    step: Step, forced: torch.Tensor, new_tokens: int, tell: Callable[[int], None] = lambda tokens: None
) -> torch.Tensor:
    """Feed `forced` `[b, n]` token by token, then the most likely token each time; return `[b, new_tokens]`.

    `tell` is called after each step with the number of tokens that it decoded.
    """
    chosen: list[torch.Tensor] = []
    for position in range(forced.shape[1] + new_tokens - 1):
        ids = forced[:, position] if position < forced.shape[1] else chosen[-1]
        logits = step(ids)
        if position >= forced.shape[1] - 1:
            chosen.append(logits.argmax(-1))
        tell(len(ids))
    return torch.stack(chosen, dim=1)


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of generated tokens up to the first end of text."""
    end = tokenizer.eos_token_id
    shown = list(tokens[: tokens.index(end)] if end in tokens else tokens)
    return str(tokenizer.decode(shown))


@contextlib.contextmanager
def branch(cache: Any, repeats: int, tokens: int) -> Iterator[None]:
    """Do as `TwilightCache.branch` with a transformers cache of one sequence, which gains `tokens` tokens meanwhile."""
    if hasattr(cache, "branch"):
        with cache.branch(repeats):
            yield
        return
    cache.batch_repeat_interleave(repeats)
    yield
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-tokens)
