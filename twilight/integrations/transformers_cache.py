"""The cache that `Handle.cache()` makes: paged where attention is sparse, transformers' own elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from twilight.attention import TwilightAttention
from twilight.cache import LayerCache, PagedKVCache
from twilight.geometry import Geometry

# transformers 5 calls crop with minus the tokens to remove, 4.57 with the length to keep (or minus the tokens).
_CROP_REMOVES = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


class TwilightLayer(CacheLayerMixin):
    """One layer of a `TwilightCache`.

    `update` hands the new keys and values back as they came. The attention function, which alone is given the padding
    mask, writes them into the pages: padding is dropped there, so that sequences are compact whatever the batch.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, owner: TwilightCache, index: int) -> None:
        super().__init__()
        self.owner = owner
        self.index = index
        self.columns = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.owner.announce(self, key_states)
        self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # transformers 4.57 passes the positions of the new tokens instead of their number.
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.columns + new, 0

    def get_seq_length(self, *args: Any) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.columns = 0
        self.owner.forget(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.owner.select_rows(self, lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.owner.select_rows(self, lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.owner.select_rows(self, lambda rows: rows[indices.to(rows.device)])

    def crop(self, amount: int) -> None:
        removed = -amount if amount < 0 else 0 if _CROP_REMOVES else max(0, self.columns - amount)
        removed = min(removed, self.columns)
        self.columns -= removed
        self.owner.crop(self, removed)


class TwilightCache(Cache):
    """A transformers cache over one `PagedKVCache`.

    Args:
        layers: transformers' own layer caches, one a layer; those named in `sparse` are replaced.
        sparse: numbers of the layers that attend sparsely.
        geometry: sizes; type and device are taken from the first keys that arrive.
        attention: selector, pruner and budget, whose metadata and state are kept.
        announce: called with each layer that is about to attend, and its new keys.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        sparse: Sequence[int],
        geometry: Geometry,
        attention: TwilightAttention,
        announce: Callable[[TwilightLayer, torch.Tensor], None],
    ) -> None:
        self._geometry = geometry
        self._attention = attention
        self._first = min(sparse, default=0)
        self._slots = {index: slot for slot, index in enumerate(sparse)}
        self.announce = announce
        self.paged: PagedKVCache | None = None
        self.real = torch.empty(0, 0, dtype=torch.bool)
        self._counts: list[int] = []
        self._order: torch.Tensor | None = None
        super().__init__(layers=[TwilightLayer(self, i) if i in self._slots else own for i, own in enumerate(layers)])

    @property
    def num_rows(self) -> int:
        """Sequences in the batch; 0 before the first token."""
        return 0 if self.paged is None else self.paged.num_rows

    def append(self, layer: TwilightLayer, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
        """Write a layer's new tokens into its pages, without those that are padding.

        Args:
            layer: the layer.
            k, v: `[b, Hkv, n, d]`.
            mask: `[b, columns]` bool, False at padding; None if there is none.

        Returns:
            How many tokens of each sequence are real. Their queries, likewise, come first after `compact`.
        """
        if layer.index == self._first:
            self._begin(layer, k, mask)
        self.page_cache(layer).append(
            self.compact(k).transpose(1, 2), self.compact(v).transpose(1, 2), new_tokens=self._counts
        )
        return self._counts

    def compact(self, heads: torch.Tensor) -> torch.Tensor:
        """Move each sequence's real tokens of this step to the front: `[b, heads, n, d]`."""
        if self._order is None:
            return heads
        return heads.gather(2, self._order[:, None, :, None].expand_as(heads))

    def restore(self, out: torch.Tensor) -> torch.Tensor:
        """Undo `compact` on an output `[b, heads, n, d]`."""
        if self._order is None:
            return out
        return torch.empty_like(out).scatter_(2, self._order[:, None, :, None].expand_as(out), out)

    def page_cache(self, layer: TwilightLayer) -> LayerCache:
        """Return the pages of a layer."""
        assert self.paged is not None
        return self.paged.layers[self._slots[layer.index]]

    def select_rows(self, layer: TwilightLayer, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or drop sequences: `choose` is given the row numbers and returns those to be.

        Every layer is told; the pages are shared, so the first one acts.
        """
        if layer.index == self._first and self.paged is not None:
            rows = choose(torch.arange(self.paged.num_rows)).tolist()
            self.paged.select_rows(rows)
            self.real = self.real[rows]

    def crop(self, layer: TwilightLayer | int, removed: int = 0) -> None:
        """Remove the last columns: of all layers if called by a user, of the pages if called by a layer."""
        if not isinstance(layer, TwilightLayer):
            super().crop(layer)
            return
        if layer.index == self._first and self.paged is not None and removed:
            real = self.real[:, self.real.shape[1] - removed :].sum(1).tolist()
            for row, tokens in enumerate(real):
                self.paged.truncate(row, self.paged.table.lengths[row] - tokens)
            self.real = self.real[:, : self.real.shape[1] - removed]

    def reset(self) -> None:
        """Empty the cache, to be used for another batch."""
        super().reset()
        for own in self.layers:
            if isinstance(own, DynamicLayer):
                # transformers 4.57 zeroes a growing layer and keeps its length.
                own.keys = own.values = None
                own.is_initialized = False

    def forget(self, layer: TwilightLayer) -> None:
        """Empty the pages when the first layer is reset."""
        if layer.index == self._first:
            self.paged = None
            self.real = torch.empty(0, 0, dtype=torch.bool)

    def _begin(self, layer: TwilightLayer, k: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Look at a step's padding, once for all layers: this is where it reaches the host."""
        rows, new = k.shape[0], k.shape[2]
        if self.paged is not None and (self.real.shape[1] + new != layer.columns or self.paged.unfinished()):
            raise ValueError(
                "past_key_values: an earlier step with this cache failed halfway; its layers hold different tokens\n"
                "  start again with a fresh one: past_key_values=handle.cache()"
            )
        real = torch.ones(rows, new, dtype=torch.bool) if mask is None else mask[:, -new:].cpu()
        self._counts = real.sum(1).tolist()
        ragged = min(self._counts) < new
        self._order = (~real).to(torch.int8).argsort(dim=1, stable=True).to(k.device) if ragged else None
        if self.paged is None:
            geometry = replace(self._geometry, dtype=k.dtype, device=k.device)
            # Room for the prompt and a page a row to go on with; the pool doubles from there.
            pages = rows * (-(-new // geometry.page_size) + 1)
            attention = self._attention
            self.paged = PagedKVCache(
                geometry,
                num_rows=rows,
                num_pages=pages,
                selector=attention.selector,
                pruner=attention.pruner,
                budget=attention.budget,
                growable=True,
            )
            self.real = torch.empty(rows, 0, dtype=torch.bool)
        elif self.paged.num_rows != rows:
            raise ValueError(f"past_key_values: the cache holds {self.paged.num_rows} sequences, the batch has {rows}")
        self.real = torch.cat([self.real, real], dim=1)
