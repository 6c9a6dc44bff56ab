"""SnapKV: what the end of the prompt looks at (Li et al., arXiv 2404.14469; FasterDecoding/SnapKV).

    s_i = pool_i( sum over the last w queries t of the prompt of softmax(q_t K^T)_i ),  i before those w     (section 4)

Kept are the prompt's tokens of largest s, its last w, and everything generated since. Decoding changes no score: the
list of prompt tokens only gets shorter, where generated ones need their place in the budget. Nothing is freed.

Scores are kept for each kv head, 4 bytes a token, and the last queries of a row beside them, so that a prompt may
come in chunks: each one brings the scores up to date, and the last one leaves those of the whole prompt. A later prompt
does the same with its own end, where the official code keeps the list that the first one chose. Tokens of sparse steps
are generated, whoever wrote them; those of dense steps, of any size, are prompt.

The official code selects for each query head from repeated keys, here the query heads of a group are combined before
pooling, as kvpress does. Its capacity counts the window and not what is generated later, `budget` counts all. Its class
pools the average of 5, the experiments of the paper the maximum of 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Geometry, LayerCache, Selection, Selector, StateSpec, ops

_GENERATED, _WINDOW = -1.0, -2.0
"""Scores of what has none: both are kept whatever the rest scores, and only the latter's queries have been seen."""


@dataclass
class SnapKV(Selector):
    """Propose what the last queries of the prompt attended to, and everything since.

    Attributes:
        window: w, the queries that observe.
        kernel: tokens that pooling joins, an odd number; 1 for none.
        pool: "max" or "avg".
        reduce: how the query heads of a group are combined: "mean" or "max".
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469"

    window: int = 32
    kernel: int = 7
    pool: str = "max"
    reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window: expected at least 1, got {self.window}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {self.kernel}")
        if self.pool not in ("max", "avg"):
            raise ValueError(f"pool: expected 'max' or 'avg', got {self.pool!r}")
        if self.reduce not in ("mean", "max"):
            raise ValueError(f"reduce: expected 'mean' or 'max', got {self.reduce!r}")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return (
            StateSpec("score", (), torch.float32, per="token", fill=_GENERATED),
            # Twice the window: where speculated tokens are cut off again, those before them observe once more.
            StateSpec("queries", (2 * self.window, geometry.head_dim), geometry.dtype, heads="query"),
            StateSpec("places", (2 * self.window,), torch.int32, fill=-1),
        )

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        g, size = layer.geometry, layer.max_seq_len
        if not size:
            return
        last, standing = self._last_queries(q, layer)
        queries, places = last[:, self.window :], standing[:, self.window :]
        pooled = ops.window_scores(
            queries, places, layer.k_pages, layer.page_table, layer.seq_lens, max_seq_len=size, sm_scale=g.sm_scale,
            kernel=self.kernel, pool=self.pool, reduce=self.reduce,
        )  # fmt: skip
        seen = torch.zeros(len(places), 1, size + 1, dtype=torch.bool, device=q.device)
        seen.scatter_(-1, places.masked_fill(places < 0, size).unsqueeze(1), True)
        rest = torch.where(seen[..., :size], _WINDOW, _GENERATED)
        layer.update_state("score", torch.where(pooled == -torch.inf, rest, pooled))
        layer.update_state("queries", last.transpose(1, 2))
        layer.update_state("places", standing.unsqueeze(1).expand(-1, g.num_kv_heads, -1))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        score = layer.state("score")
        tokens = torch.arange(layer.max_seq_len, device=q.device)
        # A score is at most w. If there is not even room for what is always kept, the newest of it are.
        priority = torch.where(score < 0, self.window + 1 + tokens, score)
        priority = priority.masked_fill(tokens >= layer.seq_lens[:, None, None], -torch.inf)
        return Selection.top(priority, budget.tokens, capacity=budget.capacity, granularity=1)

    def _last_queries(self, q: torch.Tensor, layer: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last 2w queries observed, `[b, 2w, Hq, d]`, and where they stand, `[b, 2w]`; -1 for none.

        Those of earlier steps count unless their token has been cut off since: its place is then empty, or holds a
        generated token.
        """
        w, steps = 2 * self.window, q.shape[1]
        old, places = layer.state("queries").transpose(1, 2), layer.state("places")[:, 0].long()
        first = (layer.seq_lens - layer.new_tokens)[:, None]
        known = layer.state("score")[:, 0].gather(1, places.clamp(0, layer.max_seq_len - 1)) != _GENERATED
        places = places.masked_fill(~known, -1)
        # Of the new queries only as many can matter.
        which = layer.new_tokens.long()[:, None] + torch.arange(-w, 0, device=q.device)
        taken = which.clamp(0, max(0, steps - 1))
        new = q.gather(1, taken[..., None, None].expand(-1, -1, *q.shape[2:]))
        candidates = torch.cat([places, torch.where(which >= 0, first + which, -1)], dim=1)
        order = (candidates >= 0).to(torch.int8).argsort(dim=1, stable=True)[:, w:]
        both = torch.cat([old, new], dim=1)
        return both.gather(1, order[..., None, None].expand(-1, -1, *q.shape[2:])), candidates.gather(1, order)
