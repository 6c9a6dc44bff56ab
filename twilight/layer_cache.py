"""LayerCache: one layer's pages, what selector and pruner keep about them, and how tokens get there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from twilight import ops
from twilight.budget import Budget, UniformBudget
from twilight.checks import check_tensor
from twilight.geometry import Geometry
from twilight.ops.quantize import shadow_bytes
from twilight.ops.summaries import Summary
from twilight.selector import MetadataSpec, Selector, StateSpec
from twilight.state import RowState

if TYPE_CHECKING:
    from twilight.cache import PagedKVCache

_SUMMARIZE_PAGES = 4096
"""Pages handed to `Selector.summarize` at a time: 64k tokens, which bounds the copy of the keys that it reads."""


class LayerCache:
    """One layer's share of a `PagedKVCache`: what a selector and the operators read.

    Attributes:
        index: the model's number of the layer.
        k_pages, v_pages: `[pages, Hkv, P, d]`.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8, the 4-bit copy of the keys; see `twilight.ops.quantize`.
        dense: whether the layer is one of the cache's `dense_layers`: no shadow, `[pages, Hkv, 0]`, and no metadata.
    """

    def __init__(self, cache: PagedKVCache, index: int, *, dense: bool = False) -> None:
        self._cache = cache
        self.index = index
        self.dense = dense
        self._step = 0
        self._state = RowState((*self.state_specs, *self.budget_specs), cache.geometry, cache.num_rows)
        self._allocate(0, cache.table.num_pages + 1)

    def _allocate(self, used: int, pages: int) -> None:
        """Make room for `pages` pages, keeping the first `used`."""
        geometry, before = self.geometry, vars(self).get
        size, dim = geometry.page_size, geometry.head_dim
        self.k_pages = self._buffer(before("k_pages"), used, pages, (size, dim), geometry.dtype)
        self.v_pages = self._buffer(before("v_pages"), used, pages, (size, dim), geometry.dtype)
        shadow = 0 if self.dense else shadow_bytes(size, dim)
        self.shadow = self._buffer(before("shadow"), used, pages, (shadow,), torch.uint8)
        self._allocate_metadata(before("_metadata", {}), used, pages)

    def _buffer(
        self, old: torch.Tensor | None, used: int, pages: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        # Zeros, not empty: a masked slot is multiplied by a weight of 0, and 0 times a stray NaN is NaN.
        geometry = self.geometry
        new = torch.zeros((pages, geometry.num_kv_heads, *shape), dtype=dtype, device=geometry.device)
        if old is not None:
            new[:used] = old[:used]
        return new

    def _allocate_metadata(self, old: Mapping[str, torch.Tensor], used: int, pages: int) -> None:
        size = self.geometry.page_size
        self._metadata = {
            spec.name: self._buffer(
                old.get(spec.name), used, pages, (size, *spec.shape) if spec.per == "token" else spec.shape, spec.dtype
            )
            for spec in (*self.specs, *self.pruner_specs)
        }
        self._summary = self._kept_by_append()
        values = () if self.dense else tuple(self._metadata[spec.name] for spec in self._cache._kept_values)
        self._value_summary = Summary("mean", values) if values else None
        if self._value_summary is not None:
            self._value_summary.check(self.v_pages)

    def _kept_by_append(self) -> Summary | None:
        """Return the metadata that append brings up to date by itself."""
        cache = self._cache
        if self.dense or not cache._kept:
            return None
        rule = cache._kept[0].rule
        channels = cache.selector.label_channels(self.index) if rule == "label" else None
        summary = Summary(rule, tuple(self._metadata[spec.name] for spec in cache._kept), channels)
        summary.check(self.k_pages)
        # The kernel does not look: it would read beside the key.
        if channels is not None and not 0 <= int(channels.min()) <= int(channels.max()) < self.geometry.head_dim:
            raise ValueError(
                f"label_channels: expected channels from 0 to {self.geometry.head_dim - 1}, got {channels}"
            )
        return summary

    @property
    def _summarized(self) -> tuple[str, ...]:
        """Metadata that `append` leaves to `Selector.summarize` and `Pruner.summarize`."""
        return () if self.dense else self._cache._summarized

    @property
    def geometry(self) -> Geometry:
        """Sizes shared by all layers."""
        return self._cache.geometry

    @property
    def selector(self) -> Selector:
        """The selector whose metadata the cache keeps."""
        return self._cache.selector

    @property
    def specs(self) -> tuple[MetadataSpec, ...]:
        """What that metadata is."""
        return () if self.dense else self._cache.specs

    @property
    def state_specs(self) -> tuple[StateSpec, ...]:
        """What it keeps for each row."""
        return () if self.dense else self._cache.state_specs

    @property
    def budget_specs(self) -> tuple[StateSpec, ...]:
        """What the cache keeps for each row for a budget policy."""
        return () if self.dense else self._cache.budget_specs

    @property
    def pruner_specs(self) -> tuple[MetadataSpec, ...]:
        """The metadata that the cache keeps for a pruner."""
        return () if self.dense else self._cache.pruner_specs

    @property
    def page_table(self) -> torch.Tensor:
        """`[b, max_pages]` int32: the page of each logical page; padded with page 0, which belongs to nobody."""
        return self._cache.page_table

    @property
    def seq_lens(self) -> torch.Tensor:
        """`[b]` int32: tokens of each sequence, those of the current step included."""
        return self._cache.seq_lens

    @property
    def new_tokens(self) -> torch.Tensor:
        """`[b]` int32: tokens that the current step has appended to each sequence."""
        return self._cache.new_tokens

    @property
    def max_seq_len(self) -> int:
        """The longest sequence, known on the host."""
        return self._cache.max_seq_len

    @property
    def scratch(self) -> dict[str, Any]:
        """What one layer of a step leaves for the next ones. Empty when a step begins or rows have changed."""
        return self._cache.scratch

    @property
    def capacity(self) -> int | None:
        """Tokens that the pool can hold, or None if it grows without bound."""
        return self._cache.capacity

    def budget(self, policy: UniformBudget) -> Budget:
        """Return what `policy` gives each sequence and kv head of this layer now."""
        return policy.for_layer(self._cache._budget(policy), self)

    def metadata(self, name: str) -> torch.Tensor:
        """Return a tensor that selector or pruner declared: `[pages, Hkv, *shape]`, or `[pages, Hkv, P, *shape]`."""
        if name not in self._metadata:
            there = ", ".join(map(repr, self._metadata)) or "none"
            raise ValueError(
                f"metadata: this cache keeps no '{name}' (there is: {there}). "
                "Make it with PagedKVCache(..., selector=..., pruner=...) of the attention that decodes."
            )
        return self._metadata[name]

    def state(self, name: str) -> torch.Tensor:
        """Return a tensor that the selector declared for rows; `StateSpec` has its shape. Not to be written to."""
        return self._state.read(name, self.max_seq_len)

    def update_state(self, name: str, value: torch.Tensor, entries: torch.Tensor | None = None) -> None:
        """Replace what `state` returned, or some entries of it.

        Rows without new tokens, and entries past a row's end, stay as they are: what a step computes for rows that it
        does not concern is of no consequence. A step that is aborted takes its updates along.

        Args:
            name: which tensor.
            value: of the shape that `state` returned; `[b, H, m, *shape]` if `entries` are given.
            entries: `[b, m]` int64, which to replace, none of a row twice; -1 for nothing. The others are not touched,
                so that a step costs what it changes.
        """
        cache = self._cache
        # Rows that begin in this step have nothing to go back to: an aborted step empties them.
        undo = any(length > new for length, new in zip(cache.table.lengths, cache._pending, strict=False))
        self._state.write(
            name, value, self.seq_lens, self.new_tokens, self.max_seq_len, undo=undo, entries=entries
        )  # fmt: skip

    def append(self, k: torch.Tensor, v: torch.Tensor, new_tokens: Sequence[int] | None = None) -> None:
        """Add tokens to the sequences: K, V, the 4-bit copy and the metadata.

        The first layer that appends in a step makes room for all of them; each other layer then appends as many.

        Args:
            k, v: `[b, n, Hkv, d]`, or `[b, Hkv, d]` for one token a sequence; keys rotated.
            new_tokens: for each sequence, how many of its first n tokens are real; n by default.

        Raises:
            ValueError, TypeError: shapes, types or counts that do not fit.
            OutOfPagesError: no room. Either way the cache is as it was.
        """
        with self.appending(k, v, new_tokens):
            self.write(k, v)

    @contextmanager
    def appending(self, k: torch.Tensor, v: torch.Tensor, new_tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Do what `append` does but for writing the tokens, which is left to the block: `write`, or a kernel.

        Lengths and budgets are those after the step inside of it, and what it raises undoes the step.
        """
        geometry, rows = self.geometry, self._cache.num_rows
        steps = check_new("k", k, rows, geometry)
        check_tensor("v", v, k.shape, dtype=geometry.dtype, device=geometry.device)
        counts = [steps] * rows if new_tokens is None else list(new_tokens)
        if max(counts, default=0) > steps:
            raise ValueError(f"new_tokens: expected at most n={steps}, the tokens in k, got {max(counts)}")
        self._cache._begin(self, counts)
        try:
            yield
        except BaseException:
            # A plugin's `summarize` may raise anything: no layer keeps a token that another lacks.
            self._cache._abort(self)
            raise
        self._step = self._cache._step

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the tokens of a step that `appending` has begun, and bring all metadata up to date."""
        self._write(k, v, self.page_table, self.seq_lens, self.new_tokens)
        if self._summarized:
            self._summarize(*self._cache._touched(), self._summarized)

    def keeps_only(self, vectors: Sequence[torch.Tensor], values: Sequence[torch.Tensor] = ()) -> bool:
        """Return whether appending has no more to keep up to date than K, V, the 4-bit keys and these tensors.

        Args:
            vectors: bounds or means of the pages' keys in 8 bits, `(codes, params)`; or nothing.
            values: likewise, means of the pages' values.
        """
        if self.dense or self._summarized:
            return False
        for summary, tensors in ((self._summary, vectors), (self._value_summary, values)):
            kept = () if summary is None else summary.tensors
            if len(kept) != len(tensors) or any(one is not other for one, other in zip(kept, tensors, strict=True)):
                return False
            if summary is not None and (summary.rule == "label" or summary.bits != 8):
                return False
        return True

    def _write(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        new_tokens: torch.Tensor,
    ) -> None:
        if k.ndim == 3:
            k, v = k.unsqueeze(1), v.unsqueeze(1)
        ops.append(
            k, v, self.k_pages, self.v_pages, self.shadow, page_table, seq_lens, new_tokens,
            summary=self._summary, value_summary=self._value_summary,
        )  # fmt: skip

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for buffer in (self.k_pages, self.v_pages, self.shadow, *self._metadata.values()):
            buffer[target] = buffer[source]

    def _summarize(self, pages: torch.Tensor, valid: torch.Tensor, names: Sequence[str] | None = None) -> None:
        """Let selector and pruner compute the metadata of these pages, all of it or that of some names."""
        names = tuple(self._metadata) if names is None else names
        if not names:
            return
        for chunk in range(0, len(pages), _SUMMARIZE_PAGES):
            which, mask = pages[chunk : chunk + _SUMMARIZE_PAGES], valid[chunk : chunk + _SUMMARIZE_PAGES]
            for source, pages_of, specs in (
                (self._cache.selector, self.k_pages, self.specs),
                (self._cache.pruner, self.v_pages, self.pruner_specs),
            ):
                wanted = [spec.name for spec in specs if spec.name in names]
                if wanted:
                    held = pages_of[which].masked_fill(~mask[:, None, :, None], 0)
                    summary = source.summarize(held, mask, self.index)
                for name in wanted:
                    buffer = self._metadata[name]
                    buffer[which] = summary[name].to(buffer.dtype)


def check_new(name: str, new: torch.Tensor, rows: int, geometry: Geometry) -> int:
    """Check keys or values of a step, `[b, n, Hkv, d]` or `[b, Hkv, d]`, and return n."""
    single = isinstance(new, torch.Tensor) and new.ndim == 3
    shape = (rows, *(() if single else (None,)), geometry.num_kv_heads, geometry.head_dim)
    check_tensor(name, new, shape, dtype=geometry.dtype, device=geometry.device)
    return 1 if single else new.shape[1]
