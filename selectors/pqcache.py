"""PQCache: tokens ranked by product-quantised keys (Zhang et al., arXiv 2407.12820; HugoZHL/PQCache).

A key is cut into m parts, and each part is replaced by the nearest of 2^bits centroids, made by k-means from the
prompt's keys, a codebook for each part, kv head, layer and sequence. A query's dot products with all centroids are
m 2^bits numbers, and the estimate of q.k is the sum of m of them. Softmaxes of the query heads of a group are added up,
and the best tokens are attended to, beside the sinks and the newest tokens, which have a share of the budget.

A token costs m bytes; a codebook 2^bits d numbers a kv head and sequence. A generated token is coded by the codebooks
of its prompt when it arrives.

What the official code does differently: k-means runs on the CPU beside prefill, from random keys, as long as there is
time, 3 to 300 rounds; codes are int64; sinks come on top of the budget; the newest tokens' window keeps the size that
the prompt gave it; a prompt of fewer tokens than centroids is attended to densely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import (
    Budget,
    Contract,
    Geometry,
    LayerCache,
    Selection,
    Selector,
    StateSpec,
    check_reduce,
    combine_group,
    ops,
)
from twilight.checks import check_positive
from twilight.kmeans import assign, kmeans
from twilight.ops.dense_attention import gather_dense
from twilight.ops.paging import gather_tokens


@dataclass
class PQCache(Selector):
    """Propose the two ends of the sequence, and the tokens whose quantised keys score highest.

    Attributes:
        parts: m, parts of a key; divides head_dim.
        bits: of a code, 1 to 8.
        iterations: rounds of k-means.
        sinks: tokens from the start that are always proposed.
        recent: share of the budget, after the sinks, for the newest tokens.
        reduce: how the query heads of a group are combined: "softmax", "sum" or "max"; see `combine_group`.
    """

    name: ClassVar[str] = "pqcache"
    paper: ClassVar[str] = "PQCache: Product Quantization-based KVCache for Long Context LLM Inference, 2407.12820"

    parts: int = 2
    bits: int = 6
    iterations: int = 10
    sinks: int = 32
    recent: float = 0.5
    reduce: str = "softmax"

    def __post_init__(self) -> None:
        check_positive("parts", self.parts)
        check_positive("iterations", self.iterations)
        check_reduce(self.reduce)
        if check_positive("bits", self.bits) > 8:
            raise ValueError(f"bits: expected at most 8, got {self.bits}")
        if self.sinks < 0:
            raise ValueError(f"sinks: expected at least 0, got {self.sinks}")
        if not 0 <= self.recent < 1:
            raise ValueError(f"recent: expected a share from 0 to below 1, got {self.recent}")

    def contract(self) -> Contract:
        return Contract(chunks=False)

    def prepare(self, geometry: Geometry) -> None:
        if geometry.head_dim % self.parts:
            raise ValueError(f"parts: expected a divisor of head_dim={geometry.head_dim}, got {self.parts}")

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return (
            StateSpec("codebooks", (self.parts, 2**self.bits, geometry.head_dim // self.parts), torch.float32),
            StateSpec("trained", (), torch.bool),
            StateSpec("codes", (self.parts,), torch.uint8, per="token"),
        )

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        if q.shape[1] <= 2**self.bits:
            # No row's prompt, or one with fewer tokens than centroids.
            self._add(layer, q.shape[1])
            return
        # Whether it is a prompt each row says for itself: what becomes of a row must not depend on the others.
        prompt = (layer.new_tokens > 2**self.bits)[:, None]
        # All tokens so far, whatever the chunks of the prompt.
        lens, n = layer.seq_lens[:, None, None], layer.max_seq_len
        keys = self._split(gather_dense(layer.k_pages, layer.page_table, layer.seq_lens, n))
        tokens = torch.arange(n, device=q.device)
        valid = ((tokens >= self.sinks) & (tokens < lens)).unsqueeze(1).expand(keys.shape[:-1])
        count = (layer.seq_lens - self.sinks).clamp(min=0)
        starts = self.sinks + torch.arange(2**self.bits, device=q.device) * count[:, None].long() // 2**self.bits
        starts = starts.clamp(max=n - 1)[:, None, None].expand(*keys.shape[:3], -1)
        codebooks = kmeans(keys, valid, starts, self.iterations)
        layer.update_state("codebooks", torch.where(prompt[..., None, None, None], codebooks, layer.state("codebooks")))
        layer.update_state("trained", torch.where(prompt, (count > 0)[:, None], layer.state("trained")))
        # Tokens that a short step has added are coded by the codebooks of their row, as in `_add`; those before stay.
        coded = prompt | (tokens >= (layer.seq_lens - layer.new_tokens)[:, None])
        codes = assign(keys, layer.state("codebooks")).mT
        layer.update_state("codes", torch.where(coded[:, None, :, None], codes, layer.state("codes")))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, n, lens = layer.geometry, layer.max_seq_len, layer.seq_lens[:, None, None]
        self._add(layer, 1)
        newest = ((budget.tokens - self.sinks) * self.recent).long().clamp(min=1)
        first = (budget.tokens - newest).clamp(max=self.sinks)
        tokens = torch.arange(n, device=q.device)
        ends = (tokens < first.unsqueeze(-1)) | (tokens >= lens - newest.unsqueeze(-1))

        # [b, Hkv, G, m, centroids]
        grouped = q.float().unflatten(1, (g.num_kv_heads, -1)).unflatten(-1, (self.parts, -1))
        table = torch.einsum("bhgmd,bhmcd->bhgmc", grouped, layer.state("codebooks"))
        codes = layer.state("codes").long().mT.unsqueeze(2).expand(-1, -1, g.group_size, -1, -1)
        scores = table.gather(-1, codes).sum(3).flatten(1, 2)
        # Ends are not among those that a softmax is over.
        out = (ends | (tokens >= lens)).repeat_interleave(g.group_size, dim=1)
        combined = combine_group(scores.masked_fill(out, -torch.inf), g.num_kv_heads, self.reduce, scale=g.sm_scale)
        # A row whose prompt was never seen has no codebooks: the newest tokens, then.
        combined = torch.where(layer.state("trained").unsqueeze(-1), combined, tokens.float())
        combined = combined.masked_fill(ends, torch.inf).masked_fill(tokens >= lens, -torch.inf)
        return Selection.top(combined, budget.tokens, capacity=budget.capacity, granularity=1)

    def _add(self, layer: LayerCache, steps: int) -> None:
        """Code the newest tokens, of each row as many as the step has appended."""
        g = layer.geometry
        entries = ops.new_positions(layer.seq_lens, layer.new_tokens, steps)
        positions = entries.clamp(min=0)[:, None].expand(-1, g.num_kv_heads, -1)
        keys = self._split(gather_tokens(layer.k_pages, positions, layer.page_table, g.page_size))
        layer.update_state("codes", assign(keys, layer.state("codebooks")).mT, entries)

    def _split(self, keys: torch.Tensor) -> torch.Tensor:
        """Return `[b, Hkv, m, n, d/m]` of `[b, Hkv, n, d]`."""
        return keys.unflatten(-1, (self.parts, -1)).transpose(2, 3)
