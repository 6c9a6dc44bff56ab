"""Pruners: which of the candidates, scored, exact attention will read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from twilight import ops
from twilight.checks import check_p
from twilight.ops.top_p import Pruned
from twilight.selection import Selection


class Pruner(Protocol):
    """What `TwilightAttention` asks of a pruner."""

    name: ClassVar[str]
    needs_logits: ClassVar[bool]

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
        """Return the tokens to keep.

        Args:
            logits: `[b, Hq, capacity * granularity]` estimated logits of the candidates, or None if the pruner does not
                need them.
            candidates: what the selector proposed.
            seq_lens: `[b]` int32.
        """
        ...


@dataclass(frozen=True)
class TopP:
    """Keep the smallest set of candidates whose estimated attention mass reaches `p` (Twilight, section 4.2).

    Attributes:
        p: the mass to keep, in (0, 1]; 1 keeps every candidate.
    """

    name: ClassVar[str] = "top_p"
    needs_logits: ClassVar[bool] = True
    p: float = 0.95

    def __post_init__(self) -> None:
        check_p(self.p)

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
        assert logits is not None
        return ops.top_p(logits, candidates, seq_lens, self.p)


@dataclass(frozen=True)
class NoPruning:
    """Keep every candidate: plain top-k attention, the selector's own."""

    name: ClassVar[str] = "none"
    needs_logits: ClassVar[bool] = False

    def __call__(self, logits: torch.Tensor | None, candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
        return ops.keep_all(candidates, seq_lens)


PRUNERS: dict[str, type] = {cls.name: cls for cls in (TopP, NoPruning)}
