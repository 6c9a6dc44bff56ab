"""PagedKVCache against a plain list of tokens a row: nothing lost, nothing leaked, nobody else's keys changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests import oracles
from twilight import BoundedTopP, Geometry, LayerCache, MetadataSpec, OutOfPagesError, PagedKVCache, Selector
from twilight.ops.quantize import split_shadow

PAGE, HEADS, DIM, LAYERS = 4, 2, 4, 2
GEOMETRY = Geometry(LAYERS, 4, HEADS, DIM, PAGE, torch.float32, layer_ids=(2, 8))
PRUNER = BoundedTopP(tail="page_mean", tail_type="native")


class Summaries(Selector):
    """Metadata of both kinds, without a selector's worth of anything else."""

    name = "summaries"

    def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
        return (
            MetadataSpec("max", (geometry.head_dim,), torch.float32),
            MetadataSpec("min", (geometry.head_dim,), torch.float32),
            MetadataSpec("first", (1,), torch.float64, per="token"),
        )

    def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
        assert (keys.transpose(1, 2)[~valid] == 0).all()  # whatever the slot held before
        empty = ~valid[:, None, :, None]
        return {
            "max": keys.masked_fill(empty, -torch.inf).amax(2),
            "min": keys.masked_fill(empty, torch.inf).amin(2),
            "first": keys[..., :1] * layer,
        }


class Token:
    """What one token has in every layer."""

    def __init__(self, number: int) -> None:
        rng = np.random.default_rng(number)
        self.k, self.v = rng.standard_normal((2, LAYERS, HEADS, DIM)).astype(np.float32)
        self.quantized = [[oracles.quantize(self.k[layer, head]) for head in range(HEADS)] for layer in range(LAYERS)]


