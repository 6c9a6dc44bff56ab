"""What a selector keeps for rows, against plain lists: it moves with its row, and belongs to nobody else."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.caches import fill
from twilight import Geometry, NoPruning, PagedKVCache, Selection, Selector, StateSpec, TwilightAttention, ops
from twilight.graph import StaticCache

PAGE, STRIDE = 4, 3
GEOMETRY = Geometry(2, 4, 2, 4, PAGE, torch.float32)


class Ages(Selector):
    """Counts steps: of each row, of each token, and of each three tokens. Marks a token with the step it came in,
    and the first token with the latest step.
    """

    name = "ages"

    def state(self, geometry: Geometry) -> tuple[StateSpec, ...]:
        return (
            StateSpec("steps", (2,), torch.float64, heads="query", fill=0.5),
            StateSpec("age", (), torch.int32, per="token", fill=-1),
            StateSpec("third", (1,), torch.float32, per="token", stride=STRIDE, fill=7),
            StateSpec("mark", (2,), torch.int64, per="token", fill=-5),
        )

    def observe(self, q: torch.Tensor, layer) -> None:
        entries = ops.new_positions(layer.seq_lens, layer.new_tokens, q.shape[1])
        step = layer.state("steps")[:, :1, None].long()
        layer.update_state("mark", (step * 100 + entries[:, None, :, None]).expand(-1, 2, -1, 2), entries)
        layer.update_state("mark", (step * 100).expand(-1, 2, -1, 2), torch.zeros_like(entries[:, :1]))
        for spec in self.state(layer.geometry)[:3]:
            layer.update_state(spec.name, layer.state(spec.name) + 1)


class Row:
    """One row of the model: its tokens' ages, its thirds, its steps, and its tokens' marks."""

    def __init__(self) -> None:
        self.ages: list[int] = []
        self.thirds: list[float] = []
        self.steps = 0.5
        self.marks: list[int] = []

    def copy(self) -> Row:
        other = Row()
        other.ages, other.thirds, other.steps, other.marks = [*self.ages], [*self.thirds], self.steps, [*self.marks]
        return other

    def step(self, new: int) -> None:
        if new:
            self.marks += [int(self.steps) * 100 + len(self.ages) + token for token in range(new)]
            self.marks[0] = int(self.steps) * 100
            self.ages = [age + 1 for age in self.ages + [-1] * new]
            missing = -(-len(self.ages) // STRIDE) - len(self.thirds)
            self.thirds = [third + 1 for third in self.thirds + [7.0] * missing]
            self.steps += 1

    def cut(self, length: int) -> None:
        del self.ages[length:]
        del self.marks[length:]
        del self.thirds[-(-length // STRIDE) :]
        if not length:
            self.steps = 0.5


def check(layer, rows: list[Row]) -> None:
    """Compare, the entries behind each row's end too."""
    steps, age, third = (layer.state(name) for name in ("steps", "age", "third"))
    longest = layer.max_seq_len
    assert steps.shape == (len(rows), 4, 2)
    assert age.shape == (len(rows), 2, longest) and third.shape == (len(rows), 2, -(-longest // STRIDE), 1)
    for i, row in enumerate(rows):
        assert (steps[i] == row.steps).all()
        assert age[i].tolist() == [row.ages + [-1] * (longest - len(row.ages))] * 2
        assert third[i, ..., 0].tolist() == [row.thirds + [7.0] * (third.shape[2] - len(row.thirds))] * 2
        marks = [[mark] * 2 for mark in row.marks + [-5] * (longest - len(row.marks))]
        assert layer.state("mark")[i].tolist() == [marks] * 2


def zeros(rows: int, counts: list[int]) -> torch.Tensor:
    return torch.zeros(rows, max(1, *counts), 2, 4)


class StateMachine(RuleBasedStateMachine):
    """Random calls to a cache, and the same to lists."""

    @initialize(num_rows=st.integers(1, 3))
    def make(self, num_rows: int) -> None:
        self.cache = PagedKVCache(GEOMETRY, num_rows=num_rows, num_pages=1, selector=Ages(), growable=True)
        self.rows = [Row() for _ in range(num_rows)]

    def counts(self, data: st.DataObject, most: int) -> list[int]:
        return [data.draw(st.integers(0, most)) for _ in self.rows]

    @rule(data=st.data(), most=st.sampled_from([1, 1, 6]))
    def step(self, data: st.DataObject, most: int) -> None:
        counts = self.counts(data, most)
        k = zeros(len(self.rows), counts)
        for layer in self.cache.layers:
            layer.append(k, k, counts)
            self.cache.selector.observe(k, layer)
        for row, new in zip(self.rows, counts, strict=True):
            row.step(new)

    @rule(data=st.data())
    def step_that_fails(self, data: st.DataObject) -> None:
        counts = self.counts(data, 5)
        k = zeros(len(self.rows), counts)
        self.cache.layers[0].append(k, k, counts)
        self.cache.selector.observe(k, self.cache.layers[0])
        self.cache.selector.observe(k, self.cache.layers[0])
        self.cache.abort()

    @rule(data=st.data(), steps=st.integers(0, 4))
    def steps_over_a_static_cache(self, data: st.DataObject, steps: int) -> None:
        longest = max(len(row.ages) for row in self.rows)
        static = StaticCache(self.cache, longest + 5)
        active = data.draw(st.sets(st.integers(0, len(self.rows) - 1)))
        leaves = data.draw(st.integers(-2, len(self.rows) - 1))
        if leaves >= 0:
            static.free(leaves)
            self.rows[leaves] = Row()
        static.set_active(sorted(active))
        k = torch.zeros(len(self.rows), 2, 4)
        for _ in range(steps):
            for layer in static.layers:
                layer.append(k, k)
                self.cache.selector.observe(k[:, None], layer)
            for i, row in enumerate(self.rows):
                row.step(int(i in active))
        for layer in static.layers:
            check(layer, self.rows)
        static.release()

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, target = (data.draw(st.integers(0, len(self.rows) - 1)) for _ in range(2))
        self.cache.fork(source, target)
        self.rows[target] = self.rows[source].copy()

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        self.cache.free(row)
        self.rows[row] = Row()

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.rows) - 1))
        length = data.draw(st.integers(0, len(self.rows[row].ages)))
        empty = not self.rows[row].ages
        self.cache.truncate(row, length)
        if not empty:
            self.rows[row].cut(length)

    @rule(data=st.data())
    def select_rows(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.cache.select_rows(chosen)
        self.rows = [self.rows[row].copy() for row in chosen]

    @invariant()
    def every_row_reads_back(self) -> None:
        for layer in self.cache.layers:
            check(layer, self.rows)


StateMachine.TestCase.settings = hypothesis.settings(max_examples=60, stateful_step_count=20, deadline=None)
TestRandomCalls = StateMachine.TestCase


class Watching(Ages):
    """Selects everything, and notes what it is shown."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def observe(self, q, layer) -> None:
        self.calls.append(("observe", layer.index, q.shape[1], layer.new_tokens.tolist(), dict(layer.scratch)))

    def select(self, q, layer, budget):
        self.calls.append(("select", layer.index, dict(layer.scratch)))
        layer.scratch[f"from {layer.index}"] = True
        g = layer.geometry
        return Selection.everything(layer.seq_lens, g.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=1)

    def finish(self, q, layer, kept, out, lse):
        self.weights = ops.attention_weights(q, layer.k_pages, layer.page_table, layer.seq_lens, kept, lse)
        self.calls.append(("finish", layer.index, kept.lengths.tolist()))
        return 2 * out, lse + layer.index


@pytest.mark.parametrize("static", [False, True])
def test_a_step_is_shown_to_the_selector_and_its_scratch_passes_from_layer_to_layer(static: bool) -> None:
    selector = Watching()
    cache, _, _ = fill(GEOMETRY, [5, 0, 4], selector)
    attention = TwilightAttention(selector, NoPruning())
    layers = cache.layers
    if static:
        held = StaticCache(cache, 8)
        held.set_active([0, 1, 2])
        layers = held.layers
    q, k = torch.randn(3, 4, 4), torch.randn(3, 2, 4)
    for _ in range(2):
        for layer in layers:
            out, lse = attention.decode(q, k, k, layer)
            pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
            dense, dense_lse = ops.dense_attention(q[:, None], *pages, max_seq_len=layer.max_seq_len)
            torch.testing.assert_close(out, 2 * dense[:, 0])
            torch.testing.assert_close(lse, dense_lse[:, 0] + layer.index)
        length = 1 + int(layers[0].seq_lens[1])
        assert selector.calls == [
            ("select", 0, {}),
            ("finish", 0, [[4 + length] * 2, [length - 1] * 2, [3 + length] * 2]),
            ("select", 1, {"from 0": True}),
            ("finish", 1, [[4 + length] * 2, [length - 1] * 2, [3 + length] * 2]),
        ]
        assert selector.weights.sum(-1).flatten().tolist() == pytest.approx([1.0] * 12, abs=1e-5)
        selector.calls.clear()
    attention.min_context = 1000
    for layer in layers:
        attention.decode(q, k, k, layer)
    assert selector.calls == [("observe", 0, 1, [1, 1, 1], {}), ("observe", 1, 1, [1, 1, 1], {})]


def test_an_aborted_step_forgets_its_scratch() -> None:
    selector = Watching()
    cache, _, _ = fill(GEOMETRY, [5], selector)
    k = torch.zeros(1, 2, 4)
    TwilightAttention(selector, NoPruning()).decode(torch.zeros(1, 4, 4), k, k, cache.layers[0])
    assert cache.layers[1].scratch
    cache.abort()
    assert not cache.layers[1].scratch


def test_new_tokens_are_those_of_the_step() -> None:
    cache, _, _ = fill(GEOMETRY, [5, 2], Ages())
    k = torch.zeros(2, 3, 2, 4)
    for layer in cache.layers:
        layer.append(k, k, [3, 0])
    assert cache.layers[0].new_tokens.tolist() == [3, 0]
    cache.select_rows([1, 0, 0])
    assert cache.layers[0].new_tokens.tolist() == [0, 3, 3]


def test_what_is_kept_is_counted() -> None:
    cache, _, _ = fill(GEOMETRY, [9, 2], Ages())
    # For each of 2 layers and 2 rows: 4 query heads of 2 doubles; 2 kv heads of 9 ints, of 3 floats and of 9 pairs of
    # longs, with a spare entry behind each.
    assert cache.nbytes()["state"] == 2 * 2 * (4 * 2 * 8 + 2 * 10 * 4 + 2 * 4 * 4 + 2 * 10 * 16)
    assert Ages().bytes_per_token(GEOMETRY) == pytest.approx(4 + 4 / 3 + 16)
    spec = StateSpec("each", (5,), torch.float16, per="token", heads="query")
    assert spec.bytes_per_token(GEOMETRY) == 2 * 5 * 2  # two query heads a kv head


def test_mistakes_are_named() -> None:
    cache, _, _ = fill(GEOMETRY, [9], Ages())
    layer = cache.layers[0]
    with pytest.raises(ValueError, match=r"no 'agee' \(there is: 'steps', 'age', 'third', 'mark'\)"):
        layer.state("agee")
    with pytest.raises(ValueError, match=r"age: expected shape \[1, 2, 9\], got \[1, 2, 8\]"):
        layer.update_state("age", torch.zeros(1, 2, 8))
    entries = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"age: expected shape \[1, 2, 3\], got \[1, 2, 2\]"):
        layer.update_state("age", torch.zeros(1, 2, 2), entries)
    with pytest.raises(ValueError, match="entries: 'steps' has one entry a row; leave them out"):
        layer.update_state("steps", torch.zeros(1, 4, 3, 2), entries)

    class Twice(Selector):
        def state(self, geometry):
            return (StateSpec("a", (), torch.float32), StateSpec("a", (1,), torch.float32))

    with pytest.raises(ValueError, match=r"state: expected different names, got \['a', 'a'\]"):
        PagedKVCache(GEOMETRY, num_rows=1, num_pages=1, selector=Twice())
    with pytest.raises(ValueError, match="its cache was made for"):
        attention = TwilightAttention(Ages())
        other, _, _ = fill(GEOMETRY, [9])
        attention.decode(torch.zeros(1, 4, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), other.layers[0])
