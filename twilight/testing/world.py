"""Caches, prompts and steps that selectors are tried on, and what is looked at in every selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from twilight import ops
from twilight.budget import Budget, UniformBudget
from twilight.cache import PagedKVCache
from twilight.geometry import Geometry
from twilight.selection import Selection
from twilight.selector import Selector

LENGTHS = (0, 14, 15, 30, 47, 130)
"""Tokens of the rows before the first step. With its token: a row of one, full pages, pages begun, pages but one."""


class Failure(AssertionError):
    """A selector does not do what is expected of it."""


class Skip(Exception):
    """A case that cannot be tried here, or does not concern this selector."""


@dataclass
class Subject:
    """What is tested.

    Attributes:
        make: returns a new instance.
        num_kv_heads, head_dim, num_layers, page_size: of the caches that it is tried on.
        seen: exceptions to its contract that have been met: they may be declared.
    """

    make: Callable[[], Selector]
    num_kv_heads: int = 2
    head_dim: int = 64
    num_layers: int = 2
    page_size: int = 16
    seen: set[str] = field(default_factory=set)

    def geometry(self, group: int = 4, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Geometry:
        """Return sizes with `group` query heads a kv head."""
        sizes = (self.num_layers, group * self.num_kv_heads, self.num_kv_heads, self.head_dim, self.page_size)
        # As models have it, so that methods that turn keys can be tried.
        half = self.head_dim // 2
        frequencies = tuple(10000.0 ** (-i / half) for i in range(half))
        return Geometry(*sizes, dtype=dtype, device=torch.device(device), inv_freq=frequencies)


class Tokens:
    """Random keys, values and queries of one row, in every layer: the same for the same seed, whatever the batch."""

    def __init__(self, geometry: Geometry, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            shape = (geometry.num_layers, count, heads, geometry.head_dim)
            return torch.randn(shape, generator=generator).to(geometry.device, geometry.dtype)

        self.k, self.v = draw(geometry.num_kv_heads), draw(geometry.num_kv_heads)
        self.q = draw(geometry.num_q_heads)


class World:
    """A cache of some rows, and the tokens that they are made of.

    Args:
        selector: whose cache it is.
        geometry: its sizes.
        lengths: tokens of each row's prompt.
        steps: tokens that each row may gain.
        chunk: tokens of a prompt that are appended at once; all by default.
        seeds: of each row's tokens; its number by default.
    """

    def __init__(
        self,
        selector: Selector,
        geometry: Geometry,
        lengths: Sequence[int] = LENGTHS,
        steps: int = 4,
        chunk: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        self.selector, self.geometry = selector, geometry
        self.rows = [
            Tokens(geometry, length + steps, seed)
            for length, seed in zip(lengths, range(len(lengths)) if seeds is None else seeds, strict=True)
        ]
        self.done = [0] * len(lengths)
        pages = sum(-(-(length + steps) // geometry.page_size) for length in lengths)
        self.cache = PagedKVCache(
            geometry, num_rows=len(lengths), num_pages=pages, selector=selector, growable=True
        )  # fmt: skip
        self.layers: Sequence[Any] = self.cache.layers
        self.around: Callable[[Step], AbstractContextManager[Any]] = lambda step: nullcontext()
        longest = max(lengths, default=0)
        for start in range(0, longest, chunk or max(1, longest)):
            self.prompt([max(0, min(length - start, chunk or longest)) for length in lengths])

    def _next(self, which: str, counts: Sequence[int], layer: int) -> torch.Tensor:
        parts = [
            getattr(row, which)[layer, at : at + n] for row, at, n in zip(self.rows, self.done, counts, strict=True)
        ]
        # What is padding must not matter: NaN in what is stored, something in queries, which may be multiplied by 0.
        fill = 7.0 if which == "q" else torch.nan
        padded = parts[0].new_full((len(parts), max(counts), *parts[0].shape[1:]), fill)
        for row, part in enumerate(parts):
            padded[row, : len(part)] = part
        return padded

    def prompt(self, counts: Sequence[int]) -> None:
        """Append so many tokens to each row, and show the selector their queries."""
        for i, layer in enumerate(self.layers):
            layer.append(self._next("k", counts, i), self._next("v", counts, i), list(counts))
            self.selector.observe(self._next("q", counts, i), layer)
        self.done = [done + count for done, count in zip(self.done, counts, strict=True)]

    def step(self, budget: Any, watch: Callable[[Step], None] | None = None) -> list[Step]:
        """Append a token to each row, and let the selector choose, in each layer.

        Args:
            budget: a value or policy, or a function of a layer's cache that returns a `Budget`.
            watch: is shown each layer's selection, before attention reads it.
        """
        ones, steps = [1] * len(self.rows), []
        for i, layer in enumerate(self.layers):
            q, k, v = (self._next(which, ones, i)[:, 0] for which in "qkv")
            layer.append(k, v)
            given = budget(layer) if callable(budget) else layer.budget(UniformBudget(budget, min_tokens=1))
            step = Step(self, layer, q, given)
            with self.around(step):
                step.selection = self.selector.select(q, layer, given)
                (watch or check_form)(step)
                out, lse = ops.sparse_attention(
                    q, layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens, step.selection,
                    sm_scale=self.geometry.sm_scale,
                )  # fmt: skip
                step.out, step.lse = self.selector.finish(q, layer, step.selection, out, lse)
            steps.append(step)
        self.done = [done + 1 for done in self.done]
        return steps


@dataclass
class Step:
    """One layer's part of a step."""

    world: World
    layer: Any
    q: torch.Tensor
    budget: Budget
    selection: Selection = None  # type: ignore[assignment]
    out: torch.Tensor = None  # type: ignore[assignment]
    lse: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.seq_lens = self.layer.seq_lens.clone()  # those of a static cache grow where they are

    def where(self, row: int, head: int) -> str:
        """Say which list it is, in the words of failures."""
        g, length = self.world.geometry, int(self.seq_lens[row])
        return f"row {row} ({length} tokens), kv head {head}, layer {self.layer.index}, G={g.group_size}"

    def lists(self) -> list[list[list[int]]]:
        """Return the selected tokens of each row and kv head, pages spelt out."""
        positions, valid = self.selection.positions(self.seq_lens)
        return [
            [tokens[keep].tolist() for tokens, keep in zip(*row, strict=True)]
            for row in zip(positions.cpu(), valid.cpu(), strict=True)
        ]


