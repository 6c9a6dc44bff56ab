"""Budgets added up: by hand."""

from __future__ import annotations

import pytest
import torch

from twilight import Geometry
from twilight.evaluation.reading import COLUMNS, Reading
from twilight.stats import Record

G = Geometry(2, 4, 2, 8, 4, torch.float32, layer_ids=(2, 3))
KINDS = {0: "dense, one of the first 2", 1: "dense, one of the first 2", 2: "sparse", 3: "sparse"}


def record(layer, lens, b1_query, b1_group, *, dense=False):
    rows = len(lens)
    return Record(
        layer, G, torch.tensor(lens), torch.full((rows, 2), 20), torch.tensor(b1_query), torch.tensor(b1_group),
        torch.ones(rows, 4), 3.0, torch.zeros(rows, 2, dtype=torch.int32), 0, True, dense,
    )  # fmt: skip


@pytest.fixture
def reading():
    found = Reading()
    found.add([record(2, [40, 50], [[1, 2, 3, 4], [5, 6, 7, 8]], [[3, 5], [7, 9]])])
    later = Reading()
    later.add([record(3, [40, 50], [[2, 2, 2, 2], [4, 4, 4, 4]], [[2, 2], [6, 6]])])
    found.merge(later)
    return found


def test_columns_are_means_over_layers_steps_and_heads(reading):
    row = reading.columns(KINDS)
    assert row["seq_len"] == 45 and row["b0"] == 20
    assert row["b1_query"] == pytest.approx((36 + 24) / 16)
    assert row["b1_group"] == pytest.approx((24 + 16) / 8)
    assert row["b1_query_fraction"] == pytest.approx((2.5 / 40 + 6.5 / 50 + 2 / 40 + 4 / 50) / 4)
    assert row["b1_group_fraction"] == pytest.approx((4 / 40 + 8 / 50 + 2 / 40 + 6 / 50) / 4)
    # A token: 2 of 8 channels in 4 bytes; 4-bit keys: 8 / 2 + 4 bytes; the selector 3 bytes a token and kv head.
    one = (90 * 2 * 3 + 80 * 8 + 24 * 64) + (90 * 2 * 3 + 80 * 8 + 16 * 64)
    assert row["kv_bytes"] == pytest.approx(one / 2)
    assert row["dense_kv_bytes"] == pytest.approx(2 * 90 * 2 * 64 / 2)
    assert row["kv_fraction"] == pytest.approx(one / (2 * 90 * 2 * 64))
    assert (row["sparse_layers"], row["dense_layers"]) == (2, 2)
    # Two layers more that are read whole.
    assert row["kv_fraction_all_layers"] == pytest.approx((one + 2 * 90 * 2 * 64) / (4 * 90 * 2 * 64))


def test_layers_with_a_window_are_in_neither_part(reading):
    windows = {**KINDS, 0: "dense, sliding window of 8 tokens"}
    row = reading.columns(windows)
    one = row["kv_fraction"] * 2
    assert row["kv_fraction_all_layers"] == pytest.approx((one + 1) / 3)
    assert row["dense_layers"] == 2


def test_the_table_has_every_head(reading):
    rows = reading.table(context=7)
    assert [(row["layer"], row["head"], row["kv_head"]) for row in rows[:4]] == [
        (2, 0, 0),
        (2, 1, 0),
        (2, 2, 1),
        (2, 3, 1),
    ]
    assert [row["b1_query"] for row in rows[:4]] == [3, 4, 5, 6]
    assert [row["b1_group"] for row in rows[:4]] == [5, 5, 7, 7]
    assert {row["context"] for row in rows} == {7} and len(rows) == 8


def test_a_second_step_weighs_as_much_as_a_first():
    found = Reading()
    found.add([record(2, [40], [[1, 1, 1, 1]], [[1, 1]])])
    found.add([record(2, [40], [[4, 4, 4, 4]], [[4, 4]]), record(2, [40], [[4, 4, 4, 4]], [[4, 4]])])
    assert found.columns(KINDS)["b1_query"] == 3


def test_nothing_decoded_is_no_number():
    row = Reading().columns(KINDS)
    assert [row[name] for name in COLUMNS] == [None] * len(COLUMNS)
    assert (row["sparse_layers"], row["dense_layers"]) == (2, 2)
