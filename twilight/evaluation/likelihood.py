"""Likelihood of a text as decoding sees it: one token a step, through the attention that is measured."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from twilight.evaluation.session import Session


def next_token_nll(session: Session, texts: torch.Tensor, context: int, cache: Any = None) -> torch.Tensor:
    """Return what each token after the first `context + 1` costs.

    The first `context` tokens are prefilled densely. Each further one but the last is then decoded, and the token after
    it scored.

    Args:
        texts: `[windows, context + n + 1]` int64.
        context: tokens that are prefilled.
        cache: one that `Session.read` returned for them; by default it is read.

    Returns:
        `[windows, n]` float64 in nats, on the CPU.
    """
    if cache is None:
        cache = session.read(texts[:, :context])
    ids = texts.to(session.model.device)
    count = texts.shape[1] - context - 1
    found = []
    with session.branch(cache), session.steps(cache, count) as step:
        for place in range(context, context + count):
            logits = step(ids[:, place]).double()
            found.append(F.cross_entropy(logits, ids[:, place + 1], reduction="none"))
    return torch.stack(found, dim=1).cpu()
