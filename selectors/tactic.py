"""Tactic: clusters in order of their centroids, up to the mass that a fitted curve says (Zhu et al., arXiv 2502.12216).

The prompt's keys are clustered by k-means, `cluster_size` tokens a cluster on average, for each kv head and layer. Each
query head ranks clusters by q.centroid, which puts all tokens in order, x = 1 to n. Over that order exp(logit) falls
about like a/x + b. Two short windows of true logits, around x1 = n/10 and x2 = 6n/10, with means y1 and y2, say how:

    a = (y1 - y2) / (1/x1 - 1/x2),   b = y1 - a / x1                                        (section 4)

The first 2 % are outliers and summed exactly. Proposed are the first tokens whose sum reaches `mass` of the total,
joined over the group, and the newest tokens.

A token costs its share of a centroid, d/cluster_size numbers, 4 bytes for its cluster, and 2.5 % of a key for each
query head, which reads true logits of its own.

What is different here: the widths of the windows are in the paper's algorithm 1, which was not at hand; 0.25 % of the
order each, 16 tokens at least, make up the 2.5 % of keys that the paper says are read. Where the curve is negative it
counts as 0. Centroids start from keys that lie evenly in the prompt, not from random ones. The paper attends to all
generated tokens until it clusters again, every 2048 steps; here a generated token joins the nearest cluster, which
stays where it is, and is in the order once it leaves the newest `local`. A union larger than the budget is cut, worst
ranks first. A row whose prompt was no longer than `local` has no clusters, and nothing to order tokens by: it proposes
the newest of its budget, until as many tokens as make a prompt come at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, StateSpec, ops
from twilight.checks import check_p, check_positive
from twilight.ends import ends
from twilight.kmeans import assign, kmeans
from twilight.ops.dense_attention import gather_dense
from twilight.ops.paging import gather_tokens

_HEAD, _WINDOW, _NARROWEST = 0.02, 0.0025, 16
_NEAR, _FAR = 0.1, 0.6


@dataclass
class Tactic(Selector):
    """Propose the tokens of the best clusters, as many as reach the mass.

    Attributes:
        mass: share of the attention mass that each query head is to reach; 0.5 to 0.9 in the paper.
        cluster_size: tokens of a cluster, on average; 16 in the paper's tests of accuracy.
        iterations: rounds of k-means.
        local: newest tokens that are always proposed.
    """

    name: ClassVar[str] = "tactic"
    paper: ClassVar[str] = "Tactic: Adaptive Sparse Attention with Clustering and Distribution Fitting, 2502.12216"

    mass: float = 0.9
    cluster_size: int = 32
    iterations: int = 10
    local: int = 64

    def __post_init__(self) -> None:
        check_p(self.mass)
        check_positive("cluster_size", self.cluster_size)
        check_positive("iterations", self.iterations)
        check_positive("local", self.local)

    def contract(self) -> Contract:
        return Contract(dense=False, chunks=False)

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return (
            StateSpec("centroids", (geometry.head_dim,), geometry.dtype, per="token", stride=self.cluster_size),
            StateSpec("clusters", (), torch.int32),
            StateSpec("cluster", (), torch.int32, per="token"),
        )

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        if q.shape[1] <= self.local:
            # No row's prompt, but a short step.
            self._add(layer, q.shape[1])
            return
        # Whether it is a prompt each row says for itself: what becomes of a row must not depend on the others.
        prompt = (layer.new_tokens > self.local)[:, None]
        # All tokens so far, whatever the chunks of the prompt.
        n, heads = layer.max_seq_len, layer.geometry.num_kv_heads
        keys = gather_dense(layer.k_pages, layer.page_table, layer.seq_lens, n)
        valid = (torch.arange(n, device=q.device) < layer.seq_lens[:, None])[:, None].expand(-1, heads, -1)
        clusters = (layer.seq_lens + self.cluster_size - 1) // self.cluster_size
        slots = torch.arange(-(-n // self.cluster_size), device=q.device)
        exists = (slots < clusters[:, None])[:, None].expand(-1, heads, -1)
        starts = slots * layer.seq_lens[:, None].long() // clusters[:, None].clamp(min=1)
        starts = starts.clamp(max=n - 1)[:, None].expand(-1, heads, -1)
        centroids = kmeans(keys, valid, starts, self.iterations, exists)
        layer.update_state("centroids", torch.where(prompt[..., None, None], centroids, layer.state("centroids")))
        layer.update_state("clusters", torch.where(prompt, clusters[:, None], layer.state("clusters")))
        # Tokens that a short step has added join the clusters of their row, as in `_add`; those before stay.
        joins = prompt | (torch.arange(n, device=q.device) >= (layer.seq_lens - layer.new_tokens)[:, None])
        layer.update_state("cluster", torch.where(joins[:, None], self._nearest(keys, layer), layer.state("cluster")))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, n, lens = layer.geometry, layer.max_seq_len, layer.seq_lens[:, None, None]
        self._add(layer, 1)
        newest = ends(budget, layer.seq_lens, n, sinks=0, local=self.local)
        tokens = torch.arange(n, device=q.device)
        listed = ((tokens < lens) & ~newest).repeat_interleave(g.group_size, dim=1)
        order, rank = self._order(q, layer, listed)
        kept = self._reach_mass(q, layer, order, listed.sum(-1, keepdim=True))
        # Of a token, the best rank that it has among the query heads that keep it.
        best = torch.where(listed & (rank < kept), -rank.double(), -torch.inf)
        scores = best.unflatten(1, (g.num_kv_heads, -1)).amax(2)
        # Without clusters all tokens would be of the first, and its order their age: the newest tokens, then.
        age = tokens.double().masked_fill(tokens >= lens, -torch.inf)
        scores = torch.where(layer.state("clusters").unsqueeze(-1) > 0, scores, age).masked_fill(newest, torch.inf)
        return Selection.top(scores, budget.tokens, capacity=budget.capacity, granularity=1)

    def bytes_per_token(self, geometry: Geometry) -> float:
        key = geometry.head_dim * geometry.dtype.itemsize
        return key / self.cluster_size + 4 + (_HEAD + 2 * _WINDOW) * key * geometry.group_size

    def _nearest(self, keys: torch.Tensor, layer: LayerCache) -> torch.Tensor:
        centroids = layer.state("centroids")
        slots = torch.arange(centroids.shape[2], device=keys.device)
        return assign(keys, centroids, slots < layer.state("clusters").unsqueeze(-1))

    def _add(self, layer: LayerCache, steps: int) -> None:
        """Let the newest tokens, of each row as many as the step has appended, join their nearest clusters."""
        g = layer.geometry
        entries = ops.new_positions(layer.seq_lens, layer.new_tokens, steps)
        positions = entries.clamp(min=0)[:, None].expand(-1, g.num_kv_heads, -1)
        keys = gather_tokens(layer.k_pages, positions, layer.page_table, g.page_size)
        layer.update_state("cluster", self._nearest(keys, layer), entries)

    def _order(self, q: torch.Tensor, layer: LayerCache, listed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the listed tokens of each query head in order, and each token's place: `[b, Hq, n]` int64 both."""
        g = layer.geometry
        scores = q.float().unflatten(1, (g.num_kv_heads, -1)) @ layer.state("centroids").float().mT
        slots = torch.arange(scores.shape[-1], device=q.device)
        scores = scores.masked_fill(slots >= layer.state("clusters")[..., None, None], -torch.inf)
        places = scores.flatten(1, 2).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        clusters = layer.state("cluster").long().repeat_interleave(g.group_size, dim=1)
        order = places.gather(-1, clusters).masked_fill(~listed, scores.shape[-1]).argsort(dim=-1, stable=True)
        return order, order.argsort(-1)

    def _reach_mass(self, q: torch.Tensor, layer: LayerCache, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return `[b, Hq, 1]` int64: how many tokens of the order reach the mass."""
        n = order.shape[-1]
        exact = (count * _HEAD).ceil().long()
        width = torch.minimum((count * _WINDOW).ceil().clamp(min=_NARROWEST).long(), count)
        slots = torch.arange(max(_NARROWEST, int(_WINDOW * n) + 1), device=order.device)
        near, far = (
            ((count * share).long() - width // 2).minimum(count - width).clamp(min=0) for share in (_NEAR, _FAR)
        )
        head = torch.arange(int(_HEAD * n) + 1, device=order.device).expand(*order.shape[:2], -1)
        places = torch.cat([head, near + slots, far + slots], dim=-1).clamp(max=n - 1)
        logits = self._logits(q, layer, order.gather(-1, places))
        counted = torch.cat([head < exact, (slots < width).expand(*width.shape[:2], -1).repeat(1, 1, 2)], dim=-1)
        logits = logits.masked_fill(~counted, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -torch.inf, 0)).exp()
        outliers, *windows = weights.split([head.shape[-1], len(slots), len(slots)], dim=-1)
        y1, y2 = (window.sum(-1, keepdim=True) / width.clamp(min=1) for window in windows)

        x1, x2 = ((count.double() * share).clamp(min=1) for share in (_NEAR, _FAR))
        gap = (1 / x1 - 1 / x2).clamp(min=1e-12)
        a = (y1 - y2) / gap
        b = y1 - a / x1
        x = torch.arange(1, n + 1, device=order.device, dtype=torch.float64)
        curve = (a / x + b).clamp(min=0)
        curve = torch.where(x <= exact, torch.nn.functional.pad(outliers, (0, n - outliers.shape[-1])), curve)
        summed = curve.masked_fill(x > count, 0).cumsum(-1)
        return ((summed < self.mass * summed[..., -1:]).sum(-1, keepdim=True) + 1).minimum(count)

    def _logits(self, q: torch.Tensor, layer: LayerCache, tokens: torch.Tensor) -> torch.Tensor:
        """Return the true logits of each query head's own tokens: `[b, Hq, m]` float64."""
        g = layer.geometry
        grouped = tokens.unflatten(1, (g.num_kv_heads, -1))
        keys = gather_tokens(layer.k_pages, grouped.flatten(2), layer.page_table, g.page_size)
        keys = keys.unflatten(2, grouped.shape[2:]).flatten(1, 2)
        return (keys.float() @ q.float().unsqueeze(-1)).squeeze(-1).double() * g.sm_scale
