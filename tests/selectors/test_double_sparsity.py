"""Double Sparsity: labels, their scores, and the file that says which channels they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Budget, Geometry, PagedKVCache, UniformBudget
from twilight.errors import CalibrationError
from twilight_selectors.double_sparsity import DoubleSparsity

KEYS = torch.tensor(
    [
        [0.1, 2, -0.3, 0, 1.5, -0.2, 0.1, 0.3],
        [0.2, -1, 0.1, 0.4, 0.5, 0.3, -0.1, 0],
        [0, 1.2, 0.2, -0.1, -0.8, 0.1, 0.2, -0.3],
        [-0.1, 0.3, 0, 0.2, 2.4, -0.4, 0.3, 0.1],
    ]
)
QUERY = torch.tensor([0.2, 1, -0.1, 0.3, 0.5, 0.2, 0, -0.2])


def _write(path: Path, orders: dict[int, list[list[int]]]) -> str:
    path.write_text(json.dumps({"layers": {str(layer): rows for layer, rows in orders.items()}}))
    return str(path)


@pytest.fixture
def orders() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.permutation(16).tolist() for _ in range(2)]


@pytest.mark.parametrize("label_bits", [4, 16])
def test_worked_example(tmp_path: Path, label_bits: int) -> None:
    path = _write(tmp_path / "c.json", {0: [[1, 4, 0, 2, 3, 5, 6, 7]]})
    selector = DoubleSparsity(path, channels=2, label_bits=label_bits)
    cache = PagedKVCache(Geometry(1, 1, 1, 8, 4, torch.float32), num_rows=1, num_pages=1, selector=selector)
    cache.layers[0].append(KEYS[None, :, None], KEYS[None, :, None])
    for count, expected in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3])):
        budget = Budget(torch.tensor([[count]], dtype=torch.int32), count)
        assert lists(selector.select(QUERY[None, None], cache.layers[0], budget)) == [[expected]]


@pytest.mark.parametrize(("label_bits", "channels"), [(2, 8), (4, 6), (16, 6)])
@pytest.mark.parametrize("group", [1, 3])
def test_selects_the_tokens_whose_labels_score_highest(
    tmp_path: Path, orders: list[list[int]], label_bits: int, channels: int, group: int
) -> None:
    lengths, count = [41, 9, 1, 0], 7
    path = _write(tmp_path / "c.json", {4: orders, 9: orders[::-1]})
    geometry = Geometry(2, 2 * group, 2, 16, 4, torch.float32, layer_ids=(4, 9))
    selector = DoubleSparsity(path, channels, label_bits)
    cache, keys, _ = fill(geometry, lengths, selector)
    q = 2 * torch.randn(4, 2 * group, 16)
    for place, (layer, order) in enumerate(zip(cache.layers, (orders, orders[::-1]), strict=True)):
        budget = UniformBudget(count).resolve(layer.seq_lens, 2, max_seq_len=41)
        chosen = lists(selector.select(q, layer, budget))
        for row, length in enumerate(lengths):
            for head in range(2):
                mine = order[head][:channels]
                total = np.zeros(length)
                for query in range(head * group, (head + 1) * group) if length else ():
                    labels = [keys[place][row, token, head, mine].numpy() for token in range(length)]
                    read = [label if label_bits == 16 else oracles.dequantize(label, label_bits) for label in labels]
                    total += oracles.softmax(np.array(read) @ oracles.array(q[row, query, mine]) / 4)
                best = sorted(range(length), key=lambda token: -total[token])[:count]
                assert chosen[row][head] == sorted(best)


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_combines_the_group_as_it_is_told(tmp_path: Path, orders: list[list[int]], reduce: str) -> None:
    path = _write(tmp_path / "c.json", {0: orders})
    selector = DoubleSparsity(path, 6, 16, reduce=reduce)
    cache, keys, _ = fill(Geometry(1, 6, 2, 16, 4, torch.float32), [41], selector)
    # One head far louder than the others: its sum and its softmax are not the same order.
    q = torch.randn(1, 6, 16) * torch.tensor([8.0, 1, 1, 1, 8, 1])[:, None]
    budget = UniformBudget(7).resolve(cache.layers[0].seq_lens, 2, max_seq_len=41)
    chosen = lists(selector.select(q, cache.layers[0], budget))
    for head in range(2):
        mine = orders[head][:6]
        scores = oracles.array(q[0, 3 * head : 3 * head + 3, mine]) @ oracles.array(keys[0][0, :, head, mine]).T / 4
        heads = [oracles.softmax(row) if reduce == "softmax" else row for row in scores]
        total = np.max(heads, 0) if reduce == "max" else np.sum(heads, 0)
        assert chosen[0][head] == sorted(np.argsort(-total)[:7].tolist())


@pytest.mark.parametrize("label_bits", [2, 4, 16])
def test_labels_one_by_one_equal_at_once(tmp_path: Path, orders: list[list[int]], label_bits: int) -> None:
    selector = DoubleSparsity(_write(tmp_path / "c.json", {0: orders}), 4, label_bits)
    geometry = Geometry(1, 2, 2, 16, 4)
    keys = torch.randn(1, 7, 2, 16).bfloat16()
    once, steps = (PagedKVCache(geometry, num_rows=1, num_pages=2, selector=selector) for _ in range(2))
    once.layers[0].append(keys, keys)
    for step in range(7):
        steps.layers[0].append(keys[:, step], keys[:, step])
    for spec in selector.metadata(geometry):
        assert torch.equal(once.layers[0].metadata(spec.name), steps.layers[0].metadata(spec.name))


def test_bytes_by_hand(tmp_path: Path, orders: list[list[int]]) -> None:
    path = _write(tmp_path / "c.json", {0: orders})
    geometry = Geometry(1, 2, 2, 16)
    assert DoubleSparsity(path, 8, 4).bytes_per_token(geometry) == 4 + 4  # codes, and a pair of halves
    assert DoubleSparsity(path, 8, 2).bytes_per_token(geometry) == 2 + 4
    assert DoubleSparsity(path, 8, 16).bytes_per_token(geometry) == 16


def test_the_statistic_of_a_file_that_has_several(tmp_path: Path, orders: list[list[int]]) -> None:
    other = [row[::-1] for row in orders]
    path = tmp_path / "c.json"
    path.write_text(json.dumps({f"model.layers.0.self_attn.{name}_proj": rows
                                for name, rows in (("k", other), ("qk", orders))}))  # fmt: skip
    for statistic, expected in ((None, orders), ("qk", orders), ("k", other)):
        selector = DoubleSparsity(str(path), 4, statistic=statistic)
        selector.prepare(Geometry(1, 2, 2, 16))
        assert selector.label_channels(0).tolist() == [row[:4] for row in expected]


def _prepare(path: str | None, **options: Any) -> None:
    selector = DoubleSparsity(path, **{"channels": 4, **options})
    PagedKVCache(Geometry(2, 4, 2, 16), num_rows=1, num_pages=1, selector=selector)


def test_missing_calibration_says_how_to_make_it(tmp_path: Path) -> None:
    for path in (None, str(tmp_path / "nowhere.json"), str(tmp_path)):
        with pytest.raises(CalibrationError, match="twilight calibrate double_sparsity --model PATH"):
            _prepare(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_bits": 8}, "label_bits: expected 2, 4 or 16, got 8"),
        ({"label_bits": 2, "channels": 6}, "channels: expected a multiple of 4 in 2 bits, got 6"),
        ({"label_bits": 2, "channels": 0}, "channels: expected a multiple of 4 in 2 bits, got 0"),
        ({"channels": 3}, "channels: expected an even number of at least 2, got 3"),
        ({"channels": 0}, "channels: expected an even number of at least 2, got 0"),
        ({"statistic": "v"}, "statistic: expected 'qk', 'q' or 'k', got 'v'"),
        ({"channels": 18}, "channels: expected at most head_dim=16, got 18"),
    ],
)
def test_refuses_parameters_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _prepare(None, **options)
