"""The two oracles: nobody captures more at the same budget, and nobody reaches the mass with less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import Geometry, Selector, UniformBudget
from twilight_selectors.double_sparsity import DoubleSparsity
from twilight_selectors.oracle_topk import OracleTopK
from twilight_selectors.oracle_topp import OracleTopP
from twilight_selectors.quest import Quest
from twilight_selectors.streaming_llm import StreamingLLM

LENGTHS = [50, 17, 3]


def _weights(q: torch.Tensor, keys: torch.Tensor, length: int, group: int) -> list:
    """Return the true attention weights of each query head of a row."""
    scale = q.shape[-1] ** -0.5
    return [
        oracles.softmax(oracles.array(keys[:length, head // group]) @ oracles.array(q[head]) * scale)
        for head in range(q.shape[0])
    ]


@pytest.mark.parametrize("page_size", [1, 4])
def test_top_k_captures_at_least_what_any_other_does(tmp_path: Path, page_size: int) -> None:
    path = tmp_path / "double_sparsity.json"
    path.write_text(json.dumps({"layers": {"0": [list(range(8))] * 2}}))
    geometry = Geometry(1, 2, 2, 8, page_size, torch.float32)
    others: list[Selector] = [Quest(), StreamingLLM(), DoubleSparsity(str(path), channels=4)]
    for other in others:
        cache, keys, _ = fill(geometry, LENGTHS, other)
        layer = cache.layers[0]
        q = 2 * torch.randn(3, 2, 8)
        # A multiple of the page size, so that pages are no larger a budget than tokens.
        budget = UniformBudget(8).resolve(layer.seq_lens, 2, max_seq_len=50)
        best = lists(OracleTopK().select(q, layer, budget))
        selection = other.select(q, layer, budget)
        theirs = lists(selection)
        for row, length in enumerate(LENGTHS):
            for head, weights in enumerate(_weights(q[row], keys[0][row], length, 1)):
                tokens = oracles.tokens_of(theirs[row][head], selection.granularity, length)
                assert len(tokens) <= len(best[row][head]) == min(8, length)
                assert weights[best[row][head]].sum() >= weights[tokens].sum() - 1e-6
                assert weights[best[row][head]].sum() == pytest.approx(sum(sorted(weights)[-8:]))


def test_top_k_of_a_group_keeps_most_of_its_summed_mass() -> None:
    cache, keys, _ = fill(Geometry(1, 6, 2, 8, 4, torch.float32), LENGTHS)
    layer = cache.layers[0]
    q = 2 * torch.randn(3, 6, 8)
    chosen = lists(OracleTopK().select(q, layer, UniformBudget(5).resolve(layer.seq_lens, 2, max_seq_len=50)))
    for row, length in enumerate(LENGTHS):
        weights = _weights(q[row], keys[0][row], length, 3)
        for head in range(2):
            total = sum(weights[3 * head : 3 * head + 3])
            assert total[chosen[row][head]].sum() == pytest.approx(sum(sorted(total)[-5:]))


@pytest.mark.parametrize("mass", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("group", [1, 3])
def test_top_p_is_the_union_of_minimal_sets(mass: float, group: int) -> None:
    cache, keys, _ = fill(Geometry(1, 2 * group, 2, 8, 4, torch.float32), [*LENGTHS, 0])
    layer = cache.layers[0]
    q = 2 * torch.randn(4, 2 * group, 8)
    budget = UniformBudget(1).resolve(layer.seq_lens, 2, max_seq_len=50)
    chosen = lists(OracleTopP(mass).select(q, layer, budget))
    for row, length in enumerate(LENGTHS):
        for head in range(2):
            union: set[int] = set()
            for query in range(head * group, (head + 1) * group):
                logits = oracles.array(keys[0][row, :length, head]) @ oracles.array(q[row, query]) * 8**-0.5
                union |= oracles.top_p(logits.tolist(), mass)
            assert chosen[row][head] == sorted(union)
    assert chosen[3] == [[], []]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_top_p_chooses_by_keys_of_so_many_bits(bits: int) -> None:
    cache, keys, _ = fill(Geometry(1, 6, 2, 8, 4, torch.float32), LENGTHS)
    layer = cache.layers[0]
    q = 2 * torch.randn(3, 6, 8)
    budget = UniformBudget(1).resolve(layer.seq_lens, 2, max_seq_len=50)
    chosen = lists(OracleTopP(0.8, bits).select(q, layer, budget))
    assert chosen != lists(OracleTopP(0.8).select(q, layer, budget)) or bits == 8
    for row, length in enumerate(LENGTHS):
        for head in range(2):
            rough = [oracles.dequantize(key.tolist(), bits) for key in keys[0][row, :length, head]]
            union: set[int] = set()
            for query in range(3 * head, 3 * head + 3):
                union |= oracles.top_p([float(key @ oracles.array(q[row, query])) * 8**-0.5 for key in rough], 0.8)
            assert chosen[row][head] == sorted(union)


def test_bytes_are_those_of_every_key() -> None:
    geometry = Geometry(1, 2, 2, 64)
    assert OracleTopK().bytes_per_token(geometry) == OracleTopP().bytes_per_token(geometry) == 128


def test_refuses_parameters_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"p: expected a float in \(0, 1\], got 1.5"):
        OracleTopP(1.5)
    with pytest.raises(ValueError, match="bits: expected"):
        OracleTopP(bits=3)
    with pytest.raises(ValueError, match="reduce: expected 'softmax', 'sum', 'max', got 'union'"):
        OracleTopK("union")