def row_of(layer: LayerCache, pages: torch.Tensor, row: int) -> np.ndarray:
    """Read `[n, Hkv, ...]` back through the page table, token by token."""
    tokens = [
        pages[int(layer.page_table[row, position // PAGE]), :, position % PAGE]
        for position in range(int(layer.seq_lens[row]))
    ]
    return torch.stack(tokens).numpy() if tokens else np.empty((0, *pages[0, :, 0].shape))


def check_row(cache: PagedKVCache, row: int, tokens: list[Token]) -> None:
    for place, layer in enumerate(cache.layers):
        assert int(layer.seq_lens[row]) == len(tokens)
        if not tokens:
            continue
        keys = np.stack([token.k[place] for token in tokens])
        assert np.array_equal(row_of(layer, layer.k_pages, row), keys)
        assert np.array_equal(row_of(layer, layer.v_pages, row), np.stack([token.v[place] for token in tokens]))
        codes, params = (row_of(layer, part, row) for part in split_shadow(layer.shadow, PAGE))
        for head in range(HEADS):
            want = [token.quantized[place][head] for token in tokens]
            assert codes[:, head].tobytes() == b"".join(oracles.pack(c) for c, _, _ in want)
            assert params[:, head].tolist() == [[scale, zero] for _, scale, zero in want]
        first = row_of(layer, layer.metadata("first"), row)
        assert np.array_equal(first[..., 0], keys[..., 0].astype(np.float64) * layer.index)
        for logical in range(-(-len(tokens) // PAGE)):
            mine = keys[logical * PAGE : (logical + 1) * PAGE]
            page = int(layer.page_table[row, logical])
            assert np.array_equal(layer.metadata("max")[page].numpy(), mine.max(0))
            assert np.array_equal(layer.metadata("min")[page].numpy(), mine.min(0))
            values = [token.v[place].astype(np.float64) for token in tokens[logical * PAGE : (logical + 1) * PAGE]]
            np.testing.assert_allclose(layer.metadata("mean_values")[page], sum(values) / len(values), atol=1e-6)


def snapshot(cache: PagedKVCache) -> list:
    table = cache.table
    owners = [table.owners(page) for page in range(table.num_pages + 1)]
    host = [[list(row) for row in table.rows], list(table.lengths), table.num_free, table.num_pages, owners]
    tensors = [cache.page_table, cache.seq_lens]
    for layer in cache.layers:
        tensors += [layer.k_pages, layer.v_pages, layer.shadow]
        tensors += [layer.metadata(spec.name) for spec in (*cache.specs, *cache.pruner_specs)]
    return [host, [tensor.numpy().tobytes() for tensor in tensors]]


def append(cache: PagedKVCache, new: list[list[Token]]) -> None:
    """Append ragged tokens to every layer. What does not count is NaN."""
    steps = max(1, *map(len, new))
    for place, layer in enumerate(cache.layers):
        k, v = torch.full((2, len(new), steps, HEADS, DIM), torch.nan)
        for row, tokens in enumerate(new):
            for step, token in enumerate(tokens):
                k[row, step], v[row, step] = torch.tensor(token.k[place]), torch.tensor(token.v[place])
        layer.append(k, v, [len(tokens) for tokens in new])


class CacheMachine(RuleBasedStateMachine):
    """Random calls to a cache, and the same to lists."""

    @initialize(num_rows=st.integers(1, 4), num_pages=st.integers(1, 9), growable=st.sampled_from([False, False, True]))
    def make(self, num_rows: int, num_pages: int, growable: bool) -> None:
        self.growable = growable
        self.cache = PagedKVCache(
            GEOMETRY, num_rows=num_rows, num_pages=num_pages, selector=Summaries(), pruner=PRUNER, growable=growable
        )
        self.rows: list[list[Token]] = [[] for _ in range(num_rows)]
        self.number = 0

    def needed(self, counts: list[int]) -> int:
        """Pages that an append takes, worked out from who shares which tail."""
        tails: dict[int, list[int]] = {}
        added = 0
        for row, (pages, count) in enumerate(zip(self.cache.table.rows, counts, strict=True)):
            length = len(self.rows[row])
            added += -(-(length + count) // PAGE) - -(-length // PAGE)
            if length % PAGE:
                tails.setdefault(pages[-1], []).append(count)
        # Every owner that writes needs a page of its own, except the last one if nobody stays behind.
        return added + sum(sum(c > 0 for c in group) - all(c > 0 for c in group) for group in tails.values())

    @rule(data=st.data(), most=st.sampled_from([1, 1, 5, 11]))
    def append(self, data: st.DataObject, most: int) -> None:
        counts = [data.draw(st.integers(0, most)) for _ in self.rows]
        new = []
        for count in counts:
            new.append([Token(self.number + i) for i in range(count)])
            self.number += count
        needed, free = self.needed(counts), self.cache.table.num_free
        before = snapshot(self.cache)
        try:
            append(self.cache, new)
        except OutOfPagesError:
            assert needed > free and not self.growable
            assert snapshot(self.cache) == before
            return
        assert self.growable or self.cache.table.num_free == free - needed
        for row, tokens in zip(self.rows, new, strict=True):
            row += tokens

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, target = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        self.cache.fork(source, target)
        self.rows[target] = list(self.rows[source])

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.free(row)
        self.rows[row] = []

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        length = data.draw(st.integers(max(0, len(self.rows[row]) - 6), len(self.rows[row])))
        before, pages = snapshot(self.cache), self.cache.table.rows[row]
        owners = self.cache.table.owners
        try:
            self.cache.truncate(row, length)
        except OutOfPagesError:
            keep = -(-length // PAGE)
            assert not self.growable and self.cache.table.num_free == 0
            assert owners(pages[keep - 1]) > 1 and all(owners(page) > 1 for page in pages[keep:])
            assert snapshot(self.cache) == before
            return
        del self.rows[row][length:]

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.cache.select_rows(chosen)
        self.rows = [list(self.rows[row]) for row in chosen]

    @invariant()
    def every_row_reads_back(self) -> None:
        assert self.cache.num_rows == len(self.rows) and self.cache.max_seq_len == max(map(len, self.rows))
        for row, tokens in enumerate(self.rows):
            check_row(self.cache, row, tokens)

    @invariant()
    def pages_balance(self) -> None:
        table = self.cache.table
        owned = Counter(page for row in table.rows for page in row)
        assert [len(row) for row in table.rows] == [-(-len(tokens) // PAGE) for tokens in self.rows]
        assert 0 not in owned
        assert all(table.owners(page) == owned[page] for page in range(table.num_pages + 1))
        assert table.num_free + len(owned) == table.num_pages
        assert all(len(layer.k_pages) == table.num_pages + 1 for layer in self.cache.layers)


CacheMachine.TestCase.settings = hypothesis.settings(max_examples=150, stateful_step_count=30)
TestRandomCalls = CacheMachine.TestCase


def _cache(rows: int, pages: int, **options: object) -> PagedKVCache:
    options = {"selector": Summaries(), "pruner": PRUNER, **options}
    return PagedKVCache(GEOMETRY, num_rows=rows, num_pages=pages, **options)  # type: ignore[arg-type]


def _tokens(first: int, count: int) -> list[Token]:
    return [Token(number) for number in range(first, first + count)]


def test_one_by_one_equals_at_once_bit_for_bit() -> None:
    rows = [_tokens(0, 11), _tokens(20, 4), []]
    once, steps = _cache(3, 8), _cache(3, 8)
    append(once, rows)
    for step in range(11):
        append(steps, [row[step : step + 1] for row in rows])
    for whole, part in zip(once.layers, steps.layers, strict=True):
        for row, tokens in enumerate(rows):
            for logical in range(-(-len(tokens) // PAGE)):
                a, b = int(whole.page_table[row, logical]), int(part.page_table[row, logical])
                assert torch.equal(whole.shadow[a], part.shadow[b]) or len(tokens) % PAGE
                for name in ("max", "min", "first", "mean_values"):
                    assert torch.equal(whole.metadata(name)[a], part.metadata(name)[b])
            for buffer in ("k_pages", "v_pages"):
                mine = (row_of(layer, getattr(layer, buffer), row) for layer in (whole, part))
                assert np.array_equal(*mine)
    for row, tokens in enumerate(rows):
        check_row(steps, row, tokens)


def test_copy_on_write_leaves_the_other_row_alone() -> None:
    cache = _cache(2, 6)
    shared = _tokens(0, 6)
    append(cache, [shared, []])
    cache.fork(0, 1)
    mine, yours = _tokens(10, 1), _tokens(20, 3)
    append(cache, [mine, []])
    check_row(cache, 1, shared)
    append(cache, [[], yours])
    check_row(cache, 0, shared + mine)
    check_row(cache, 1, shared + yours)
    assert cache.table.rows[0][0] == cache.table.rows[1][0]  # the full page stays shared
    assert cache.table.num_free == 2  # 1 shared, 1 + 2 own


def test_growth_keeps_what_is_there_and_its_bound() -> None:
    cache = _cache(1, 1, growable=True, max_pages=3)
    tokens = _tokens(0, 12)
    for token in tokens:
        append(cache, [[token]])
        check_row(cache, 0, tokens[: cache.max_seq_len])
    assert cache.table.num_pages == 3
    before = snapshot(cache)
    with pytest.raises(OutOfPagesError):
        append(cache, [_tokens(50, 1)])
    assert snapshot(cache) == before


def test_a_request_beyond_the_bound_does_not_grow_the_pool() -> None:
    cache = _cache(1, 1, growable=True, max_pages=3)
    append(cache, [_tokens(0, 2)])
    before = snapshot(cache)
    with pytest.raises(OutOfPagesError):
        append(cache, [_tokens(10, 40)])
    assert snapshot(cache) == before


def test_truncating_under_another_owner_grows_a_growable_pool() -> None:
    cache = _cache(2, 2, growable=True)
    tokens = _tokens(0, 8)
    append(cache, [tokens, []])
    cache.fork(0, 1)
    cache.truncate(1, 7)
    check_row(cache, 0, tokens)
    check_row(cache, 1, tokens[:7])


def test_metadata_forgets_truncated_keys() -> None:
    cache = _cache(1, 2)
    tokens = _tokens(0, 4)
    tokens[3].k[:] = 100.0
    append(cache, [tokens])
    cache.truncate(0, 3)
    page = cache.table.rows[0][0]
    assert all(float(layer.metadata("max")[page].max()) < 100 for layer in cache.layers)


def test_layers_of_a_step_append_the_same_in_any_order() -> None:
    cache = _cache(2, 6)
    first, second = cache.layers
    k = torch.randn(2, 3, HEADS, DIM)
    second.append(k, k, [3, 1])
    assert cache.seq_lens.tolist() == [3, 1]
    with pytest.raises(ValueError, match=r"layer 8 appends again before layers \[2\] had their turn"):
        second.append(k, k, [3, 1])
    with pytest.raises(ValueError, match=r"new_tokens: layer 2 appends \[3, 3\] in a step that began with \[3, 1\]"):
        first.append(k, k)
    before = snapshot(cache)
    with pytest.raises(ValueError, match="k: expected shape"):
        first.append(k[:, :, :1], k, [3, 1])
    assert snapshot(cache) == before
    first.append(k, k, [3, 1])
    assert torch.equal(first.k_pages, second.k_pages) and cache.seq_lens.tolist() == [3, 1]
    second.append(k[:, 0], k[:, 0])
    first.append(k[:, 0], k[:, 0])
    assert cache.seq_lens.tolist() == [4, 2]


def test_aborting_a_step_forgets_it_in_the_layers_that_had_it() -> None:
    cache = _cache(2, 8)
    tokens = [_tokens(0, 5), _tokens(10, 2)]
    append(cache, tokens)
    cache.abort()  # nothing is under way
    k = torch.randn(2, 3, HEADS, DIM)
    cache.layers[0].append(100 * k, k, [3, 0])
    for change in (
        lambda: cache.free(0),
        lambda: cache.fork(0, 1),
        lambda: cache.truncate(0, 1),
        lambda: cache.select_rows([0]),
    ):
        with pytest.raises(ValueError, match=r"rows change before layers \[8\] had their turn in this step; abort\(\)"):
            change()
    cache.abort()
    for row, known in enumerate(tokens):
        check_row(cache, row, known)
    more = _tokens(30, 1)
    append(cache, [more, []])
    check_row(cache, 0, tokens[0] + more)


def test_a_summary_that_fails_leaves_the_cache_as_it_was() -> None:
    class Fails(Summaries):
        def summarize(self, keys: torch.Tensor, valid: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
            if layer == 8 and valid.any() and keys.max() > 50:
                raise RuntimeError("plugin")
            return super().summarize(keys, valid, layer)

    cache = _cache(1, 8, selector=Fails())
    tokens = _tokens(0, 5)
    append(cache, [tokens])
    k = torch.full((1, 3, HEADS, DIM), 100.0)
    cache.layers[0].append(k, k)
    with pytest.raises(RuntimeError, match="plugin"):
        cache.layers[1].append(k, k)
    check_row(cache, 0, tokens)
    append(cache, [_tokens(30, 1)])
    check_row(cache, 0, tokens + _tokens(30, 1))


def test_a_reused_page_shows_nothing_of_its_last_owner() -> None:
    cache = _cache(1, 1)
    poison = _tokens(0, 4)
    for token in poison:
        token.k[:], token.v[:] = np.nan, np.nan
    append(cache, [poison])
    cache.free(0)
    tokens = _tokens(10, 2)
    append(cache, [tokens])
    check_row(cache, 0, tokens)


def test_nbytes_by_hand() -> None:
    cache = PagedKVCache(Geometry(3, 4, 2, 128), num_rows=1, num_pages=9)
    # One page more than asked for: the one that nobody owns. bf16: 2 bytes a number.
    kv, shadow = 3 * 10 * 2 * 16 * 128 * 2 * 2, 3 * 10 * 2 * 1088
    assert cache.nbytes() == {"kv": kv, "shadow": shadow, "metadata": 0, "state": 0}
    cache = _cache(1, 9)
    assert cache.nbytes()["metadata"] == LAYERS * 10 * HEADS * (2 * DIM * 4 + PAGE * 8 + DIM * 4)
    packed = _cache(1, 9, pruner=BoundedTopP(tail="page_mean"))
    assert packed.nbytes()["metadata"] == LAYERS * 10 * HEADS * (2 * DIM * 4 + PAGE * 8 + DIM + 4)


def test_selector_and_pruner_may_not_share_a_name() -> None:
    class Clash(Summaries):
        def metadata(self, geometry: Geometry) -> tuple[MetadataSpec, ...]:
            return (MetadataSpec("mean_values", (1,), torch.float32),)

    with pytest.raises(ValueError, match="pruner: keeps metadata called 'mean_values', .* selector 'summaries'"):
        _cache(1, 1, selector=Clash())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, k: c.layers[0].append(None, k), TypeError, "k: expected a torch.Tensor, got NoneType"),
        (lambda c, k: c.layers[0].append(k, k.tolist()), TypeError, "v: expected a torch.Tensor, got list"),
        (lambda c, k: c.layers[0].append(k[0], k[0]), ValueError, r"k: expected shape \[2, 2, 4\], got \[3, 2, 4\]"),
        (lambda c, k: c.layers[0].append(k[..., :3], k), ValueError, r"k: expected shape \[2, any, 2, 4\], got"),
        (lambda c, k: c.layers[0].append(k[:1], k[:1]), ValueError, r"k: expected shape \[2, any, 2, 4\], got \[1, "),
        (lambda c, k: c.layers[0].append(k, k[:, :2]), ValueError, r"v: expected shape \[2, 3, 2, 4\], got \[2, 2, "),
        (lambda c, k: c.layers[0].append(k[:, 0], k), ValueError, r"v: expected shape \[2, 2, 4\], got \[2, 3, 2, 4\]"),
        (lambda c, k: c.layers[0].append(k.half(), k.half()), TypeError, "k: expected dtype float32, got float16"),
        (lambda c, k: c.layers[0].append(k, k.double()), TypeError, "v: expected dtype float32, got float64"),
        (lambda c, k: c.layers[0].append(k.to("meta"), k), ValueError, "k: expected device cpu, got meta"),
        (lambda c, k: c.layers[0].append(k, k, [4, 1]), ValueError, "new_tokens: expected at most n=3"),
        (lambda c, k: c.layers[0].append(k, k, [1]), ValueError, "new_tokens: expected 2 counts, one a row, got 1"),
        (lambda c, k: c.layers[0].append(k, k, []), ValueError, "new_tokens: expected 2 counts, one a row, got 0"),
        (lambda c, k: c.layers[0].append(k, k, [1, -1]), ValueError, "new_tokens: expected counts of at least 0"),
        (lambda c, k: c.layers[0].append(k, k, [1, 1.5]), TypeError, "new_tokens: expected ints, got float"),
        (lambda c, k: c.layers[0].append(k, k, torch.tensor([1, 1])), TypeError, "new_tokens: expected ints, got Tens"),
        (lambda c, k: c.truncate(0, 9), ValueError, "length: expected 0 to 6 for row 0, got 9"),
        (lambda c, k: c.truncate(4, 0), ValueError, "row: expected a row from 0 to 1, got 4"),
        (lambda c, k: c.free(-1), ValueError, "row: expected a row from 0 to 1, got -1"),
        (lambda c, k: c.fork(0, 2), ValueError, "target: expected a row from 0 to 1, got 2"),
        (lambda c, k: c.select_rows([]), ValueError, "rows: expected at least one row"),
        (lambda c, k: c.select_rows([0, 7]), ValueError, "rows: expected a row from 0 to 1, got 7"),
        (lambda c, k: c.layers[0].metadata("mean"), ValueError, "no 'mean' .there is: 'max', 'min', 'first', 'mean_v"),
    ],
)
def test_refusals_change_nothing(call: Callable, error: type[Exception], message: str) -> None:
    cache = _cache(2, 6)
    append(cache, [_tokens(0, 6), []])
    cache.fork(0, 1)
    before = snapshot(cache)
    with pytest.raises(error, match=message):
        call(cache, torch.randn(2, 3, HEADS, DIM))
    assert snapshot(cache) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_rows": 0}, "num_rows: "), ({"num_pages": 0}, "num_pages: "), ({"max_pages": 0}, "max_pages: ")],
)
def test_refuses_sizes_below_one(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message + "expected at least 1, got 0"):
        PagedKVCache(GEOMETRY, **{"num_rows": 1, "num_pages": 1, **options})