def check_form(step: Step) -> None:
    """Raise `Failure` unless a selection is one: shapes, types, range, order, uniqueness."""
    s, g, lens = step.selection, step.world.geometry, step.seq_lens
    if not isinstance(s, Selection):
        raise Failure(f"select: expected a twilight.Selection, got {type(s).__name__}")
    if s.indices.device != lens.device:
        raise Failure(f"select: expected a selection on {lens.device}, where q is, got {s.indices.device}")
    shape = (len(lens), g.num_kv_heads)
    if tuple(s.indices.shape[:2]) != shape:
        raise Failure(
            f"select: expected indices [b, Hkv, capacity] with b={shape[0]} and Hkv={shape[1]}, "
            f"got {list(s.indices.shape)} (G={g.group_size}; combine_group makes scores of kv heads of query heads')"
        )
    if s.granularity not in (1, g.page_size):
        raise Failure(f"granularity: expected 1 (tokens) or the page size, {g.page_size}, got {s.granularity}")
    unit = "token" if s.granularity == 1 else "page"
    for row in range(shape[0]):
        tokens = int(lens[row])
        size = -(-tokens // s.granularity)
        for head in range(shape[1]):
            count = int(s.lengths[row, head])
            if not 0 <= count <= s.capacity:
                raise Failure(
                    f"lengths: expected 0 to the capacity, {s.capacity}, got {count}; {step.where(row, head)}"
                )
            entries = s.indices[row, head, :count].tolist()
            _check_list(entries, size, unit, step, row, head)
            if tokens and not entries:
                raise Failure(f"nothing is selected: expected at least one {unit}; {step.where(row, head)}")
    _check_weights(step)


def _check_list(entries: list[int], size: int, unit: str, step: Step, row: int, head: int) -> None:
    for entry in entries:
        if not 0 <= entry < size:
            raise Failure(
                f"out of range: expected {unit}s 0 to {size - 1}, got {entry}; {step.where(row, head)}\n"
                "  rows differ in length: mask with layer.seq_lens, not with layer.max_seq_len"
            )
    for one, other in zip(entries, entries[1:], strict=False):
        if one == other:
            raise Failure(f"duplicate: {unit} {one} is listed twice; {step.where(row, head)}")
        if one > other:
            raise Failure(
                f"not ascending: {unit} {one} comes before {other}; {step.where(row, head)}\n"
                "  Selection.top and Selection.compact sort"
            )
    if len(set(entries)) < len(entries):
        raise Failure(f"duplicate: a {unit} is listed twice; {step.where(row, head)}")


def _check_weights(step: Step) -> None:
    s, g = step.selection, step.world.geometry
    if s.log_weight is None:
        return
    if s.log_weight.shape[1] != g.num_q_heads:
        raise Failure(f"log_weight: expected [b, Hq={g.num_q_heads}, capacity], got {list(s.log_weight.shape)}")
    counted = s.counted().repeat_interleave(g.group_size, dim=1)
    weights = s.log_weight[counted]
    if bool(weights.isnan().any()) or bool((weights == torch.inf).any()):
        raise Failure("log_weight: expected finite numbers, or -inf where a query head must not see an entry")
