"""TwilightAttention: the stages in order, and the stats that they leave."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import (
    Geometry,
    NoPruning,
    OutOfPagesError,
    PagedKVCache,
    Selection,
    Selector,
    TopP,
    TwilightAttention,
    ops,
)
from twilight_selectors.full import Full
from twilight_selectors.oracle_topp import OracleTopP
from twilight_selectors.quest import Quest
from twilight_selectors.streaming_llm import StreamingLLM

GEOMETRY = Geometry(1, 6, 2, 16, 4, torch.float32)
LENGTHS = [61, 30, 5]


def _step(
    attention: TwilightAttention,
    lengths: list[int] = LENGTHS,
    geometry: Geometry = GEOMETRY,
    sharpness: float = 2.0,
    selector: Selector | None = None,
):
    """Decode one token; return (out, lse), q, keys and values with the new token in them, and the layer."""
    cache, keys, values = fill(geometry, lengths, selector or attention.selector)
    b, layer = len(lengths), cache.layers[0]
    q = (sharpness * torch.randn(b, geometry.num_q_heads, geometry.head_dim)).to(geometry.dtype)
    k, v = (torch.randn(b, geometry.num_kv_heads, geometry.head_dim).to(geometry.dtype) for _ in range(2))
    result = attention.decode(q, k, v, layer)
    whole = []
    for rows, new in ((keys[0], k), (values[0], v)):
        rows = torch.cat([rows, torch.full_like(rows[:, :1], torch.nan)], dim=1)
        for row, length in enumerate(lengths):
            rows[row, length] = new[row]
        whole.append(rows)
    return result, q, whole[0], whole[1], layer


def _tokens_read(q: torch.Tensor, keys: torch.Tensor, length: int, candidates: list[list[int]], p: float):
    """Return what top-p over the 4-bit keys of one row keeps: for each query head, its set and its estimated mass."""
    kept = []
    for head in range(q.shape[0]):
        mine = candidates[head // (q.shape[0] // len(candidates))]
        read = [oracles.dequantize(keys[t, head // (q.shape[0] // len(candidates))].numpy()) for t in mine]
        logits = np.array(read) @ oracles.array(q[head]) / math.sqrt(q.shape[-1])
        places = oracles.top_p(logits.tolist(), p)
        kept.append(({mine[place] for place in places}, oracles.softmax(logits)[sorted(places)].sum()))
    return kept


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_everything_at_mass_one_is_dense_attention(dtype: torch.dtype, atol: float) -> None:
    geometry = Geometry(1, 6, 2, 16, 4, dtype)
    (out, lse), q, keys, values, layer = _step(TwilightAttention(Full(), TopP(1.0)), geometry=geometry)
    pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
    dense, dense_lse = ops.dense_attention(q[:, None], *pages, max_seq_len=62)
    torch.testing.assert_close(out, dense[:, 0], atol=atol, rtol=atol)
    torch.testing.assert_close(lse, dense_lse[:, 0], atol=1e-5, rtol=1e-5)
    for row, length in enumerate(LENGTHS):
        for head in range(6):
            k, v = (oracles.array(part[row, : length + 1, head // 3]) for part in (keys, values))
            want, want_lse = oracles.attend(oracles.array(q[row, head]), k, v, 0.25)
            assert oracles.array(out[row, head]).tolist() == pytest.approx(want.tolist(), abs=atol, rel=atol)
            assert float(lse[row, head]) == pytest.approx(want_lse, abs=1e-5)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_stages_by_loops_and_stats_of_what_they_did(p: float) -> None:
    attention = TwilightAttention(StreamingLLM(), TopP(p), 20, collect_stats=True)
    (out, lse), q, keys, values, layer = _step(attention)
    (record,) = attention.stats.records
    assert (record.layer, record.dense, record.estimated) == (0, False, True)
    assert record.seq_lens.tolist() == [62, 31, 6]
    for row, old in enumerate(LENGTHS):
        length = old + 1
        window = list(range(length)) if length <= 20 else [0, 1, 2, 3, *range(length - 16, length)]
        kept = _tokens_read(q[row], keys[row], length, [window] * 2, p)
        for head in range(6):
            mine, mass = kept[head]
            assert int(record.b1_query[row, head]) == len(mine)
            assert float(record.mass[row, head]) == pytest.approx(mass, abs=1e-5)
            assert mass >= p
        for head in range(2):
            union = sorted(set().union(*(mine for mine, _ in kept[3 * head : 3 * head + 3])))
            assert int(record.b0[row, head]) == len(window) == min(20, length)
            assert int(record.b1_group[row, head]) == len(union)
            for query in range(3 * head, 3 * head + 3):
                k, v = (oracles.array(part[row, union, head]) for part in (keys, values))
                want, want_lse = oracles.attend(oracles.array(q[row, query]), k, v, 0.25)
                assert out[row, query].tolist() == pytest.approx(want.tolist(), abs=1e-5)
                assert float(lse[row, query]) == pytest.approx(want_lse, abs=1e-5)


def test_more_mass_reads_no_less() -> None:
    read = []
    for p in (0.05, 0.3, 0.6, 0.9, 0.99, 1.0):
        torch.manual_seed(0)
        attention = TwilightAttention(Full(), TopP(p), collect_stats=True)
        _step(attention)
        read.append(attention.stats.records[0].b1_group)
    for less, more in zip(read, read[1:], strict=False):
        assert (less <= more).all()
    assert (read[0] < read[-1]).all() and read[-1][0].tolist() == [62, 62]


def test_no_pruning_reads_what_was_proposed() -> None:
    attention = TwilightAttention(Quest(), NoPruning(), 12, collect_stats=True)
    (out, _), q, keys, values, layer = _step(attention)
    (record,) = attention.stats.records
    assert not record.estimated and record.mass.shape == record.b1_query.shape == (3, 6)
    assert torch.equal(record.b0, record.b1_group) and (record.mass == 1).all()
    budget = attention.budget.resolve(layer.seq_lens, 2, max_seq_len=62)
    pages = lists(attention.selector.select(q, layer, budget))
    for row, length in enumerate(LENGTHS):
        for head in range(6):
            tokens = oracles.tokens_of(pages[row][head // 3], 4, length + 1)
            assert int(record.b0[row, head // 3]) == int(record.b1_query[row, head]) == len(tokens)
            k, v = (oracles.array(part[row, tokens, head // 3]) for part in (keys, values))
            want, _ = oracles.attend(oracles.array(q[row, head]), k, v, 0.25)
            assert out[row, head].tolist() == pytest.approx(want.tolist(), abs=1e-5)


def test_short_contexts_run_densely_bit_for_bit_and_say_so() -> None:
    attention = TwilightAttention(Quest(), TopP(0.5), 4, min_context=62, collect_stats=True)
    (out, lse), q, _, _, layer = _step(attention)
    pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
    dense, dense_lse = ops.dense_attention(q[:, None], *pages, max_seq_len=62)
    assert torch.equal(out, dense[:, 0]) and torch.equal(lse, dense_lse[:, 0])
    (record,) = attention.stats.records
    assert record.dense and record.b0.tolist() == [[62] * 2, [31] * 2, [6] * 2]
    assert record.b1_query.shape == (3, 6) and torch.equal(record.b1_group, record.b0)
    assert record.kv_bytes() == record.dense_bytes() == (62 + 31 + 6) * 2 * 2 * 16 * 4
    _step(attention, [62, 3])
    assert not attention.stats.records[-1].dense  # one token more than min_context


def test_bytes_by_hand() -> None:
    geometry = Geometry(1, 2, 1, 8, 4, torch.float32)
    attention = TwilightAttention(Quest(metadata_type="native"), TopP(0.5), 8, collect_stats=True)
    _step(attention, [11], geometry)
    (record,) = attention.stats.records
    kept = int(record.b1_group)
    assert int(record.b0) == 8 and 1 <= kept < 8
    # Two vectors of 8 floats a page of 4; 4 bytes of codes and 4 of scale and zero a candidate; K and V a kept token.
    assert record.kv_bytes() == 12 * 16 + 8 * 8 + kept * 64
    assert record.dense_bytes() == 12 * 64
    attention = TwilightAttention(Full(), NoPruning(), collect_stats=True)
    _step(attention, [11], geometry)
    assert attention.stats.records[0].kv_bytes() == 12 * 64


def test_same_inputs_same_bits() -> None:
    attention = TwilightAttention(Quest(), TopP(0.8), 24)
    results = []
    for _ in range(20):
        torch.manual_seed(0)
        (out, lse), *_ = _step(attention)
        results.append((out.numpy().tobytes(), lse.numpy().tobytes()))
    assert len(set(results)) == 1


def test_stats_that_nobody_asked_for_keep_nothing() -> None:
    class Counted(Full):
        asked = 0

        def bytes_per_token(self, geometry: Geometry) -> float:
            Counted.asked += 1
            return 0.0

    attention = TwilightAttention(Counted())
    _step(attention)
    attention.min_context = 100
    _step(attention)
    assert attention.stats.records == [] and Counted.asked == 0


def test_nan_in_a_row_stays_in_that_row() -> None:
    outs = []
    for poisoned in (False, True):
        torch.manual_seed(0)
        attention = TwilightAttention(Quest(), TopP(0.8), 24)
        cache, _, _ = fill(GEOMETRY, LENGTHS, attention.selector)
        q, k, v = torch.randn(3, 6, 16), torch.randn(3, 2, 16), torch.randn(3, 2, 16)
        if poisoned:
            q[1] = k[1] = v[1] = torch.nan
        outs.append(attention.decode(q, k, v, cache.layers[0]))
    (clean, clean_lse), (dirty, dirty_lse) = outs
    # Not bit for bit: a row that is all NaN keeps all of its candidates, which pads the others' lists further.
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]])
    torch.testing.assert_close(dirty_lse[[0, 2]], clean_lse[[0, 2]])
    assert dirty[1].isnan().all()


@pytest.mark.parametrize("selector", [Full(), Quest(), StreamingLLM()], ids=lambda s: s.name)
@pytest.mark.parametrize("min_context", [0, 1000])
def test_nan_left_in_freed_pages_does_not_leak(selector: Selector, min_context: int) -> None:
    attention = TwilightAttention(selector, TopP(0.9), 8, min_context=min_context)
    cache = PagedKVCache(GEOMETRY, num_rows=2, num_pages=6, selector=selector)
    layer = cache.layers[0]
    poison = torch.full((2, 12, 2, 16), torch.nan)
    layer.append(poison, poison)
    cache.free(0)
    cache.free(1)
    layer.append(torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16), [9, 2])
    out, lse = attention.decode(torch.randn(2, 6, 16), torch.randn(2, 2, 16), torch.randn(2, 2, 16), layer)
    assert out.isfinite().all() and lse.isfinite().all()


def test_log_weight_of_a_selector_reaches_the_softmax() -> None:
    class Weighted(Selector):
        def select(self, q, layer, budget):
            indices = torch.tensor([[[0, 2, 5]] * 2], dtype=torch.int32)
            extra = torch.tensor([[[0.5, -1.0, 2.0]] * 5 + [[0.0, -torch.inf, 1.0]]])
            return Selection(indices, torch.tensor([[3, 3]], dtype=torch.int32), log_weight=extra)

    for pruner in (NoPruning(), TopP(1.0)):
        (out, lse), q, keys, values, _ = _step(TwilightAttention(Weighted(), pruner), [6])
        for head in range(6):
            k, v = (oracles.array(part[0, [0, 2, 5], head // 3]) for part in (keys, values))
            extra = np.array([0.0, -np.inf, 1.0] if head == 5 else [0.5, -1.0, 2.0])
            want, want_lse = oracles.attend(oracles.array(q[0, head]), k, v, 0.25, extra)
            assert out[0, head].tolist() == pytest.approx(want.tolist(), abs=1e-5)
            assert float(lse[0, head]) == pytest.approx(want_lse, abs=1e-5)


@pytest.mark.parametrize("selector", [Full(), OracleTopP(0.5)])
def test_the_scale_of_the_logits_reaches_every_stage(selector) -> None:
    # A scale of 0 makes every weight equal: all are tied, all are kept, and their exponentials are 1.
    attention = TwilightAttention(selector, TopP(0.5), collect_stats=True)
    cache, _, _ = fill(replace(GEOMETRY, scaling=0.0), [39], attention.selector)
    q = torch.randn(1, 6, 16)
    v = torch.ones(1, 2, 16)
    _, lse = attention.decode(q, v, v, cache.layers[0])
    assert attention.stats.records[0].b1_query.tolist() == [[40] * 6]
    assert lse.flatten().tolist() == pytest.approx([math.log(40)] * 6)


def _decode(layer, attention: TwilightAttention, **wrong: object) -> None:
    good = {"q": torch.zeros(3, 6, 16), "k": torch.zeros(3, 2, 16), "v": torch.zeros(3, 2, 16), **wrong}
    attention.decode(good["q"], good["k"], good["v"], layer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"q": torch.zeros(3, 4, 16)}, ValueError, r"q: expected shape \[3, 6, 16\], got \[3, 4, 16\]"),
        ({"q": torch.zeros(2, 6, 16)}, ValueError, r"q: expected shape \[3, 6, 16\], got \[2, 6, 16\]"),
        ({"q": torch.zeros(3, 6, 16).half()}, TypeError, "q: expected dtype float32, got float16"),
        ({"q": torch.zeros(3, 6, 16, device="meta")}, ValueError, "q: expected device cpu, got meta"),
        ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(3, 6, 16)}, ValueError, r"k: expected shape \[3, 2, 16\], got \[3, 6, 16\]"),
        ({"k": torch.zeros(3, 2, 2, 16), "v": torch.zeros(3, 2, 2, 16)}, ValueError, r"k: expected shape \[3, 2, 16\]"),
        ({"v": torch.zeros(3, 2, 8)}, ValueError, r"v: expected shape \[3, 2, 16\], got \[3, 2, 8\]"),
        ({"v": torch.zeros(3, 2, 16).double()}, TypeError, "v: expected dtype float32, got float64"),
    ],
)
def test_bad_input_leaves_the_cache_as_it_was(wrong: dict, error: type[Exception], message: str) -> None:
    attention = TwilightAttention(Quest(), collect_stats=True)
    cache, _, _ = fill(GEOMETRY, LENGTHS, attention.selector)
    before = cache.layers[0].k_pages.clone()
    with pytest.raises(error, match=message):
        _decode(cache.layers[0], attention, **wrong)
    assert cache.seq_lens.tolist() == LENGTHS and torch.equal(cache.layers[0].k_pages, before)
    assert attention.stats.records == []
    _decode(cache.layers[0], attention)
    assert cache.seq_lens.tolist() == [62, 31, 6]


def test_out_of_pages_leaves_the_cache_as_it_was() -> None:
    attention = TwilightAttention(Full())
    cache = PagedKVCache(GEOMETRY, num_rows=1, num_pages=1, selector=attention.selector)
    layer = cache.layers[0]
    layer.append(torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16))
    with pytest.raises(OutOfPagesError, match="1 new tokens need 1 pages of 4 tokens, 0 of 1 are free"):
        attention.decode(torch.zeros(1, 6, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), layer)
    assert cache.seq_lens.tolist() == [4] and cache.table.num_free == 0


def test_a_cache_without_the_selectors_metadata_is_named() -> None:
    cache, _, _ = fill(GEOMETRY, [9], Full())
    with pytest.raises(ValueError, match=r"no 'max' \(there is: none\).*selector=..."):
        cache.layers[0].metadata("max")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"selector": "quest"}, TypeError, "selector: expected a twilight.Selector, got str"),
        ({"selector": Quest}, TypeError, "selector: expected a twilight.Selector, got type"),
        ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
        ({"budget": 1.5}, ValueError, "budget: expected an int of tokens or a fraction"),
        ({"min_context": -1}, ValueError, "min_context: expected an int of at least 0 or 'auto', got -1"),
        ({"min_context": True}, ValueError, "min_context: expected an int of at least 0 or 'auto', got True"),
    ],
)
def test_refuses_bad_parameters(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TwilightAttention(**{"selector": Full(), **arguments})


@pytest.mark.parametrize("p", [0, 1.5, math.nan])
def test_pruner_refuses_a_mass_outside_its_range(p: float) -> None:
    with pytest.raises(ValueError, match=r"p: expected a float in \(0, 1\]"):
        TopP(p)


def test_a_cache_made_for_another_selector_is_refused_before_anything_is_written() -> None:
    cache, _, _ = fill(GEOMETRY, [5], Quest())
    q, k = torch.zeros(1, 6, 16), torch.zeros(1, 2, 16)
    for selector in (Quest(reduce="max"), Full()):
        with pytest.raises(ValueError, match=r"its cache was made for Quest\(.*\)"):
            TwilightAttention(selector).decode(q, k, k, cache.layers[0])
    assert cache.table.lengths == [5]


def test_an_observer_sees_each_stage_of_a_step():
    attention = TwilightAttention(Quest(), TopP(0.7), 0.5)
    seen = []
    attention.observer = seen.append
    (out, lse), q, *_, layer = _step(attention)
    (step,) = seen
    assert step.out is out and step.lse is lse and step.q is q and step.layer is layer and not step.one_launch
    # What it is shown is what was done: attention over the selection is the output, top-p of the logits the selection.
    assert ops.top_p(step.logits, step.candidates, layer.seq_lens, 0.7).selection.indices.equal(
        step.pruned.selection.indices
    )
    pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
    assert ops.sparse_attention(q, *pages, step.pruned.selection, sm_scale=0.25)[0].equal(out)

    attention.pruner = NoPruning()
    _step(attention)
    assert seen[1].logits is None and seen[1].candidates is not None
    attention.min_context = 1000
    (out, _), *_ = _step(attention)
    assert seen[2].candidates is None and seen[2].pruned is None and seen[2].out is out
    attention.observer = None
    _step(attention)
    assert len(seen) == 3
