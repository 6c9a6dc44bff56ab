"""StreamingLLM: sinks and a window, nothing else, at the positions of the text or of the cache."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Geometry, NoPruning, PagedKVCache, TopP, TwilightAttention, UniformBudget
from twilight_selectors.streaming_llm import StreamingLLM


def _select(lengths: list[int], budget: int | float, sinks: int) -> list[list[list[int]]]:
    cache, _, _ = fill(Geometry(1, 4, 2, 8, 4), lengths)
    layer = cache.layers[0]
    given = UniformBudget(budget, 1).resolve(layer.seq_lens, 2, max_seq_len=max(lengths))
    return lists(StreamingLLM(sinks).select(torch.randn(len(lengths), 4, 8), layer, given))


def test_by_hand() -> None:
    assert _select([12], 7, 4) == [[[0, 1, 2, 3, 9, 10, 11]] * 2]
    assert _select([12], 4, 4) == [[[8, 9, 10, 11]] * 2]  # no room for more than the newest
    assert _select([12], 5, 4) == [[[0, 1, 2, 3, 11]] * 2]
    assert _select([12], 3, 0) == [[[9, 10, 11]] * 2]


@pytest.mark.parametrize("budget", [1, 6, 9, 100, 0.4, 1.0])
@pytest.mark.parametrize("sinks", [0, 1, 4, 30])
def test_budget_is_met_exactly_in_every_row(budget: int | float, sinks: int) -> None:
    lengths = [37, 6, 5, 1, 0, 20]
    for length, heads in zip(lengths, _select(lengths, budget, sinks), strict=True):
        wanted = -(-length * 4 // 10) if budget == 0.4 else length if isinstance(budget, float) else budget
        count = min(wanted, length)
        first = sinks if count > sinks else 0
        expected = sorted({*range(first), *range(length - count + first, length)}) if length else []
        assert heads == [expected, expected]
        assert len(expected) == count


FREQUENCIES = (1.0, 0.3, 0.02)


def embed(x: np.ndarray, position: int) -> np.ndarray:
    """Rotate one vector by complex numbers, the last of 8 channels being left alone."""
    pairs = (x[:3] + 1j * x[3:6]) * np.exp(1j * position * np.array(FREQUENCIES))
    return np.concatenate([pairs.real, pairs.imag, x[6:]])


@pytest.mark.parametrize("pruner", [NoPruning(), TopP(1.0)])
@pytest.mark.parametrize(("budget", "sinks"), [(9, 4), (5, 4), (4, 4), (30, 4), (7, 1), (6, 0)])
def test_reindexed_is_attention_over_a_cache_that_rotates_by_its_own_places(budget: int, sinks: int, pruner) -> None:
    lengths, scale = [1000, 22, 5, 0], 0.5
    geometry = Geometry(1, 6, 2, 8, 4, torch.float32, scaling=scale, inv_freq=FREQUENCIES)
    rng = np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 4, 1001, 2, 8))
    queries = rng.standard_normal((4, 6, 8))
    text = torch.zeros(4, 1001, 2, 8)
    q = torch.zeros(4, 6, 8)
    for row, length in enumerate(lengths):
        for position in range(length + 1):
            for head in range(2):
                text[row, position, head] = torch.tensor(embed(keys[row, position, head], position))
        for head in range(6):
            q[row, head] = torch.tensor(embed(queries[row, head], length))
    v = torch.tensor(values).float()
    selector = StreamingLLM(sinks, reindex=True)
    cache = PagedKVCache(geometry, num_rows=4, num_pages=300, selector=selector)
    layer = cache.layers[0]
    layer.append(text[:, :1000], v[:, :1000], lengths)
    new = [torch.stack([part[row, length] for row, length in enumerate(lengths)]) for part in (text, v)]
    out, lse = TwilightAttention(selector, pruner, budget).decode(q, *new, layer)
    for row, length in enumerate(lengths):
        total = length + 1
        count = min(budget, total)
        first = sinks if count > sinks else 0
        tokens = [*range(first), *range(total - count + first, total)]
        for head in range(6):
            k = np.array([embed(keys[row, token, head // 3], place) for place, token in enumerate(tokens)])
            wanted, wanted_lse = oracles.attend(
                embed(queries[row, head], count - 1), k, values[row, tokens, head // 3], scale
            )
            assert out[row, head].tolist() == pytest.approx(wanted.tolist(), abs=2e-5)
            assert float(lse[row, head]) == pytest.approx(wanted_lse, abs=2e-5)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="sinks: expected at least 0, got -1"):
        StreamingLLM(-1)
    with pytest.raises(ValueError, match="reindex: the rotary embedding of this model is not known"):
        StreamingLLM(reindex=True).prepare(Geometry(1, 4, 2, 8))
    with pytest.raises(ValueError, match="inv_freq: expected at most head_dim / 2 = 4, got 5"):
        Geometry(1, 4, 2, 8, inv_freq=(1.0,) * 5)
