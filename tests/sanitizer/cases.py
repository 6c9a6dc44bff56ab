"""What runs under compute-sanitizer: each kernel file a few times, at sizes that are small and awkward.

A case is a generator for a stem of raw_kernels. It makes its inputs and runs the operator with `At`, and yields what
the operator must have written in full: that is copied to the host, and initcheck reports what was left out. Nothing is
compared here; tests/ops does that.

    @case("page_scores")
    def page_scores(at):
        cache = at.cache([37, 0, 530])
        vectors = cache.vectors("bounds", 8)
        yield at.run(ops.page_scores, cache.q, vectors, cache.table, cache.seq_lens, page_size=16)

Inputs are made on the host and copied, because torch's own kernels on the GPU would be checked, or not be seen, by the
tool. Pages that nobody owns, and the padding behind a list's end, are left as the allocation came: whoever reads them
is reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from twilight import Selection, ops
from twilight.budget import Budget
from twilight.ops.quantize import shadow_bytes, split_shadow
from twilight.ops.token_top_k import launch
from twilight.resources import folder

Case = Callable[["At"], Iterator[Any]]
CASES: dict[str, list[Case]] = {}


def case(stem: str) -> Callable[[Case], Case]:
    """Register a generator for `raw_kernels/<stem>.cu`; a stem may have several."""

    def register(function: Case) -> Case:
        CASES.setdefault(stem, []).append(function)
        return function

    return register


def stems() -> list[str]:
    """Return every file of raw_kernels."""
    return sorted(Path(path).stem for path in folder("raw_kernels").glob("*.cu"))


def missing() -> list[str]:
    """Return the files of raw_kernels that no case is for."""
    return [stem for stem in stems() if stem not in CASES]


class At:
    """Where a case runs, and how it makes its inputs.

    Args:
        device: ``"cuda"``, or ``"cpu"`` for a dry run through the torch references.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.backend = "cuda" if self.device.type == "cuda" else "torch"
        self.generator = torch.Generator().manual_seed(0)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy a tensor from the host."""
        return tensor.to(self.device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal numbers."""
        return self.put(torch.randn(shape, generator=self.generator).to(dtype))

    def ints(self, values: Sequence[Any]) -> torch.Tensor:
        """Return int32s."""
        return self.put(torch.tensor(values, dtype=torch.int32))

    def cache(self, lengths: Sequence[int], **sizes: Any) -> Cache:
        """Return pages of random content for sequences of these lengths. See `Cache`."""
        return Cache(self, lengths, **sizes)

    def run(self, operator: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return what an operator makes: eagerly, and then by two replays of a CUDA graph where there can be one."""

        def call() -> Any:
            return operator(*args, **options, backend=self.backend)

        result = call()
        # Without torch's caching allocator a capture cannot allocate.
        if self.device.type != "cuda" or os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
            return result
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        self._graph = graph  # its memory holds the result
        return result


class Cache:
    """Sequences in shuffled pages. Their pages are full, so that whole pages may be read; others are not written.

    Attributes:
        q: `[b, Hkv * group, d]`.
        k_pages, v_pages, shadow, table, seq_lens: as the operators take them.
    """

    def __init__(
        self,
        at: At,
        lengths: Sequence[int],
        *,
        heads: int = 2,
        group: int = 4,
        dim: int = 128,
        page: int = 16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.at, self.lengths, self.heads, self.group, self.page = at, list(lengths), heads, group, page
        width = max(1, -(-max(lengths) // page))
        total = 2 + sum(-(-n // page) for n in lengths)
        order = self._order(total - 2) + 2  # page 0 is nobody's, and nor is page 1
        table, used = torch.zeros(len(lengths), width, dtype=torch.int32), 0
        for row, n in enumerate(lengths):
            count = -(-n // page)
            table[row, :count] = order[used : used + count]
            used += count
        self.table, self.seq_lens = at.put(table), at.ints(lengths)
        self.q = at.randn(len(lengths), heads * group, dim, dtype=dtype)
        k, v = (torch.randn(total, heads, page, dim, generator=at.generator).to(dtype) for _ in range(2))
        shadow = torch.zeros(total, heads, shadow_bytes(page, dim), dtype=torch.uint8)
        codes, params = split_shadow(shadow, page)
        codes[:], params[:] = ops.quantize(k)
        self.k_pages, self.v_pages, self.shadow = (self._owned(part) for part in (k, v, shadow))
        self._keys = k  # on the host

    def _owned(self, host: torch.Tensor) -> torch.Tensor:
        """Copy the pages that somebody owns; on the CPU all, as the references gather the others and mask them."""
        if self.at.device.type == "cpu":
            return host
        pages = torch.empty_like(host, device=self.at.device)
        pages[2:].copy_(host[2:])
        return pages

    @property
    def pages(self) -> tuple[torch.Tensor, ...]:
        """K and V, the page table and the lengths, in the order in which attention takes them."""
        return self.k_pages, self.v_pages, self.table, self.seq_lens

    def vectors(self, rule: str, bits: int | None) -> tuple[torch.Tensor, ...]:
        """Return what is kept about the pages' keys: "bounds" or "mean", in 8 bits or as they are."""
        of = {"bounds": ops.page_bounds, "mean": ops.page_means}[rule]
        every = torch.ones(len(self._keys), self.page, dtype=torch.bool)
        return tuple(self._owned(part) for part in of(self._keys, every, bits))

    def summary(self, rule: str, bits: int | None) -> ops.Summary:
        """Return what `append` is to bring up to date, as it is for the keys that are there."""
        if rule != "label":
            return ops.Summary(rule, self.vectors(rule, bits))
        channels, labels = self.labels(16, bits)
        return ops.Summary(rule, labels, channels)

    def labels(self, r: int, bits: int | None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return channels, and the labels that they make of the keys."""
        channels = torch.stack([self._order(self._keys.shape[-1])[:r] for _ in range(self.heads)]).int()
        labels = ops.key_labels(self._keys, channels, bits)
        return self.at.put(channels), tuple(map(self._owned, labels))

    def select(self, granularity: int = 1, *, share: float = 0.5, log_weight: bool = False) -> Selection:
        """Select a share of each row's entries: everything in the first, nothing in the last of several."""
        at, b = self.at, len(self.lengths)
        capacity = max(1, -(-max(self.lengths) // granularity)) + 3
        indices, counts = torch.zeros(b, self.heads, capacity, dtype=torch.int32), torch.zeros(b, self.heads)
        for row, n in enumerate(self.lengths):
            for head in range(self.heads):
                there = -(-n // granularity)
                part = 1.0 if row == head == 0 else 0.0 if b > 1 and row == b - 1 else share
                taken = self._order(there)[: int(there * part)].sort().values
                indices[row, head, : len(taken)], counts[row, head] = taken.int(), len(taken)
        weight = torch.randn(b, self.heads * self.group, capacity, generator=at.generator) if log_weight else None
        lengths = at.put(counts.int())
        return Selection(
            self._counted(indices, counts), lengths, granularity, None if weight is None else at.put(weight)
        )

    def _counted(self, host: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if self.at.device.type == "cpu":
            return host
        lists = torch.empty_like(host, device=self.at.device)
        for row, head in torch.cartesian_prod(*(torch.arange(n) for n in host.shape[:2])).tolist():
            count = int(counts[row, head])
            if count:
                lists[row, head, :count].copy_(host[row, head, :count])
        return lists

    def _order(self, count: int) -> torch.Tensor:
        return torch.randperm(count, generator=self.at.generator)

    def budget(self, share: float) -> Budget:
        """Return a budget of a share of each row's tokens."""
        tokens = [[max(min(n, 1), int(n * share))] * self.heads for n in self.lengths]
        return Budget(self.at.ints(tokens), max(1, max(map(max, tokens))))


RAGGED = (37, 0, 1, 530, 96)
# Heads of a group, head_dim, page size, type. 12 heads make two rows in attention.
SHAPES = ((4, 128, 16, torch.bfloat16), (12, 64, 32, torch.float16), (1, 256, 16, torch.float16))
# Rules and bits of what append keeps, for each shape.
SUMMARIES = (
    (("bounds", 8), ("mean", 8), ("label", 2)),
    (("bounds", None), ("label", None), ("label", 4)),
    (None, ("mean", None)),
)


@case("append")
def append(at: At) -> Iterator[Any]:
    for (_, dim, page, dtype), summaries in zip(SHAPES, SUMMARIES, strict=True):
        for what in summaries:
            cache = at.cache([60, 31, 17, 40], heads=3, dim=dim, page=page, dtype=dtype)
            summary = None if what is None else cache.summary(*what)
            kept = () if summary is None else summary.tensors
            shadow = cache.shadow if what != ("label", 4) else cache.shadow[..., :0]
            # A chunk that begins and ends inside a page, a whole page, nothing, one token.
            for counts in ([37, 16, 0, 1], [1, 1, 1, 0]):
                # Strided as a projection leaves them.
                k, v = (at.randn(4, 3, max(counts), dim, dtype=dtype).transpose(1, 2) for _ in range(2))
                pages = (cache.k_pages, cache.v_pages, shadow, cache.table, cache.seq_lens)
                at.run(ops.append, k, v, *pages, at.ints(counts), summary=summary)
                yield tuple(part[2:] for part in (cache.k_pages, cache.v_pages, cache.shadow, *kept))


@case("budget")
def budget(at: At) -> Iterator[Any]:
    for value in (0.3, 7):
        for lengths in (RAGGED, range(300)):
            yield at.run(ops.budget, at.ints(list(lengths)), 3, value, min_tokens=4, page_size=16)


@case("page_scores")
def page_scores(at: At) -> Iterator[Any]:
    for heads, (group, dim, page, dtype) in zip((2, 3, 1), SHAPES, strict=True):
        for lengths in (RAGGED, (530,)):
            cache = at.cache(lengths, heads=heads, group=group, dim=dim, page=page, dtype=dtype)
            for what in (("bounds", 8), ("bounds", None), ("mean", 8), ("mean", None)):
                vectors = cache.vectors(*what)
                yield at.run(ops.page_scores, cache.q, vectors, cache.table, cache.seq_lens, page_size=page)


@case("top_k")
def top_k(at: At) -> Iterator[Any]:
    # Scores in registers, or read twice; a group that no template is made for.
    for n, group, granularity, lengths in (
        (33, 4, 16, RAGGED),
        (33, 5, 16, (530, 0)),
        (2500, 2, 16, (40000, 7)),
        (8192, 1, 16, (131072,)),
    ):
        scores, counts = at.randn(len(lengths), 2 * group, n), at.ints([[9, 1]] * len(lengths))
        for reduce, newest in (("softmax", True), ("max", False)):
            options = {"reduce": reduce, "force_newest": newest, "granularity": granularity, "capacity": 12}
            chosen = at.run(ops.top_k, scores, counts, at.ints(lengths), **options)
            yield chosen.indices, chosen.lengths


@case("token_top_k")
def token_top_k(at: At) -> Iterator[Any]:
    def apart(*args: Any, backend: str, lse: torch.Tensor | None = None, **options: Any) -> Selection:
        """Let blocks meet in global memory, as without clusters."""
        if backend == "torch":
            return ops.top_k(*args, backend="torch", lse=lse, **options)
        return launch(*args, lse, clusters=False, **options)

    # A block alone, teams, rows of every kind, and keys that no shared memory holds.
    for n, group, lengths, dtype in (
        (700, 4, (700, 0, 1), torch.float16),
        (9001, 3, (9001, 40), torch.float32),
        (20000, 4, (20000,), torch.float16),
        (1_000_000, 1, (1_000_000,), torch.float16),
    ):
        drawn = torch.randn(len(lengths), 2 * group, n, generator=at.generator).to(dtype)
        # The true one: the kernel ranks sums of at most the group's size.
        lse = at.put(
            torch.stack([row[:, :length].float().logsumexp(-1) for row, length in zip(drawn, lengths, strict=True)])
        )
        scores = at.put(drawn)
        counts = at.ints([[max(1, n // 4), 1]] * len(lengths))
        for operator, reduce, given, newest in (
            (ops.top_k, "softmax", None, True),
            (ops.top_k, "max", None, False),
            (apart, "softmax", lse, False),
            (apart, "softmax", None, True),
        ):
            options = {"reduce": reduce, "scale": 1.0, "force_newest": newest, "granularity": 1, "capacity": n // 4}
            chosen = at.run(operator, scores, counts, at.ints(lengths), lse=given, **options)
            yield chosen.indices, chosen.lengths


@case("label_scores")
def label_scores(at: At) -> Iterator[Any]:
    # Labels in 2 and 4 bits and as they are; r that the kernel is made for, and one that it is not.
    for r, heads, (group, dim, page, dtype) in zip((16, 64, 6), (2, 3, 1), SHAPES, strict=True):
        for lengths in (RAGGED, (530,)):
            cache = at.cache(lengths, heads=heads, group=group, dim=dim, page=page, dtype=dtype)
            for bits in (4, None) if r == 6 else (2, 4, None):
                channels, label = cache.labels(r, bits)
                paged = (cache.table, cache.seq_lens)
                for out, with_lse in ((torch.half, True), (torch.float, False)):
                    options = {"out_dtype": out, "with_lse": with_lse}
                    scores, lse = at.run(ops.label_scores, cache.q, label, channels, *paged, **options)
                    yield (scores, lse) if with_lse else scores


@case("label_top_k")
def label_top_k(at: At) -> Iterator[Any]:
    # A row of several blocks, rows of one, and ranks that lie where sums of softmaxes are 0.
    for lengths, heads, group, bits, r, scale in (
        ((9000, 300), 1, 4, 4, 16, None),
        (RAGGED, 2, 8, 2, 32, None),
        ((3000, 97), 1, 1, 4, 32, 30.0),
    ):
        cache = at.cache(lengths, heads=heads, group=group, dim=128, page=16, dtype=torch.bfloat16)
        channels, label = cache.labels(r, bits)
        inputs = (
            cache.q,
            label,
            channels,
            cache.table,
            cache.seq_lens,
            at.ints([[max(1, max(lengths) // 4)] * heads] * len(lengths)),
        )
        for reduce, newest in (("softmax", False), ("max", True)):
            options = {"capacity": max(lengths) // 4 + 1, "reduce": reduce, "sm_scale": scale, "force_newest": newest}
            chosen = at.run(ops.label_top_k, *inputs, **options)
            yield chosen.indices, chosen.lengths


@case("spgemv")
def spgemv(at: At) -> Iterator[Any]:
    for heads, (group, dim, page, _), out in zip((2, 3, 1), SHAPES, (torch.half, torch.float, torch.half), strict=True):
        for lengths in (RAGGED, (530,)):
            cache = at.cache(lengths, heads=heads, group=group, dim=dim, page=page)
            for granularity in (1, page):
                chosen = cache.select(granularity, log_weight=len(lengths) > 1)
                paged = (cache.shadow, cache.table, cache.seq_lens)
                yield at.run(ops.estimate_scores, cache.q, *paged, chosen, page_size=page, out_dtype=out)


@case("top_p")
def top_p(at: At) -> Iterator[Any]:
    # Clusters of 1, 2, 4 and 8 blocks where there are such, and a row that no shared memory holds.
    for n, heads, group, dtype, p in (
        (601, 2, 4, torch.float16, 0.9),
        (1100, 1, 4, torch.float32, 0.5),
        (2103, 1, 3, torch.float16, 0.999),
        (4200, 1, 8, torch.float16, 1.0),
        (33000, 1, 16, torch.float32, 0.9),
    ):
        lengths = (n, n // 3, 0) if n < 1000 else (n,)
        cache = at.cache(lengths, heads=heads, group=group, dim=64)
        chosen = cache.select(1, log_weight=n < 3000)
        logits = 3 * torch.randn(len(lengths), heads * group, chosen.capacity, generator=at.generator)
        ends = chosen.lengths.cpu().repeat_interleave(group, dim=1).unsqueeze(-1)
        logits = logits.masked_fill(torch.arange(chosen.capacity) >= ends, -torch.inf)
        pruned = at.run(ops.top_p, at.put(logits.to(dtype)), chosen, cache.seq_lens, p)
        yield pruned.selection.lengths, pruned.per_query_head, pruned.mass


@case("page_tail")
def page_tail(at: At) -> Iterator[Any]:
    # A block alone and clusters of 2 and 8; rows that end inside a page, lists that hold all or nothing.
    for lengths, page, group, dtype in (
        (RAGGED, 16, 4, torch.float16),
        ((5001, 700), 16, 3, torch.float32),
        ((40000,), 16, 16, torch.float16),
    ):
        cache = at.cache(lengths, group=group, dim=64, page=page)
        candidates = cache.select(1, share=0.6)
        lists, ends = candidates.indices.cpu(), candidates.lengths.cpu()
        kept, counts = torch.zeros_like(lists), torch.zeros_like(ends)
        for row, head in torch.cartesian_prod(*(torch.arange(n) for n in ends.shape)).tolist():
            taken = lists[row, head, : int(ends[row, head])][:: 3 - head]
            kept[row, head, : len(taken)], counts[row, head] = taken, len(taken)
        logits = torch.randn(len(lengths), 2 * group, candidates.capacity, generator=at.generator).to(dtype)
        means = ops.MeanValues(cache.vectors("mean", 8), page, cache.table.shape[1])
        selection = Selection(at.put(kept), at.put(counts))
        tail = at.run(ops.page_tail, at.put(logits), candidates, selection, cache.seq_lens, means).pages
        yield tail.lengths
        for row, head in torch.cartesian_prod(*(torch.arange(n) for n in ends.shape)).tolist():
            count = int(tail.lengths[row, head])
            if count:
                heads = slice(head * group, (head + 1) * group)
                yield tail.indices[row, head, :count], tail.log_weight[row, heads, :count]


@case("sparse_attention")
def sparse_attention(at: At) -> Iterator[Any]:
    for group, dim, page, dtype in SHAPES:
        cache = at.cache((1, 530, 16, 97, 3), group=group, dim=dim, page=page, dtype=dtype)
        for granularity, log_weight in ((1, False), (page, True)):
            yield at.run(ops.sparse_attention, cache.q, *cache.pages, cache.select(granularity, log_weight=log_weight))


@case("dense_attention")
def dense_attention(at: At) -> Iterator[Any]:
    for group, dim, page, dtype in SHAPES:
        cache = at.cache(RAGGED, group=group, dim=dim, page=page, dtype=dtype)
        yield at.run(ops.dense_attention, cache.q.unsqueeze(1), *cache.pages, max_seq_len=max(RAGGED))


@case("fused_decode")
def fused_decode(at: At) -> Iterator[Any]:
    # Of each kind an instantiation for top-p alone, and one that takes bounds and a tail as well.
    bounds, bounded = (("bounds", 8), 0.9, True, False), (("bounds", 8), 0.9, True, True)
    means, none = (("mean", 8), 0.5, False, True), (None, 0.999, True, True)
    unruled, everything = (("mean", 8), 0.5, False, False), (None, 0.9, True, False)
    # One row in the largest cluster, rows in small ones, and more rows than there are multiprocessors.
    for lengths, heads, group, dim, page, dtype, kinds in (
        ((1500,), 1, 4, 128, 16, torch.bfloat16, (bounds, bounded, means, none)),
        (RAGGED, 2, 8, 64, 32, torch.float16, (bounds, bounded, means, unruled, none, everything)),
        ((300, 97), 1, 1, 256, 16, torch.float16, (bounds, none)),
        ((40,) * 70, 2, 4, 128, 16, torch.bfloat16, (means,)),
    ):
        cache = at.cache(lengths, heads=heads, group=group, dim=dim, page=page, dtype=dtype)
        pages, paged = (cache.k_pages, cache.v_pages, cache.shadow), (cache.table, cache.seq_lens)
        for what, p, lists, ruled in kinds:
            vectors, budget = (cache.vectors(*what), cache.budget(0.4)) if what else ((), None)
            there = at.ints([int(n > 0) for n in lengths])
            k, v = (at.randn(len(lengths), heads, dim, dtype=dtype) for _ in range(2))
            new = ops.NewTokens(k, v, there)
            # Means of the values: of any numbers that lie where theirs would.
            tail = ops.MeanValues(cache.vectors("mean", 8), page, cache.table.shape[1])
            rule = {"min_tokens": 4, "max_tokens": 50, "means": tail} if ruled else {}
            step = at.run(ops.fused_decode, cache.q, *pages, vectors, *paged, budget, p, lists=lists, new=new, **rule)
            yield step.out, step.lse, step.candidates.lengths
            yield step.pruned.selection.lengths, step.pruned.per_query_head, step.pruned.mass
        # Pages and tokens that somebody else has chosen.
        for given in (cache.select(page), cache.select(1)):
            lists = len(lengths) > 1
            ceiling = {"max_tokens": 50} if lists else {}
            step = at.run(
                ops.fused_decode, cache.q, *pages, (), *paged, None, 0.9, lists=lists, candidates=given, **ceiling
            )
            yield step.out, step.lse, step.pruned.selection.lengths
