"""The cache that `Handle.cache()` makes: paged, but for sliding windows, whose layers are transformers' own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from twilight.attention import TwilightAttention
from twilight.cache import PagedKVCache
from twilight.geometry import Geometry
from twilight.graph import StaticCache
from twilight.layer_cache import LayerCache

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
        if self.owner.static is None:
            self.columns += key_states.shape[-2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        # transformers 4.57 passes the positions of the new tokens instead of their number.
        new = query_length.shape[0] if isinstance(query_length, torch.Tensor) else query_length
        return self.get_seq_length() + new, 0

    def get_seq_length(self, *args: Any) -> int:
        return self.columns if self.owner.joining is None else 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.owner.check_eager()
        self.columns = 0
        self.owner.forget(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.owner.select_rows(self, lambda rows: rows[beam_idx.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.owner.select_rows(self, lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.owner.select_rows(self, lambda rows: rows[indices.to(rows.device)])

    def crop(self, amount: int) -> None:
        self.owner.check_eager()
        removed = -amount if amount < 0 else 0 if _CROP_REMOVES else max(0, self.columns - amount)
        removed = min(removed, self.columns)
        self.columns -= removed
        self.owner.crop(self, removed)


class TwilightCache(Cache):
    """A transformers cache over one `PagedKVCache`.

    Args:
        layers: transformers' own layer caches, one a layer; they stay where there is a sliding window.
        sparse: numbers of the layers that attend sparsely.
        geometry: sizes; type and device are taken from the first keys that arrive.
        attention: selector, pruner and budget, whose metadata and state are kept.
        announce: called with each layer that is about to attend, and its new keys.
        max_new_tokens: tokens that a sequence is expected to gain: room for them is made together with the prompt's. A
            page's by default; the pool doubles when it is full.

    Attributes:
        paged: the pages, from the first token on.
        real: `[b, columns]` bool, which columns of the batch hold tokens, not padding.
        static: the same pages with room reserved, while steps run over shapes that do not change; see `reserve`.
        joining: the row that a prompt is being written into, if any; see `join`.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        sparse: Sequence[int],
        geometry: Geometry,
        attention: TwilightAttention,
        announce: Callable[[TwilightLayer, torch.Tensor], None],
        max_new_tokens: int | None = None,
    ) -> None:
        self._geometry = geometry
        self._attention = attention
        sliding = [getattr(own, "is_sliding", False) for own in layers]
        self._dense = tuple(i for i in range(len(layers)) if i not in sparse and not sliding[i])
        self._slots = {index: slot for slot, index in enumerate((*sparse, *self._dense))}
        self._first = min(self._slots, default=0)
        self.announce = announce
        self.max_new_tokens = geometry.page_size if max_new_tokens is None else max_new_tokens
        self.forget_all()
        self._paged_layers = {index: TwilightLayer(self, index) for index in self._slots}
        super().__init__(layers=[self._paged_layers.get(i, own) for i, own in enumerate(layers)])

    def forget_all(self) -> None:
        """Be as new, but for transformers' own layers."""
        self.paged: PagedKVCache | None = None
        self.real = torch.empty(0, 0, dtype=torch.bool)
        self.static: StaticCache | None = None
        self.joining: int | None = None
        self.failed = False
        self._steps = 0
        self._moved = False
        self._absent: set[int] = set()
        self._counts: list[int] = []
        self._order: torch.Tensor | None = None

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

    def reserve(self, steps: int) -> StaticCache:
        """Reserve pages for the next `steps` tokens of every sequence.

        Until `release`, layers append to and read `static`, and nothing but steps of one token, `join` and `leave` may
        happen to the cache. After each step, `advance`.
        """
        self.check_eager()
        self._check_whole()
        if self.paged is None:
            raise ValueError("past_key_values: the cache is empty; run the prompt through the model first")
        self.static = StaticCache(self.paged, self.paged.max_seq_len + steps, steps)
        self.static.set_active([row for row in range(self.num_rows) if row not in self._absent])
        return self.static

    def static_layer(self, layer: TwilightLayer) -> LayerCache:
        """Return the pages of a layer, room reserved."""
        assert self.static is not None
        return cast(LayerCache, self.static.layers[self._slots[layer.index]])  # serves wherever one does

    def advance(self) -> None:
        """Note that a step over `static` is done: the batch is a column longer."""
        self._steps += 1
        for layer in self._paged_layers.values():
            layer.columns += 1

    def release(self) -> None:
        """Hand back the pages that were not needed; the cache goes on as usual."""
        if self.static is None:
            return
        static, self.static = self.static, None
        static.release()
        if self._moved:
            # Rows that left and joined have lengths of their own: as if padded on the left.
            columns = max(static.lengths)
            self.real = torch.arange(columns) >= columns - torch.tensor(static.lengths)[:, None]
        else:
            self.real = torch.cat([self.real, torch.ones(self.num_rows, self._steps, dtype=torch.bool)], dim=1)
        self._steps = 0
        for layer in self._paged_layers.values():
            layer.columns = self.real.shape[1]

    def leave(self, row: int) -> None:
        """Forget a row of `static`."""
        assert self.static is not None
        self.static.free(row)
        self._absent.add(row)
        self._moved = True

    @contextlib.contextmanager
    def join(self, row: int) -> Iterator[None]:
        """Meanwhile, what the model is given is the prompt of an empty row of `static`."""
        assert self.static is not None
        self.joining = row
        try:
            yield
        finally:
            self.joining = None
        self._absent.discard(row)
        self.static.set_active([*self.static.active, row])

    def for_one_row(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """Spell the prompt of the row that joins out for `StaticLayer.append`: `[1, Hkv, n, d]` to `[b, n, Hkv, d]`."""
        rows = self.num_rows
        k, v = (part.transpose(1, 2).expand(rows, -1, -1, -1) for part in (k, v))
        return k, v, [k.shape[1] if row == self.joining else 0 for row in range(rows)]

    def select_rows(self, layer: TwilightLayer, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reorder, repeat or drop sequences: `choose` is given the row numbers and returns those to be.

        Every layer is told; the pages are shared, so the first one acts.
        """
        self.check_eager()
        if layer.index == self._first and self.paged is not None:
            rows = choose(torch.arange(self.paged.num_rows)).tolist()
            self.paged.select_rows(rows)
            self._absent = set()
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

    @contextlib.contextmanager
    def branch(self, repeats: int = 1) -> Iterator[None]:
        """Meanwhile each sequence stands `repeats` times in the batch, and may go on; afterwards all is as before.

        Tokens are taken back, and so is what their queries have added to the state that selector and budget keep, which
        `crop` leaves. Rows share the pages that they have in common. After an error the cache is of no more use.
        """
        self.check_eager()
        if self.paged is None:
            raise ValueError("past_key_values: the cache is empty; run the prompt through the model first")
        rows, columns, saved = self.num_rows, self.get_seq_length(), self.paged.save_state()
        self.batch_repeat_interleave(repeats)
        yield
        self.check_eager()
        if repeats > 1:
            self.batch_select_indices(torch.arange(rows) * repeats)
        if self.get_seq_length() > columns:
            self.crop(columns - self.get_seq_length())
        self.paged.load_state(saved)

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
            self.forget_all()

    def check_eager(self) -> None:
        """Refuse what would change the pages under a step that is captured over them."""
        if self.static is not None:
            raise ValueError("past_key_values: steps of this cache are captured; close() what capture() returned first")

    def _check_whole(self) -> None:
        if self.failed or (self.paged is not None and self.paged.unfinished()):
            raise ValueError(
                "past_key_values: an earlier step with this cache failed halfway; its layers hold different tokens\n"
                "  start again with a fresh one: past_key_values=handle.cache()"
            )

    def _begin(self, layer: TwilightLayer, k: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Look at a step's padding, once for all layers: this is where it reaches the host."""
        rows, new = k.shape[0], k.shape[2]
        self.failed |= self.paged is not None and self.real.shape[1] + new != layer.columns
        self._check_whole()
        real = torch.ones(rows, new, dtype=torch.bool) if mask is None else mask[:, -new:].cpu()
        self._counts = real.sum(1).tolist()
        self._absent = set()  # every row is given a token
        ragged = min(self._counts) < new
        self._order = (~real).to(torch.int8).argsort(dim=1, stable=True).to(k.device) if ragged else None
        if self.paged is None:
            geometry = replace(self._geometry, dtype=k.dtype, device=k.device)
            attention = self._attention
            self.paged = PagedKVCache(
                geometry,
                num_rows=rows,
                num_pages=rows * -(-(new + self.max_new_tokens) // geometry.page_size),
                selector=attention.selector,
                pruner=attention.pruner,
                budget=attention.budget,
                growable=True,
                dense_layers=self._dense,
            )
            self.real = torch.empty(rows, 0, dtype=torch.bool)
        elif self.paged.num_rows != rows:
            raise ValueError(f"past_key_values: the cache holds {self.paged.num_rows} sequences, the batch has {rows}")
        self.real = torch.cat([self.real, real], dim=1)
