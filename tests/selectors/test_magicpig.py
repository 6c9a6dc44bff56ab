"""MagicPIG: what is drawn and with what weight, against loops over numpy; that the estimator is right on average."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import check_rows_alone, lists, observed, uneven_steps
from twilight import Budget, Geometry, NoPruning, PagedKVCache, Selection, TopP, TwilightAttention, UniformBudget
from twilight_selectors.magicpig import MagicPIG, collision_probability


def bits_of(projection: np.ndarray, vector: np.ndarray, tables: int, bits: int) -> list[tuple[bool, ...]]:
    """Return each table's bits of a vector."""
    signs = [float(vector @ projection[:, column]) > 0 for column in range(tables * bits)]
    return [tuple(signs[table * bits : (table + 1) * bits]) for table in range(tables)]


def chance(q: np.ndarray, key: np.ndarray, bits: int, tables: int) -> float:
    """Return the probability of two or more shared tables: a binomial's tail, term by term."""
    length = math.sqrt(q @ q) * math.sqrt(key @ key)
    cosine = max(-1.0, min(1.0, float(q @ key) / length)) if length else 0.0
    u = (1 - math.acos(cosine) / math.pi) ** bits
    return sum(math.comb(tables, met) * u**met * (1 - u) ** (tables - met) for met in range(2, tables + 1))


def centre_of(keys: torch.Tensor, sinks: int, local: int) -> np.ndarray:
    """Return the mean of a head's keys between the ends, rounded to bfloat16."""
    inside = oracles.array(keys)[sinks : max(sinks, len(keys) - local)]
    mean = inside.mean(0) if len(inside) else np.zeros(keys.shape[-1])
    return oracles.array(torch.tensor(mean).bfloat16())


def entries(selection: Selection, row: int, head: int) -> dict[int, list[float]]:
    """Return each selected token's weights, of the query heads of a kv head."""
    group = selection.log_weight.shape[1] // selection.indices.shape[1]
    count = int(selection.lengths[row, head])
    weights = selection.log_weight[row, head * group : (head + 1) * group, :count].T.tolist()
    return dict(zip(selection.indices[row, head, :count].tolist(), weights, strict=True))


@pytest.mark.parametrize(
    ("cosine", "expected"), [(0.0, 0.0097), (0.2, 0.087), (0.4, 0.443), (0.6, 0.943), (1.0, 1.0), (-1.0, 0.0)]
)
def test_probabilities_of_the_reference(cosine: float, expected: float) -> None:
    have = collision_probability(torch.tensor([cosine], dtype=torch.float64), 10, 150)
    assert float(have) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(("bits", "tables"), [(1, 2), (8, 75), (10, 150), (15, 40)])
def test_probability_is_a_binomial_tail_down_to_small_ones(bits: int, tables: int) -> None:
    cosines = np.concatenate([np.linspace(-0.9, 1, 20), [1 + 1e-9, -1 - 1e-9]])
    have = collision_probability(torch.tensor(cosines), bits, tables)
    for cosine, mine in zip(cosines, have.tolist(), strict=True):
        side = math.sqrt(max(0.0, 1 - cosine**2))
        want = chance(np.array([1.0, 0.0]), np.array([cosine, side]), bits, tables)
        assert mine == pytest.approx(want, rel=1e-5, abs=1e-14)  # a difference of numbers near 1


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("bits", "tables", "epsilon"), [(3, 6, 0.0), (5, 30, 1e-4), (15, 150, 0.0)])
def test_draws_and_weights_by_hand(
    bits: int, tables: int, epsilon: float, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twilight_selectors.magicpig._COMPARED", 7 * 5 * 2 * group * tables)  # seven tokens at a time
    lengths = [70, 33, 6, 1, 0]
    selector = MagicPIG(bits, tables, sinks=2, local=3, epsilon=epsilon)
    cache, keys, _ = observed(Geometry(1, 2 * group, 2, 16, 4, torch.float32), lengths, selector, shift=1.0)
    layer = cache.layers[0]
    q = torch.randn(5, 2 * group, 16)
    centre = [[centre_of(keys[0][row, :length, head], 2, 3) for head in range(2)] for row, length in enumerate(lengths)]
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):  # each meets token 20 in every table
        q[row, head * group] = torch.tensor(3 * (oracles.array(keys[0][row, 20, head]) - centre[row][head]))
    selection = selector.select(q, layer, layer.budget(UniformBudget(1.0)))
    projection = oracles.array(selector._projection)
    drawn = 0
    for row, length in enumerate(lengths):
        for head in range(2):
            have = entries(selection, row, head)
            sure = {token for token in range(length) if token < 2 or token >= length - 3}
            assert all(have[token] == [0.0] * group for token in sure)
            want = {}
            for token in set(range(length)) - sure:
                key = oracles.array(keys[0][row, token, head]) - centre[row][head]
                mine = bits_of(projection, key, tables, bits)
                weights = []
                for query in oracles.array(q[row, head * group : (head + 1) * group]):
                    theirs = bits_of(projection, query, tables, bits)
                    met = sum(one == other for one, other in zip(mine, theirs, strict=True))
                    weights.append(-math.log(chance(query, key, bits, tables) + epsilon) if met >= 2 else -math.inf)
                if max(weights) > -math.inf:
                    want[token] = weights
                    drawn += 1
            assert set(have) == sure | set(want)
            for token, weights in want.items():
                assert have[token] == pytest.approx(weights, rel=1e-4, abs=1e-5)
    assert drawn > 3
    assert entries(selection, 0, 0)[20][0] == pytest.approx(0, abs=1e-2)


