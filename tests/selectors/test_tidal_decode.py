"""TidalDecode: which layers select, and that the others read the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Budget, Geometry, NoPruning, Selection, TwilightAttention, UniformBudget
from twilight.graph import StaticCache
from twilight_selectors.tidal_decode import TidalDecode

LENGTHS = [40, 9, 1]


def best(q: torch.Tensor, keys: torch.Tensor, count: int, reduce: str) -> list[int]:
    """Return the `count` tokens of one kv head, the newest among them. `q [G, d]`, `keys [n, d]`."""
    logits = np.array([oracles.array(keys) @ oracles.array(head) for head in q]) / np.sqrt(q.shape[-1])
    if reduce == "softmax":
        total = sum(oracles.softmax(row) for row in logits)
    else:
        total = logits.sum(0) if reduce == "sum" else logits.max(0)
    n = len(keys)
    order = sorted(range(n), key=lambda i: (i != n - 1, -total[i]))
    return sorted(order[: min(count, n)])


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attend_all", [False, True])
@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_layers_read_what_the_nearest_selecting_layer_found(static: bool, attend_all: bool, reduce: str) -> None:
    ids = (2, 3, 5, 6, 7)
    geometry = Geometry(5, 6, 2, 8, 4, torch.float32, layer_ids=ids)
    selector = TidalDecode(reselect=6, attend_all=attend_all, reduce=reduce)
    cache, keys, values = fill(geometry, LENGTHS, selector, spare=9)
    layers = cache.layers
    if static:
        held = StaticCache(cache, 44)
        held.set_active(range(3))
        layers = held.layers
    attention = TwilightAttention(selector, NoPruning(), 7)
    select, seen = selector.select, []
    selector.select = lambda q, layer, budget: seen.append(select(q, layer, budget)) or seen[-1]  # type: ignore
    whole = [[keys[i][row, :n] for row, n in enumerate(LENGTHS)] for i in range(5)]
    for _ in range(3):
        queries = []
        for i, layer in enumerate(layers):
            q, k = 2 * torch.randn(3, 6, 8), torch.randn(3, 2, 8)
            whole[i] = [torch.cat([rows, k[row : row + 1]]) for row, rows in enumerate(whole[i])]
            queries.append(q)
            attention.decode(q, k, k, layer)
            selection = seen[-1]
            source = 0 if i < 3 else 3
            for row in range(3):
                for head in range(2):
                    wanted = best(queries[source][row, 3 * head : 3 * head + 3], whole[source][row][:, head], 7, reduce)
                    if attend_all and i == source:
                        assert selection.granularity == 4
                        assert selection.num_tokens(layer.seq_lens)[row].tolist() == [len(whole[i][row])] * 2
                    else:
                        assert selection.granularity == 1 and lists(selection)[row][head] == wanted


def test_a_layer_with_another_budget_takes_more_or_less_of_the_same_scores() -> None:
    geometry = Geometry(3, 2, 1, 8, 4, torch.float32, layer_ids=(0, 1, 2))
    selector = TidalDecode(reselect=0)
    cache, keys, _ = fill(geometry, [30], selector)
    q = torch.randn(1, 2, 8)
    everything = UniformBudget(5).resolve(cache.seq_lens, 1, max_seq_len=30)
    assert selector.select(q, cache.layers[0], everything).granularity == 4
    for layer, count in ((1, 3), (2, 11), (2, 3)):
        budget = Budget(torch.tensor([[count]], dtype=torch.int32), count)
        chosen = lists(selector.select(torch.randn(1, 2, 8), cache.layers[layer], budget))
        assert chosen == [[best(q[0], keys[0][0, :, 0], count, "softmax")]]


def test_one_list_serves_layers_of_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _, _ = fill(Geometry(3, 2, 1, 8, 4, torch.float32), [30], TidalDecode(reselect=0))
    layers, select = cache.layers, cache.selector.select
    budget = layers[0].budget(UniformBudget(5))
    select(torch.randn(1, 2, 8), layers[0], budget)
    assert select(torch.randn(1, 2, 8), layers[1], budget) is select(torch.randn(1, 2, 8), layers[2], budget)


def test_a_new_step_selects_anew_even_without_its_first_layer() -> None:
    cache, keys, _ = fill(Geometry(2, 2, 1, 8, 4, torch.float32, layer_ids=(0, 9)), [30], TidalDecode(reselect=0))
    for layer in cache.layers:
        cache.selector.select(torch.randn(1, 2, 8), layer, layer.budget(UniformBudget(5)))
    k = torch.randn(1, 1, 8)
    for layer in cache.layers:
        layer.append(k, k)
    q = torch.randn(1, 2, 8)
    chosen = cache.selector.select(q, cache.layers[1], cache.layers[1].budget(UniformBudget(5)))
    assert isinstance(chosen, Selection) and chosen.granularity == 4  # no list of the step before is left


@pytest.mark.parametrize(
    ("ids", "reselect", "wanted"),
    [
        (tuple(range(2, 32)), None, {2, 13}),  # Llama 3 with two dense layers
        (tuple(range(2, 32)), 12, {2, 12}),
        (tuple(range(2, 7)), None, {2, 3}),
        ((0,), None, {0}),
        ((4, 9), 4, {4}),
    ],
)
def test_selecting_layers_and_what_they_read(ids: tuple[int, ...], reselect: int | None, wanted: set[int]) -> None:
    geometry = Geometry(len(ids), 8, 2, 64, dtype=torch.bfloat16, layer_ids=ids)
    selector = TidalDecode(reselect)
    selector.prepare(geometry)
    assert selector.selecting_layers(geometry) == wanted
    assert selector.bytes_per_token(geometry) == pytest.approx(len(wanted) / len(ids) * 128)


def test_refuses_a_layer_that_is_not_sparse() -> None:
    with pytest.raises(ValueError, match="reselect: expected one of the sparse layers, 2, 3, got 1"):
        TidalDecode(1).prepare(Geometry(2, 8, 2, 64, layer_ids=(2, 3)))
    with pytest.raises(ValueError, match="reduce: expected"):
        TidalDecode(reduce="mean")
