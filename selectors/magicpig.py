"""MagicPIG: tokens drawn by locality-sensitive hashing (Chen et al., arXiv 2410.16179; Infini-AI-Lab/MagicPIG).

A key is hashed L times to K bits, the signs of K random projections. A query draws the keys that it meets in at least
two of the L tables. At an angle t between query and key, one table is met with probability u = (1 - t/pi)^K, so that

    w = P(drawn) = 1 - (1 - u)^L - L u (1 - u)^(L-1)                                        (section 4.2)

and attention over the drawn tokens, with each exp(logit) divided by its w, has numerator and denominator right on
average: `log_weight` is -log w. Sinks and the newest tokens are attended to exactly. Each query head hashes for itself:
a token that only another head of its group has drawn is hidden from it.

Keys are centred by the mean of the prompt's keys between its two ends, which changes no softmax and spreads the angles.
The mean belongs to a row, and so do the codes, L of K bits a token, in 16-bit integers. They are compared one by one,
2 L bytes a token, more than its key in bf16 at L = 150; the official code looks buckets up in CPU memory, 4 L bytes a
token and some more for their bounds. So this shows what the method keeps, not what it saves.

What the official code does differently: it adds 1e-4 to w (`epsilon`), which bounds a weight by e^9.2 and biases the
estimate down; its window is the last 64 tokens of the prompt, generated tokens are never hashed and all attended to,
here the window moves on and what leaves it can be drawn; there is no budget, here a draw that is larger than the budget
is thinned at random, and weighted for that; layers 0, 16, 32, ... are dense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, StateSpec, draws, ops
from twilight.checks import check_positive
from twilight.ends import ends
from twilight.ops.paging import gather_tokens

_PROJECTED = 1 << 25
"""Projections held at a time, 256 MB: of one sequence, 2800 tokens of 8 kv heads at K L = 1500."""

_COMPARED = 1 << 28
"""Codes compared at a time, 256 MB: of one sequence, 56k tokens for 32 query heads at L = 150."""


@dataclass
class MagicPIG(Selector):
    """Propose the two ends of the sequence, and what hashing draws in between.

    Attributes:
        bits: K, bits of a code, 1 to 15. More bits draw fewer tokens.
        tables: L, codes of a token, at least 2. More tables draw more.
        sinks: tokens from the start that are always proposed.
        local: newest tokens that are always proposed.
        epsilon: added to the probability of being drawn; 1e-4 in the official code.
        seed: of the projections, and of what thins a draw.
    """

    name: ClassVar[str] = "magicpig"
    paper: ClassVar[str] = "MagicPIG: LSH Sampling for Efficient LLM Generation, arXiv 2410.16179"

    bits: int = 10
    tables: int = 150
    sinks: int = 4
    local: int = 64
    epsilon: float = 0.0
    seed: int = 0
    _projection: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= check_positive("bits", self.bits) <= 15:
            raise ValueError(f"bits: expected at most 15, got {self.bits}")
        if check_positive("tables", self.tables) < 2:
            raise ValueError("tables: expected at least 2, got 1")
        check_positive("local", self.local)
        if self.sinks < 0 or not 0 <= self.epsilon < 1:
            raise ValueError(f"sinks, epsilon: expected 0 or more, got {self.sinks} and {self.epsilon}")

    def contract(self) -> Contract:
        return Contract(dense=False, chunks=False, weighted=True)

    def prepare(self, geometry: Geometry) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (geometry.head_dim, self.tables * self.bits)
        # With 8 significant bits here, in the keys and in their centre, a product is exact in float64: a code does not
        # depend on how many tokens are hashed at once, nor on the device.
        self._projection = torch.randn(shape, generator=generator).bfloat16().double().to(geometry.device)

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return (
            StateSpec("centre", (geometry.head_dim,), torch.bfloat16),
            StateSpec("codes", (self.tables,), torch.int16, per="token"),
        )

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        if q.shape[1] <= self.local:
            # No row's prompt, but a short step: its tokens are hashed around the centre that there is.
            self._add(layer, q.shape[1])
            return
        # Whether it is a prompt each row says for itself: what becomes of a row must not depend on the others.
        prompt = (layer.new_tokens > self.local)[:, None]
        rows = q.shape[0] * layer.geometry.num_kv_heads
        block = max(1, _PROJECTED // (rows * self.tables * self.bits))
        chunks = torch.arange(layer.max_seq_len, device=q.device).split(block)
        # The centre is that of all tokens so far, whatever the chunks of the prompt: all are hashed anew.
        total = sum(self._keys(layer, chunk, middle=True).sum(2) for chunk in chunks)
        count = (layer.seq_lens - self.sinks - self.local).clamp(min=1)[:, None, None]
        layer.update_state("centre", torch.where(prompt[..., None], (total / count).bfloat16(), layer.state("centre")))
        centre = layer.state("centre").unsqueeze(2)
        codes = torch.cat([self._hash(self._keys(layer, chunk) - centre) for chunk in chunks], dim=2)
        # Tokens that a short step has added are hashed around the centre of their row, as in `_add`; those before stay.
        tokens = torch.arange(layer.max_seq_len, device=q.device)
        hashed = prompt | (tokens >= (layer.seq_lens - layer.new_tokens)[:, None])
        layer.update_state("codes", torch.where(hashed[:, None, :, None], codes, layer.state("codes")))

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, n, lens = layer.geometry, layer.max_seq_len, layer.seq_lens[:, None, None]
        self._add(layer, 1)
        exact = ends(budget, layer.seq_lens, n, sinks=self.sinks, local=self.local)
        tokens = torch.arange(n, device=q.device)
        drawn = self._met(q, layer) & ((tokens < lens) & ~exact).unsqueeze(2)
        union = drawn.any(2)

        heads = torch.arange(g.num_kv_heads, device=q.device)[:, None]
        order = draws.uniform(self.seed, layer.index, heads, lens, tokens).masked_fill(~union, -torch.inf)
        scores = order.masked_fill(exact, torch.inf)
        selection = Selection.top(scores, budget.tokens, capacity=budget.capacity, granularity=1)

        room = (budget.tokens - exact.sum(-1)).clamp(min=0)
        thinned = (room / union.sum(-1).clamp(min=1)).clamp(max=1).double()[:, :, None, None]
        index = selection.indices.long()
        keys = gather_tokens(layer.k_pages, index, layer.page_table, g.page_size).float()
        keys = keys - layer.state("centre").unsqueeze(2)
        grouped = q.float().unflatten(1, (g.num_kv_heads, -1))
        cosine = torch.nn.functional.normalize(grouped, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).mT
        share = (collision_probability(cosine.double(), self.bits, self.tables) + self.epsilon) * thinned
        hidden = ~drawn.gather(-1, index.unsqueeze(2).expand(-1, -1, g.group_size, -1))
        weight = -share.clamp(min=1e-30).log().masked_fill(hidden, torch.inf)
        weight = weight.masked_fill(exact.gather(-1, index).unsqueeze(2), 0)
        return Selection(selection.indices, selection.lengths, 1, weight.flatten(1, 2).float())

    def _add(self, layer: LayerCache, steps: int) -> None:
        """Hash the newest tokens, of each row as many as the step has appended."""
        entries = ops.new_positions(layer.seq_lens, layer.new_tokens, steps)
        keys = self._keys(layer, entries.clamp(min=0))
        layer.update_state("codes", self._hash(keys - layer.state("centre").unsqueeze(2)), entries)

    def _keys(self, layer: LayerCache, tokens: torch.Tensor, *, middle: bool = False) -> torch.Tensor:
        """Return `[b, Hkv, n, d]` float64 keys of `[n]` or `[b, n]` tokens; with `middle`, zeros at a row's ends."""
        g, lens = layer.geometry, layer.seq_lens[:, None]
        tokens = tokens.expand(len(lens), -1)
        positions = tokens.minimum(lens.clamp(min=1) - 1)[:, None].expand(-1, g.num_kv_heads, -1)
        keys = gather_tokens(layer.k_pages, positions, layer.page_table, g.page_size).double()
        inside = (tokens >= self.sinks) & (tokens < lens - self.local)
        return keys.masked_fill(~inside[:, None, :, None], 0) if middle else keys

    def _hash(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return `[..., L]` int16 codes of `[..., d]`."""
        signs = (vectors.double() @ self._projection > 0).unflatten(-1, (self.tables, self.bits))
        place = 2.0 ** torch.arange(self.bits, device=vectors.device)
        return (signs.float() @ place).to(torch.int16)

    def _met(self, q: torch.Tensor, layer: LayerCache) -> torch.Tensor:
        """Return `[b, Hkv, G, n]` bool: which keys each query head meets in at least two tables."""
        query = self._hash(q.unflatten(1, (layer.geometry.num_kv_heads, -1))).unsqueeze(3)
        block = max(1, _COMPARED // (q.shape[0] * q.shape[1] * self.tables))
        codes = layer.state("codes").split(block, dim=2)
        return torch.cat([(part.unsqueeze(2) == query).sum(-1) >= 2 for part in codes], dim=-1)


def collision_probability(cosine: torch.Tensor, bits: int, tables: int) -> torch.Tensor:
    """Return the probability that two vectors share a code in at least two tables.

    Args:
        cosine: `[...]` float64, the cosine of their angle; rounding may take it past 1. In float32 the difference below
            would lose all digits where the probability is small.
        bits: K.
        tables: L.
    """
    u = (1 - torch.acos(cosine.clamp(-1, 1)) / torch.pi) ** bits
    return (1 - (1 - u) ** (tables - 1) * (1 + (tables - 1) * u)).clamp(min=0)