def test_a_short_sequence_is_attended_to_exactly() -> None:
    selector = MagicPIG(sinks=4, local=8)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [12, 5], selector)
    selection = selector.select(torch.randn(2, 2, 16), cache.layers[0], cache.layers[0].budget(UniformBudget()))
    assert lists(selection) == [[list(range(12))] * 2, [list(range(5))] * 2]
    assert all(value == [0.0] for row in range(2) for value in entries(selection, row, 0).values())


def _denominators(selectors: list[MagicPIG], budget: int, length: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return each selector's estimate of the sum of exp(logit), `[draws, Hq]`, and what it is, `[Hq]`."""
    geometry = Geometry(1, 4, 2, 8, 4, torch.float32)
    torch.manual_seed(5)
    k = torch.randn(1, length, 2, 8)
    q = torch.randn(1, 4, 8)
    estimates = []
    for selector in selectors:
        cache = PagedKVCache(geometry, num_rows=1, num_pages=length // 4, selector=selector)
        cache.layers[0].append(k, k)
        selector.observe(q.unsqueeze(1).expand(-1, length, -1, -1), cache.layers[0])
        given = Budget(torch.full((1, 2), budget, dtype=torch.int32), budget)
        selection = selector.select(q, cache.layers[0], given)
        sums = []
        for query in range(4):
            head = query // 2
            found = entries(selection, 0, head)
            assert len(found) <= budget
            logits = {t: float(oracles.array(q[0, query]) @ oracles.array(k[0, t, head])) / 8**0.5 for t in found}
            sums.append(sum(math.exp(logits[t] + weights[query % 2]) for t, weights in found.items()))
        estimates.append(sums)
    exact = [
        sum(math.exp(float(oracles.array(q[0, query]) @ oracles.array(k[0, t, query // 2])) / 8**0.5)
            for t in range(length))
        for query in range(4)
    ]  # fmt: skip
    return np.array(estimates), np.array(exact)


@pytest.mark.parametrize("budget", [48, 14])
def test_unbiased_over_many_hashes(budget: int) -> None:
    """Also where the budget cuts the draw: 5 of 14 are the ends, so that about half of what is drawn is thinned."""
    draws = 250
    estimates, exact = _denominators([MagicPIG(3, 8, 2, 3, seed=seed) for seed in range(draws)], budget)
    error = estimates.std(0, ddof=1) / math.sqrt(draws)
    assert (error < 0.06 * exact).all()  # the test can tell a bias of 18 %
    assert (np.abs(estimates.mean(0) - exact) < 3 * error).all()


def test_the_budget_is_kept_and_the_ends_are_in_it() -> None:
    lengths, budget = [200, 90], 20
    selector = MagicPIG(1, 40, sinks=4, local=4)  # draws nearly everything
    cache, _, _ = observed(Geometry(1, 6, 2, 16, 4, torch.float32), lengths, selector)
    layer = cache.layers[0]
    chosen = lists(selector.select(torch.randn(2, 6, 16), layer, layer.budget(UniformBudget(budget))))
    for row, length in enumerate(lengths):
        for tokens in chosen[row]:
            assert len(tokens) == budget
            assert {0, 1, 2, 3, *range(length - 4, length)} <= set(tokens)


def test_the_same_bits_again_and_other_ones_at_the_next_step() -> None:
    selector = MagicPIG(1, 40, sinks=1, local=1)
    cache, _, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [100], selector)
    layer = cache.layers[0]
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)
    budget = UniformBudget(20)
    first, again = (selector.select(q, layer, layer.budget(budget)) for _ in range(2))
    assert torch.equal(first.indices, again.indices) and torch.equal(first.log_weight, again.log_weight)
    layer.append(k, k)
    later = lists(selector.select(q, layer, layer.budget(budget)))
    # By chance a third would be in both.
    assert len(set(later[0][0]) & set(lists(first)[0][0])) < 15


@pytest.mark.parametrize("chunks", [[100], [70, 30], [65, 1, 34], [7, 90, 3]])
def test_codes_do_not_depend_on_how_a_prompt_came(chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    if len(chunks) == 3:
        monkeypatch.setattr("twilight_selectors.magicpig._PROJECTED", 9 * 2 * 1500)  # nine tokens at a time
    geometry = Geometry(1, 2, 2, 128, 16, torch.bfloat16)
    selector = MagicPIG(sinks=2, local=2)
    keys = torch.randn(1, 100, 2, 128).bfloat16() + 1
    whole, parts = (PagedKVCache(geometry, num_rows=1, num_pages=8, selector=selector) for _ in range(2))
    for cache, sizes in ((whole, [100]), (parts, chunks)):
        first = 0
        for size in sizes:
            cache.layers[0].append(*[keys[:, first : first + size]] * 2)
            selector.observe(torch.zeros(1, size, 2, 128).bfloat16(), cache.layers[0])
            first += size
    for name in ("centre", "codes"):
        assert torch.equal(whole.layers[0].state(name), parts.layers[0].state(name))


@pytest.mark.parametrize("steps", uneven_steps(60))
def test_what_a_row_learns_does_not_depend_on_the_others(steps: list[tuple[int, ...]]) -> None:
    geometry = Geometry(1, 4, 2, 16, 16, torch.bfloat16)
    selector = MagicPIG(4, 8)
    selector.prepare(geometry)
    check_rows_alone(selector, geometry, steps)


def test_a_generated_token_is_hashed_around_the_centre_of_its_prompt() -> None:
    selector = MagicPIG(4, 8, sinks=2, local=3)
    cache, keys, _ = observed(Geometry(1, 2, 2, 16, 4, torch.float32), [40, 9], selector, shift=1.0)
    layer = cache.layers[0]
    centres = layer.state("centre").clone()
    codes = layer.state("codes").clone()
    k = torch.randn(2, 2, 16)
    attention = TwilightAttention(selector, NoPruning())
    for step in range(3):
        attention.decode(torch.randn(2, 2, 16), k + step, k, layer)
    assert torch.equal(layer.state("centre"), centres)
    assert torch.equal(layer.state("codes")[:, :, :40][codes != 0], codes[codes != 0])
    projection = oracles.array(selector._projection)
    for row, length in enumerate([40, 9]):
        for head in range(2):
            for step in range(3):
                vector = oracles.array(k[row, head] + step) - oracles.array(centres[row, head])
                want = [
                    sum(bit << place for place, bit in enumerate(table)) for table in bits_of(projection, vector, 8, 4)
                ]
                assert layer.state("codes")[row, head, length + step].tolist() == want


@pytest.mark.parametrize("p", [1.0, 0.7])
def test_attention_is_over_the_weighted_tokens(p: float) -> None:
    """Through the whole step: top-p prunes by weight, what a head has not drawn it does not see."""
    length, group = 60, 2
    selector = MagicPIG(3, 8, sinks=2, local=3)
    cache, keys, values = observed(Geometry(1, 2 * group, 2, 16, 4, torch.float32), [length], selector)
    layer = cache.layers[0]
    q, k, v = (torch.randn(1, heads, 16) for heads in (2 * group, 2, 2))
    attention = TwilightAttention(selector, TopP(p) if p < 1 else NoPruning(), 1.0)
    out, _ = attention.decode(q, k, v, layer)
    selection = selector.select(q, layer, layer.budget(UniformBudget(1.0)))
    for head in range(2):
        mine = entries(selection, 0, head)
        tokens = sorted(mine)
        all_keys = np.concatenate([oracles.array(keys[0][0, :, head]), oracles.array(k[:, head])])[tokens]
        all_values = np.concatenate([oracles.array(values[0][0, :, head]), oracles.array(v[:, head])])[tokens]
        read = np.array([oracles.dequantize(key) for key in all_keys])
        weights = np.array([mine[token] for token in tokens])
        kept = set(range(len(tokens)))
        if p < 1:
            kept = set()
            for query in range(group):
                kept |= oracles.top_p(read @ oracles.array(q[0, head * group + query]) / 4 + weights[:, query], p)
        kept = sorted(kept)
        for query in range(group):
            vector = oracles.array(q[0, head * group + query])
            want, _ = oracles.attend(vector, all_keys[kept], all_values[kept], 0.25, weights[kept, query])
            assert oracles.array(out[0, head * group + query]) == pytest.approx(want, abs=1e-4)


def test_bytes_by_hand() -> None:
    assert MagicPIG().bytes_per_token(Geometry(1, 2, 2, 64)) == 300  # 150 codes of two bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 16}, "bits: expected at most 15, got 16"),
        ({"bits": 0}, "bits: expected at least 1, got 0"),
        ({"tables": 1}, "tables: expected at least 2, got 1"),
        ({"local": 0}, "local: expected at least 1, got 0"),
        ({"sinks": -1}, "sinks, epsilon: expected 0 or more, got -1 and 0.0"),
    ],
)
def test_refuses_parameters_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MagicPIG(**options)
