"""NSA, natively trained sparse attention: blocks chosen by compressed attention (Yuan et al., arXiv 2502.11089).

Every `stride` tokens a block of `block` tokens is complete, and phi makes one key and one value of it. At a step

    out = g_cmp Attn(q, K~, V~) + g_slc Attn(q, selected blocks) + g_win Attn(q, newest `window` tokens)     (section 3)

with a softmax for each branch. The weights of the compressed branch, p, score the blocks to select from, added up over
the group (indices from 0; p is 0 out of range):

    p_slc[j] = sum over m < l'/d, n < l/d of p[(l'/d)(j + 1) - 1 - m - n]

A kv head selects `num_blocks` of `selected` tokens: the first, the newest two, and the best of the others.

`select` makes this list, `finish` adds the other branches, if the model has handed over its gates; a pruner prunes the
selected branch only. Without gates the selected branch is all there is, which any model can run; the training-free
method with a budget is `block_mean`. The model calls, in each layer and step,

    layer.append(k, v)
    selector.gate(layer, gates)             # [b, Hq, 3]: compressed, selected, window
    out, _ = attention.attend(q, layer)     # of a prompt: selector.observe(q, layer)

and attends to its prompt by itself. In the paper each branch has keys and values of its own: two more caches then, for
the compressed and the window branch. phi is the mean of a block, or an MLP whose weights are in a file; for another,
override `compress`.

Kept is a key and a value for every `stride` tokens: 2 d/16 numbers a token of a kv head, 32 bytes at d = 128 in bf16,
beside the caches of branches that have their own. The budget is not looked at, as a model is
trained with its number of blocks. Stats count the selected branch and the compressed tokens, not the window.

What fla-org/native-sparse-attention does differently: block, stride and selected block are all 64 tokens, phi is the
mean, the branches share K and V, only the current block is forced in, by a score of 1 for each query head, and groups
have 16 query heads or more, in powers of two. Its gates are the sigmoid of a linear layer, the paper's of an MLP; here
they come from the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from twilight import Budget, Contract, Geometry, LayerCache, Selection, Selector, StateSpec, ops
from twilight.checks import check_positive, check_tensor
from twilight.ops.paging import gather_tokens

_BLOCKS = 1024
"""Blocks compressed at a time: 16 MB of keys a kv head at 32 tokens of 128."""


@dataclass
class NSA(Selector):
    """Propose the blocks that attention over compressed keys points at.

    Attributes:
        block: l, tokens that phi compresses; a multiple of `stride`.
        stride: d, tokens from one compressed block to the next.
        selected: l', tokens of a selected block; a multiple of `stride`, at least `block`.
        num_blocks: n, blocks selected, those that are forced in counted.
        window: w, newest tokens of the window branch.
        weights: file of phi's weights (safetensors): for every layer N, ``layers.N.k.`` and ``layers.N.v.`` with
            `position [l, d]`, `weight1 [hidden, l*d]`, `bias1`, `weight2 [d, hidden]`, `bias2`, a ReLU between them.
            None is the mean.
    """

    name: ClassVar[str] = "nsa"
    paper: ClassVar[str] = "Native Sparse Attention, arXiv 2502.11089"

    block: int = 32
    stride: int = 16
    selected: int = 64
    num_blocks: int = 16
    window: int = 512
    weights: str | None = None
    _phi: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("block", "stride", "selected", "num_blocks", "window"):
            check_positive(name, getattr(self, name))
        for name in ("block", "selected"):
            if getattr(self, name) % self.stride:
                raise ValueError(f"{name}: expected a multiple of stride={self.stride}, got {getattr(self, name)}")
        if self.selected < self.block:
            raise ValueError(f"selected: expected at least block={self.block}, got {self.selected}")
        if self.num_blocks < 3:
            raise ValueError(f"num_blocks: expected at least the 3 that are forced in, got {self.num_blocks}")

    def contract(self) -> Contract:
        return Contract(budget=False, dense=False)

    def prepare(self, geometry: Geometry) -> None:
        if self.weights is None:
            return
        from safetensors.torch import load_file

        loaded = load_file(self.weights)
        wide = self.block * geometry.head_dim
        for layer in geometry.layer_ids:
            for which in ("k", "v"):
                part = {
                    key: f"layers.{layer}.{which}.{key}" for key in ("position", "weight1", "bias1", "weight2", "bias2")
                }
                missing = [key for key in part.values() if key not in loaded]
                if missing:
                    raise ValueError(f"weights: '{self.weights}' has no {missing[0]}; it needs one for every layer")
                hidden = len(loaded[part["bias1"]])
                shapes = ((self.block, geometry.head_dim), (hidden, wide), (hidden,), (geometry.head_dim, hidden))
                for key, shape in zip(part.values(), (*shapes, (geometry.head_dim,)), strict=True):
                    check_tensor(key, loaded[key], shape)
        self._phi = {key: value.float().to(geometry.device) for key, value in loaded.items()}

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return tuple(
            StateSpec(f"compressed_{which}", (geometry.head_dim,), geometry.dtype, per="token", stride=self.stride)
            for which in ("k", "v")
        )

    def gate(
        self,
        layer: LayerCache,
        gates: torch.Tensor,
        *,
        compressed: LayerCache | None = None,
        window: LayerCache | None = None,
    ) -> None:
        """Hand over a layer's gates, between `append` and `attend` or `observe`.

        Args:
            layer: the layer's cache, with keys and values of the selected branch.
            gates: `[b, Hq, 3]` for `attend`, of the compressed, the selected and the window branch.
            compressed, window: caches with those branches' own keys and values of the same tokens.
        """
        g = layer.geometry
        check_tensor("gates", gates, (layer.seq_lens.shape[0], g.num_q_heads, 3))
        layer.scratch["nsa", layer.index] = (gates, compressed or layer, window or layer)

    def compress(self, blocks: torch.Tensor, which: str, layer: int) -> torch.Tensor:
        """Return phi of some blocks.

        Args:
            blocks: `[b, Hkv, m, l, d]` float32, keys as they are cached, or values.
            which: "k" or "v".
            layer: the model's number of the layer.

        Returns:
            `[b, Hkv, m, d]`.
        """
        if self.weights is None:
            return blocks.mean(3)
        position, weight1, bias1, weight2, bias2 = (
            self._phi[f"layers.{layer}.{which}.{key}"] for key in ("position", "weight1", "bias1", "weight2", "bias2")
        )
        return torch.relu((blocks + position).flatten(3) @ weight1.T + bias1) @ weight2.T + bias2

    def observe(self, q: torch.Tensor, layer: LayerCache) -> None:
        self._add(layer, q.shape[1])

    def select(self, q: torch.Tensor, layer: LayerCache, budget: Budget) -> Selection:
        g, lens = layer.geometry, layer.seq_lens[:, None, None]
        self._add(layer, 1)
        keys, values = layer.state("compressed_k").float(), layer.state("compressed_v").float()
        logits = q.float().unflatten(1, (g.num_kv_heads, -1)) @ keys.mT * g.sm_scale
        hidden = torch.arange(keys.shape[2], device=q.device) * self.stride + self.block > lens.unsqueeze(-1)
        # Where no block is complete yet the branch gives zeros, and scores nothing.
        weights = torch.softmax(logits.masked_fill(hidden, -1e30), dim=-1).masked_fill(hidden, 0)
        layer.scratch["nsa_compressed", layer.index] = (weights @ values).flatten(1, 2)

        scores = self._block_scores(weights.sum(2), -(-layer.max_seq_len // self.selected))
        blocks = torch.arange(scores.shape[-1], device=q.device)
        current = (lens - 1) // self.selected
        forced = (blocks == 0) | ((blocks <= current) & (blocks > current - 2))
        scores = scores.masked_fill(forced, torch.inf).masked_fill(blocks > current, -torch.inf)
        counts = (layer.seq_lens + self.selected - 1) // self.selected
        counts = counts.clamp(max=self.num_blocks)[:, None].expand(-1, g.num_kv_heads)
        chosen = Selection.top(scores, counts, capacity=self.num_blocks, granularity=self.selected)
        # In pages where a block is whole pages, in tokens otherwise.
        unit = g.page_size if self.selected % g.page_size == 0 else 1
        steps = torch.arange(self.selected // unit, device=q.device)
        indices = (chosen.indices.unsqueeze(-1) * (self.selected // unit) + steps).flatten(2)
        counted = chosen.counted().repeat_interleave(len(steps), dim=-1) & (indices * unit < lens)
        return Selection.compact(indices, counted, granularity=unit)

    def finish(
        self, q: torch.Tensor, layer: LayerCache, kept: Selection, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the other branches, if there are gates. `lse` stays that of the selected branch."""
        if ("nsa", layer.index) not in layer.scratch:
            return out, lse
        g, lens = layer.geometry, layer.seq_lens
        gates, _, window = layer.scratch["nsa", layer.index]
        slots = torch.arange(min(self.window, layer.max_seq_len), dtype=torch.int32, device=q.device)
        counts = lens.clamp(max=self.window)
        tokens = slots + (lens - counts).unsqueeze(-1)
        newest = Selection(
            tokens[:, None].expand(-1, g.num_kv_heads, -1).contiguous(),
            counts[:, None].expand(-1, g.num_kv_heads).contiguous(),
        )
        near, _ = ops.sparse_attention(
            q, window.k_pages, window.v_pages, window.page_table, lens, newest, sm_scale=g.sm_scale
        )  # fmt: skip
        branches = torch.stack([layer.scratch["nsa_compressed", layer.index], out.float(), near.float()], dim=-1)
        return (branches * gates.float().unsqueeze(2)).sum(-1).to(out.dtype), lse

    def _block_scores(self, weights: torch.Tensor, blocks: int) -> torch.Tensor:
        """Return `[b, Hkv, blocks]`, p_slc of `[b, Hkv, compressed blocks]` weights."""
        per, reach = self.selected // self.stride, self.block // self.stride
        # How often i = per (j + 1) - 1 - m - n comes up, from i = per j + 1 - reach on: 1, 2, ..., 2, 1. Made on the
        # device, where a CUDA graph may be under way.
        steps = torch.arange(per + reach - 1, device=weights.device)
        times = torch.minimum(steps + 1, per + reach - 1 - steps).clamp(max=min(per, reach))
        padded = torch.nn.functional.pad(weights, (reach - 1, per * blocks - weights.shape[-1]))
        return (padded.unfold(-1, len(times), per) * times).sum(-1)

    def _add(self, layer: LayerCache, steps: int) -> None:
        """Compress the blocks that the newest tokens, of each row as many as the step has appended, complete."""
        old = (layer.seq_lens - layer.new_tokens).long()[:, None]
        first = torch.div(old - self.block, self.stride, rounding_mode="floor").clamp(min=-1) + 1
        entries = first + torch.arange(steps // self.stride + 1, device=old.device)
        entries = entries.masked_fill(entries * self.stride + self.block > layer.seq_lens[:, None], -1)
        _, source, _ = layer.scratch.get(("nsa", layer.index), (None, layer, None))
        for part in entries.split(_BLOCKS, dim=1):
            for which, pages in (("k", source.k_pages), ("v", source.v_pages)):
                blocks = self._blocks(pages, part, source)
                layer.update_state(f"compressed_{which}", self.compress(blocks, which, layer.index), part)

    def _blocks(self, pages: torch.Tensor, entries: torch.Tensor, layer: LayerCache) -> torch.Tensor:
        """Return `[b, Hkv, m, l, d]` float32: the tokens of compressed blocks `[b, m]`, anything where it is -1."""
        tokens = entries.clamp(min=0).unsqueeze(-1) * self.stride + torch.arange(self.block, device=entries.device)
        # A row shorter than a block has no token there: any will do.
        tokens = tokens.minimum(layer.seq_lens.long()[:, None, None].clamp(min=1) - 1)
        positions = tokens.flatten(1)[:, None].expand(-1, pages.shape[1], -1)
        found = gather_tokens(pages, positions, layer.page_table, layer.geometry.page_size)
        return found.unflatten(2, tokens.shape[1:]).float()
