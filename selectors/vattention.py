"""vAttention: what matters most by another selector, and a sample of the rest, as large as a promise asks for
(Desai et al., arXiv 2510.05688; xAlg-ai/sparse-attention-hub).

Attended to for sure (E) are sinks, the newest tokens and what `base` selects. Of the n other tokens b are drawn evenly,
and each counts n/b times: `log_weight` is log(n/b). Their number comes from a first sample of b0 tokens: with its
standard deviation s of exp(logit), and the estimate D of the softmax's denominator that E and the sample give,

    b = (z n s / (epsilon D))^2,   z = Phi^-1(1 - delta/2),   b0 <= b <= n

so that the denominator is off by more than epsilon, as a share, with probability delta at most, as far as the central
limit theorem holds. The query heads of a group share one sample, of the size that the neediest head asks for.

Kept is what `base` keeps. Logits of E and of the first sample are those of the 4-bit keys: they set the size
of the sample, never a weight.

What the official code does differently: z is Phi^-1(1 - delta), so that the promise is one-sided; logits are exact;
tokens are drawn with replacement; the first sample, of 2 tokens at least, is from everything between the ends, the
chosen tokens too; each query head draws for itself; there is no budget. Here a sample ends at the budget, which may
break the promise: weights stay right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, MetadataSpec, Selection, Selector, StateSpec, draws, ops
from twilight.checks import check_positive
from twilight.ends import ends
from twilight.ops.quantize import shadow_bytes
from twilight.registry import create_selector

_LEAST = 32
"""Tokens of the first sample at least: from fewer, a standard deviation says little, and the promise would be empty."""

_FIRST, _SECOND = 1, 2
"""The two draws of a step. The second is a new one: a sample whose size depends on itself is biased."""


@dataclass
class VAttention(Selector):
    """Propose what `base` does with its share of the budget, and a weighted sample of the rest.

    Attributes:
        base: name of the selector that finds the heavy tokens.
        base_options: its parameters; on the command line ``+selector.base_options.NAME=VALUE``.
        heavy: its share of the budget, after both ends; the sample may take what is left.
        epsilon: relative error of the denominator that is allowed.
        delta: how often it may be larger.
        base_rate: size of the first sample, as a share of the tokens that it is drawn from.
        sinks: tokens from the start that are always proposed.
        local: newest tokens that are always proposed.
        seed: of the draws.
    """

    name: ClassVar[str] = "vattention"
    paper: ClassVar[str] = "vAttention: Verified Sparse Attention, arXiv 2510.05688"

    base: str = "quest"
    base_options: dict[str, Any] = field(default_factory=dict)
    heavy: float = 0.5
    epsilon: float = 0.1
    delta: float = 0.1
    base_rate: float = 0.02
    sinks: int = 128
    local: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive("local", self.local)
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")
        for name in ("heavy", "epsilon", "delta", "base_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")
        if self.base == self.name:
            raise ValueError(f"base: expected another selector than '{self.name}'")
        self._base = create_selector(self.base, **self.base_options)
        self._z = NormalDist().inv_cdf(1 - self.delta / 2)

    def contract(self) -> Contract:
        return Contract(dense=False, chunks=self._base.contract().chunks, weighted=True)

    def prepare(self, geometry: Geometry) -> None:
        self._base.prepare(geometry)

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        return self._base.metadata(geometry)

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        return self._base.summarize(keys, valid, layer)

    def label_channels(self, layer: int) -> torch.Tensor:
        return self._base.label_channels(layer)

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return self._base.state(geometry)

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        self._base.observe(q, layer)

    def finish(
        self, q: torch.Tensor, layer: LayerCache, kept: Selection, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # It is shown what was attended to; what it would make of the rest, the sample stands for already.
        self._base.finish(q, layer, kept, out, lse)
        return out, lse

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        n = layer.max_seq_len
        sure, most = self._sure(q, layer, budget)
        tokens = torch.arange(n, device=q.device)
        rest = (tokens < layer.seq_lens[:, None, None]) & ~sure
        left = rest.sum(-1)
        sample = self._sample_size(q, layer, sure, rest, most)
        chosen = torch.minimum(sample, (budget.tokens - sure.sum(-1)).clamp(min=0))

        counts = sure.sum(-1) + chosen
        scores = self._order(layer, rest, _SECOND).masked_fill(sure, torch.inf)
        selection = Selection.top(scores, counts, capacity=max(budget.capacity, most), granularity=1)
        weight = (left.clamp(min=1) / chosen.clamp(min=1)).log().unsqueeze(-1)
        weight = weight.masked_fill(sure.gather(-1, selection.indices.long()), 0).float()
        weight = weight.repeat_interleave(layer.geometry.group_size, dim=1)
        return Selection(selection.indices, selection.lengths, 1, weight)

    def bytes_per_token(self, geometry: Geometry) -> float:
        """Return what `base` reads, and the first sample. The 4-bit keys of E count where the pruner reads them."""
        shadow = shadow_bytes(geometry.page_size, geometry.head_dim) / geometry.page_size
        return self._base.bytes_per_token(geometry) + self.base_rate * shadow

    def _sure(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> tuple[torch.Tensor, int]:
        """Return `[b, Hkv, n]` bool, the tokens to attend to in any case, and how many a row has at most."""
        page, n = layer.geometry.page_size, layer.max_seq_len
        both = ends(budget, layer.seq_lens, n, sinks=self.sinks, local=self.local)
        share = (self.heavy * (budget.tokens - both.sum(-1))).floor().clamp(min=0).to(torch.int32)
        # Whole pages, where there is one: a base that selects pages rounds up.
        share = torch.where(share >= page, share // page * page, share)
        found = self._base.select(q, layer, Budget(share.clamp(min=1), max(1, int(self.heavy * budget.capacity))))
        if found.log_weight is not None:
            raise ValueError(f"base: '{self.base}' weights its tokens, which a sample of the rest cannot be added to")
        positions, valid = found.positions(layer.seq_lens)
        valid = valid & (share >= found.granularity).unsqueeze(-1)
        # What is not valid is sent to a place behind the last token.
        heavy = both.new_zeros((*both.shape[:2], n + 1))
        heavy = heavy.scatter(-1, positions.masked_fill(~valid, n), True)[..., :n]
        return both | heavy, min(n, positions.shape[-1] + self.sinks + self.local)

    def _order(self, layer: LayerCache, rest: torch.Tensor, draw: int) -> torch.Tensor:
        """Return `[b, Hkv, n]` float64: the rest in random order, `-inf` elsewhere."""
        tokens, heads = (torch.arange(size, device=rest.device) for size in (rest.shape[-1], rest.shape[1]))
        step = layer.seq_lens[:, None, None]
        order = draws.uniform(self.seed, draw, layer.index, heads[:, None], step, tokens)
        return order.masked_fill(~rest, -torch.inf)

    def _sample_size(
        self, q: torch.Tensor, layer: LayerCache, sure: torch.Tensor, rest: torch.Tensor, most: int
    ) -> torch.Tensor:
        """Return `[b, Hkv]` int64: b, of the query head that asks for most."""
        g, left, fixed = layer.geometry, rest.sum(-1), sure.sum(-1)
        first = torch.minimum((left * self.base_rate).ceil().clamp(min=_LEAST), left.double()).long()
        # One list of both: E, and the first sample.
        scores = self._order(layer, rest, _FIRST).masked_fill(sure, torch.inf)
        capacity = most + max(_LEAST, int(self.base_rate * layer.max_seq_len) + 1)
        both = Selection.top(scores, fixed + first, capacity=capacity, granularity=1)
        logits = ops.estimate_scores(
            q, layer.shadow, layer.page_table, layer.seq_lens, both, page_size=g.page_size, sm_scale=g.sm_scale
        ).double()
        # -inf past a row's end; an empty row has no maximum, and no rest.
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        weights = (logits - top).exp().unflatten(1, (g.num_kv_heads, -1))
        known = sure.gather(-1, both.indices.long()).unsqueeze(2)
        drawn = (both.counted().unsqueeze(2) & ~known).double()

        size = first.clamp(min=2)[..., None].double()
        n = left[..., None].double()
        mean = (weights * drawn).sum(-1) / size
        variance = (((weights - mean.unsqueeze(-1)) * drawn) ** 2).sum(-1) / (size - 1)
        denominator = (weights * known).sum(-1) + n * mean
        wanted = (self._z * n / (self.epsilon * denominator)) ** 2 * variance
        # NaN, from a NaN in the sequence, asks for everything: what is wrong shows.
        wanted = wanted.nan_to_num(torch.inf, torch.inf).ceil().amax(2)
        return torch.minimum(wanted.clamp(min=first.double()), left.double()).long()
