"""Decode steps inside a CUDA graph: a cache whose tensors stay where they are, and the graph that is replayed over it.

    static = StaticCache(cache, max_seq_len=32768)      # pages for every row's future are reserved now
    graph = DecodeGraph(static, lambda: model_step(static, inputs))
    inputs.copy_(...); graph.replay(); graph.output     # as often as there is room
    static.release()                                    # the cache goes on as usual

A step appends one token to every active row. Its lengths live on the device and grow there; the host only counts the
steps, which is how it knows the lengths without asking. Shapes and grids come from `max_seq_len`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from twilight.budget import Budget, UniformBudget
from twilight.cache import PagedKVCache
from twilight.checks import check_positive, check_tensor
from twilight.errors import CaptureError
from twilight.layer_cache import LayerCache, check_new
from twilight.ops.append import touched_pages

Output = TypeVar("Output")


class StaticLayer:
    """A layer of a `StaticCache`. Serves wherever a `LayerCache` does; what is not here is the layer's own."""

    def __init__(self, static: StaticCache, layer: LayerCache) -> None:
        self._static = static
        self._layer = layer
        self._step = 0
        self._unwritten = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property
    def page_table(self) -> torch.Tensor:
        """`[b, max_pages]` int32, all pages up to `max_seq_len` in it."""
        return self._static.page_table

    @property
    def seq_lens(self) -> torch.Tensor:
        """`[b]` int32: tokens of each sequence, those of the current step included."""
        return self._static.seq_lens

    @property
    def new_tokens(self) -> torch.Tensor:
        """`[b]` int32: tokens that the current step has appended to each sequence."""
        return self._static._added

    @property
    def max_seq_len(self) -> int:
        """How long a sequence may become."""
        return self._static.max_seq_len

    @property
    def scratch(self) -> dict[str, Any]:
        """What one layer of a step leaves for the next ones. Empty when a step begins or rows have changed."""
        return self._static.scratch

    def state(self, name: str) -> torch.Tensor:
        """Return a tensor that the selector declared for rows, as `LayerCache.state` does."""
        return self._layer._state.read(name, self.max_seq_len)

    def update_state(self, name: str, value: torch.Tensor, entries: torch.Tensor | None = None) -> None:
        """Replace what `state` returned, in place, as `LayerCache.update_state` does."""
        self._layer._state.write(
            name, value, self.seq_lens, self.new_tokens, self.max_seq_len, undo=False, entries=entries
        )  # fmt: skip

    def budget(self, policy: UniformBudget) -> Budget:
        """Return what `policy` gives each row of this layer at this step."""
        return policy.for_layer(self._static._budget(policy), self)  # type: ignore[arg-type]

    def append(self, k: torch.Tensor, v: torch.Tensor, new_tokens: Sequence[int] | None = None) -> None:
        """Add tokens, as `LayerCache.append` does; by default one to every active row, which can be captured."""
        with self.appending(k, v, new_tokens):
            self.write(k, v)

    @contextmanager
    def appending(self, k: torch.Tensor, v: torch.Tensor, new_tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Do what `append` does but for writing the tokens, as `LayerCache.appending` does.

        But a step is not undone here, where lengths grow on the device: what the block raises finds the tokens written.
        """
        static, geometry = self._static, self._layer.geometry
        steps = check_new("k", k, len(static.lengths), geometry)
        check_tensor("v", v, k.shape, dtype=geometry.dtype, device=geometry.device)
        if new_tokens is None and steps != 1:
            new_tokens = [steps * int(active) for active in static._active]
        if self._step == static._step:
            static._begin(new_tokens)
        self._step, self._unwritten = static._step, True
        try:
            yield
        except BaseException:
            if self._unwritten:
                self.write(k, v)
            raise

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write the tokens of a step that `appending` has begun, and bring all metadata up to date."""
        layer, added = self._layer, self.new_tokens
        self._unwritten = False
        layer._write(k, v, self.page_table, self.seq_lens, added)
        if layer._summarized:
            steps = 1 if k.ndim == 3 else k.shape[1]
            size = layer.geometry.page_size
            pages, filled = touched_pages(self.page_table, self.seq_lens, added, steps, size)
            layer._summarize(pages, filled, layer._summarized)


class StaticCache:
    """A `PagedKVCache` with every row's future pages reserved, so that a step changes no shape and no address.

    The cache itself must be left alone until `release`. Tokens that rows share are copied before they are written to.

    Args:
        cache: what to continue.
        max_seq_len: how long a row may become.
        max_new_tokens: how many tokens a row may gain, where short rows should not be given the pages of long ones.

    Raises:
        OutOfPagesError: no room for that many pages; nothing has changed.
    """

    def __init__(self, cache: PagedKVCache, max_seq_len: int, max_new_tokens: int | None = None) -> None:
        table = cache.table
        check_positive("max_seq_len", max_seq_len)
        self.lengths = list(table.lengths)
        """Tokens of each row, known on the host."""
        if max(self.lengths) > max_seq_len:
            raise ValueError(f"max_seq_len: expected at least {max(self.lengths)}, the longest row, got {max_seq_len}")
        most = max_seq_len if max_new_tokens is None else check_positive("max_new_tokens", max_new_tokens)
        cache._check_between_steps("pages are reserved")
        room = [min(max_seq_len - length, most) for length in self.lengths]
        self.limits = [length + new for length, new in zip(self.lengths, room, strict=True)]
        """Tokens that each row has pages for."""
        if cache._growable:
            cache._grow(table.pages_needed(room) - table.num_free)
        cache._copy_pages(table.extend(room))
        cache._upload()
        cache._reserve_state(max_seq_len)
        device = cache.geometry.device
        self.max_seq_len = max_seq_len
        self.geometry = cache.geometry
        self.page_table = cache.page_table.clone()
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        self.layers = [StaticLayer(self, layer) for layer in cache.layers]
        self._cache = cache
        self._active = [length > 0 for length in self.lengths]
        self._ones = torch.tensor(self._active, dtype=torch.int32, device=device)
        self._added = self._ones
        self._step = 0
        self._forget_step()

    @property
    def active(self) -> list[int]:
        """The rows that a step appends to."""
        return [row for row, on in enumerate(self._active) if on]

    def set_active(self, rows: Sequence[int]) -> None:
        """Say which rows a step appends to; by default those that held tokens at first. Not during a capture."""
        self._active = [row in set(rows) for row in range(len(self.lengths))]
        self._ones.copy_(torch.tensor(self._active, dtype=torch.int32))

    def free(self, row: int) -> None:
        """Forget a row's tokens; its pages stay reserved for whoever takes its place."""
        self.lengths[row] = 0
        self.set_active([other for other in self.active if other != row])
        self.seq_lens[row] = 0
        self._forget_step()
        for layer in self._cache.layers:
            layer._state.free(row)

    def release(self) -> PagedKVCache:
        """Hand the pages that were not needed back, and return the cache."""
        for row, length in enumerate(self.lengths):
            self._cache.table.truncate(row, length)
        self._cache._upload()
        return self._cache

    def _check_room(self, added: Sequence[int]) -> None:
        for row, (length, limit, new) in enumerate(zip(self.lengths, self.limits, added, strict=True)):
            if length + new > limit:
                raise ValueError(f"row {row} holds {length} of the {limit} tokens that it may: no room for {new}")

    def _advance(self, added: Sequence[int]) -> None:
        self._check_room(added)
        self.lengths = [length + new for length, new in zip(self.lengths, added, strict=True)]

    def _begin(self, new_tokens: Sequence[int] | None) -> None:
        if new_tokens is None:
            self._added = self._ones
        else:
            self._added = torch.tensor(list(new_tokens), dtype=torch.int32, device=self.geometry.device)
        if not self._capturing():
            self._advance([int(active) for active in self._active] if new_tokens is None else new_tokens)
        self._step += 1
        self._forget_step()
        self.seq_lens.add_(self._added)

    def _forget_step(self) -> None:
        self._budgets: dict[UniformBudget, Budget] = {}
        self.scratch: dict[str, Any] = {}

    def _budget(self, policy: UniformBudget) -> Budget:
        if policy not in self._budgets:
            g = self.geometry
            self._budgets[policy] = policy.resolve(
                self.seq_lens, g.num_kv_heads, max_seq_len=self.max_seq_len, page_size=g.page_size
            )
        return self._budgets[policy]

    def _capturing(self) -> bool:
        return self.geometry.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DecodeGraph(Generic[Output]):
    """A step over a `StaticCache`, captured once.

    Args:
        static: the cache that the step appends to and reads.
        step: does one step, from inputs that lie in tensors of its own to an output that it returns. It must append in
            every layer. It is called twice before the capture, with no row active: to compile what it needs, and to see
            whether it can be captured.

    Attributes:
        output: what `step` returned; its tensors hold the result of the latest replay.

    Raises:
        CaptureError: the step waits for the GPU, and where. A capture that fails halfway would leave torch's random
            numbers unusable, so it is not tried.
    """

    def __init__(self, static: StaticCache, step: Callable[[], Output]) -> None:
        self._static = static
        self._graph = torch.cuda.CUDAGraph()
        active = static.active
        stream = torch.cuda.Stream(static.geometry.device)
        stream.wait_stream(torch.cuda.current_stream(static.geometry.device))
        with torch.cuda.stream(stream):
            static.set_active([])
            try:
                step()
                waits = _waits(step)
            finally:
                static.set_active(active)
        torch.cuda.current_stream(static.geometry.device).wait_stream(stream)
        torch.cuda.synchronize(static.geometry.device)
        if waits is not None:
            raise CaptureError(f"the step waits for the GPU, which a CUDA graph cannot: {waits}")
        with torch.cuda.graph(self._graph):
            self.output = step()
        static._forget_step()  # what the capture found out is the graph's own

    def replay(self) -> Output:
        """Do a step. One token is appended to every active row.

        Raises:
            ValueError: a row has reached `max_seq_len`; nothing has changed.
        """
        self._static._advance([int(active) for active in self._static._active])
        self._graph.replay()
        return self.output


def _waits(step: Callable[[], object]) -> str | None:
    """Run a step, and return the place where it waited for the GPU (`.item()`, a copy to or from the host), if any."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing CUDA operation" in str(warning.message):
            return f"{warning.filename}:{warning.lineno}"
    return None
