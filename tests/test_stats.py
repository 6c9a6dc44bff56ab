"""Stats over several steps: what a report is made from."""

from __future__ import annotations

import pytest
import torch

from tests.caches import fill
from twilight import Geometry, NoPruning, TwilightAttention
from twilight.stats import Record, Stats, spread, token_bytes
from twilight_selectors.streaming_llm import StreamingLLM


def test_summary_has_a_row_a_layer() -> None:
    geometry = Geometry(2, 4, 2, 8, 4, layer_ids=(3, 7))
    attention = TwilightAttention(StreamingLLM(), NoPruning(), 6, min_context=10, collect_stats=True)
    cache, _, _ = fill(geometry, [8, 4], attention.selector)
    for _ in range(4):
        for layer in reversed(cache.layers):
            q, k = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 2, 8).bfloat16()
            attention.decode(q, k, k, layer)
    # Lengths (9, 5) and (10, 6) run densely, (11, 7) and (12, 8) read six tokens a row.
    rows = attention.stats.summary()
    assert [row["layer"] for row in rows] == [3, 7]
    for row in rows:
        assert (row["steps"], row["dense_steps"], row["seq_len"]) == (4, 2, (9 + 5 + 10 + 6 + 11 + 7 + 12 + 8) / 8)
        assert row["b0"] == row["b1_group"]
        assert row["b0"]["mean"] == pytest.approx((9 + 5 + 10 + 6 + 4 * 6) / 8)
        assert row["mass"] == {"mean": 1.0, "p5": 1.0, "p95": 1.0}
        assert row["kv_bytes"] == (9 + 5 + 10 + 6 + 4 * 6) * 2 * 32
        assert row["dense_bytes"] == (9 + 5 + 10 + 6 + 11 + 7 + 12 + 8) * 2 * 32
    assert attention.stats.query_heads(7).tolist() == [(9 + 5 + 10 + 6 + 4 * 6) / 8] * 4
    # A record keeps the lengths of its own step, not those of the cache.
    assert [record.seq_lens.tolist() for record in attention.stats.by_layer()[3]] == [[9, 5], [10, 6], [11, 7], [12, 8]]
    attention.stats.clear()
    assert attention.stats.summary() == [] and str(attention.stats) == "no steps yet"
    assert str(Stats(enabled=False)) == "no stats: attach with stats=True"


def test_the_table_has_each_number_in_its_column() -> None:
    stats = Stats(enabled=True)
    numbers = (torch.full((1, heads), value) for heads, value in ((2, 400.0), (4, 30.0), (2, 50.0), (4, 0.875)))
    none = torch.zeros(1, 2)
    stats.records = [
        Record(3, Geometry(1, 4, 2, 8, 4), torch.tensor([1000]), *numbers, 0.0, none, 0, estimated=False, dense=False)
    ]
    head, line = str(stats).splitlines()
    assert head.split() == [
        "layer",
        "steps",
        "dense",
        "tokens",
        "B0",
        "B1",
        "kept",
        "B1",
        "read",
        "mass",
        "KV",
        "bytes",
    ]
    assert line.split() == ["3", "1", "0", "1000", "400", "30", "50", "0.875", "5.0%"]


def test_spread_by_hand() -> None:
    values = torch.arange(101, dtype=torch.int32)
    assert spread(values) == {"mean": 50.0, "p5": 5.0, "p95": 95.0}


def test_token_bytes() -> None:
    assert token_bytes(Geometry(1, 1, 1, 128)) == 512
    assert token_bytes(Geometry(1, 1, 1, 128, dtype=torch.float32)) == 1024
