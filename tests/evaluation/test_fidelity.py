"""Fidelity of a step, against loops over float64 numpy arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill, lists
from twilight import BoundedTopP, Geometry, NoPruning, Selection, Selector, TopP, TwilightAttention
from twilight.attention import Step
from twilight.evaluation.fidelity import BINS, Observer, measure
from twilight_selectors.full import Full
from twilight_selectors.quest import Quest

GEOMETRY = Geometry(1, 6, 2, 16, 4, torch.float32)
LENGTHS = [61, 30]


class Weighted(Selector):
    """Proposes all tokens, every third hidden from the first query head of a group."""

    name = "weighted"

    def select(self, q, layer, budget):
        found = Selection.everything(
            layer.seq_lens, layer.geometry.num_kv_heads, max_seq_len=layer.max_seq_len, granularity=1
        )
        weight = torch.zeros(len(q), q.shape[1], found.capacity)
        weight[:, ::3, ::3] = -torch.inf
        return Selection(found.indices, found.lengths, 1, weight)


def step(selector, pruner, budget=0.5):
    """Return a step of a random cache, and its keys and values."""
    attention = TwilightAttention(selector, pruner, budget)
    cache, keys, values = fill(GEOMETRY, LENGTHS, attention.selector, pruner=pruner)
    seen: list[Step] = []
    attention.observer = seen.append
    attention.attend(2 * torch.randn(len(LENGTHS), 6, 16), cache.layers[0])
    return seen[0], keys[0], values[0]


def own_tokens(step, row, head, keys):
    """Return the tokens that the pruner kept for a query head: the heaviest candidates by the 4-bit keys."""
    kv = head // 3
    count = int(step.pruned.per_query_head[row, head])
    entries = oracles.tokens_of(lists(step.candidates)[row][kv], step.candidates.granularity, LENGTHS[row])
    q = oracles.array(step.q[row, head])
    estimates = {t: float(q @ oracles.dequantize(keys[row, t, kv].numpy())) / 4 for t in entries}
    return sorted(estimates, key=lambda t: -estimates[t])[:count], estimates


@pytest.mark.parametrize(
    ("selector", "pruner"), [(Full(), TopP(0.8)), (Quest(), TopP(0.6)), (Quest(), BoundedTopP(0.8, 3, 9, tail="mean"))]
)
def test_every_measure_is_the_definition(selector, pruner):
    done, keys, values = step(selector, pruner)
    found, places = measure(done, 0.7)
    top_p, top_k = np.zeros(BINS), np.zeros(BINS)
    for row, length in enumerate(LENGTHS):
        counts = done.pruned.per_query_head[row].tolist()
        same = max(1, round(sum(counts) / 6))
        for head in range(6):
            kv = head // 3
            q, k, v = (oracles.array(x) for x in (done.q[row, head], keys[row, :length, kv], values[row, :length, kv]))
            weights = oracles.softmax(k @ q / 4)
            exact, _ = oracles.attend(q, k, v, 1 / 4)
            own, estimates = own_tokens(done, row, head, keys)
            read = lists(done.pruned.selection)[row][kv]
            best = sorted(range(length), key=lambda t: -weights[t])[: len(own)]
            oracle = oracles.top_p(k @ q / 4, 0.7)
            out = oracles.array(done.out[row, head])
            expected = {
                "mass": sum(weights[t] for t in read),
                "output_error": np.linalg.norm(out - exact) / np.linalg.norm(exact),
                "overlap_topk": len(set(own) & set(best)) / len(own),
                "overlap_topp": len(set(own) & oracle) / len(oracle),
                "oracle_b1": len(oracle),
                "b1_query": len(own),
            }
            assert set(own) <= set(read)
            for name, value in expected.items():
                assert float(getattr(found, name)[row, head]) == pytest.approx(value, abs=1e-6), name
            for t in own:
                top_p[(length - 1 - t) * BINS // length] += 1
            for t in sorted(estimates, key=lambda t: -estimates[t])[:same]:
                top_k[(length - 1 - t) * BINS // length] += 1
    assert places.top_p.tolist() == top_p.tolist()
    assert places.top_k.tolist() == top_k.tolist()


def test_without_a_pruner_candidates_are_everyones_own_and_there_is_no_top_p_to_compare():
    done, keys, _ = step(Quest(), NoPruning())
    found, places = measure(done, 0.9)
    for row in range(2):
        for head in range(6):
            read = oracles.tokens_of(lists(done.candidates)[row][head // 3], 4, LENGTHS[row])
            weights = oracles.softmax(oracles.array(keys[row, : LENGTHS[row], head // 3] @ done.q[row, head]) / 4)
            assert int(found.b1_query[row, head]) == len(read)
            assert float(found.mass[row, head]) == pytest.approx(weights[read].sum(), abs=1e-6)
    assert places.top_p is None and float(places.top_k.sum()) == float(found.b1_query.sum())


def test_tokens_that_are_hidden_from_a_head_hold_no_mass_of_its():
    done, keys, _ = step(Weighted(), TopP(1.0), 1.0)
    found, _ = measure(done, 0.9)
    weights = oracles.softmax(oracles.array(keys[0, :61, 0] @ done.q[0, 0]) / 4)
    assert float(found.mass[0, 0]) == pytest.approx(1 - weights[::3].sum(), abs=1e-6)
    assert float(found.mass[0, 1]) == pytest.approx(1)
    assert int(found.b1_query[0, 0]) == 61 - 21
    # What is hidden is not its own, however much it weighs.
    oracle = oracles.top_p(oracles.array(keys[0, :61, 0] @ done.q[0, 0]) / 4, 0.9)
    assert any(t % 3 == 0 for t in oracle)
    assert float(found.overlap_topp[0, 0]) == pytest.approx(sum(t % 3 > 0 for t in oracle) / len(oracle))


def test_estimates_are_made_again_where_one_launch_left_none():
    done, _, _ = step(Quest(), TopP(0.8))
    bare = Step(done.q, done.layer, done.candidates, done.pruned, None, done.out, done.lse, True)
    for a, b in zip(vars(measure(done, 0.7)[0]).values(), vars(measure(bare, 0.7)[0]).values(), strict=True):
        assert a.equal(b)


def test_an_observer_adds_up_what_it_was_to_look_at():
    observer = Observer(0.7, {0})
    steps = [step(Full(), TopP(0.8))[0] for _ in range(2)]
    for each in steps:
        observer(each)
    measured = [measure(each, 0.7)[0] for each in steps]
    mass = torch.cat([each.mass.flatten() for each in measured])
    summary = observer.summary()
    assert summary["mass"] == pytest.approx(float(mass.mean()))
    assert summary["mass_p5"] == pytest.approx(float(np.percentile(mass.numpy(), 5)))
    kept = sum(float(each.b1_query.sum()) for each in measured) / sum(float(each.oracle_b1.sum()) for each in measured)
    assert summary["excess"] == pytest.approx(kept)
    (row,) = (row for row in observer.heads(context=9) if row["head"] == 4)
    assert (row["context"], row["layer"]) == (9, 0)
    assert row["output_error"] == pytest.approx(float(torch.cat([each.output_error[:, 4] for each in measured]).mean()))
    shares = [row for row in observer.positions() if row["kind"] == "top_p"]
    assert sum(row["share"] for row in shares) == pytest.approx(1)
    assert [row["bin_low"] for row in shares] == pytest.approx([i / BINS for i in range(BINS)])

    blind = Observer(0.7, {5})
    blind(steps[0])
    with pytest.raises(ValueError, match="no sparse step was seen"):
        blind.summary()


@pytest.mark.gpu
@pytest.mark.parametrize("pruner", [TopP(0.8), BoundedTopP(0.8, 4, 64, tail="none"), NoPruning()])
def test_a_step_of_the_kernels_is_measured_by_the_same_definition(pruner):
    geometry, lengths = Geometry(1, 6, 2, 64, 16, torch.bfloat16, torch.device("cuda")), [600, 333]
    attention = TwilightAttention(Quest(), pruner, 0.5)
    cache, keys, values = fill(geometry, lengths, attention.selector, pruner=pruner)
    seen: list[Step] = []
    attention.observer = seen.append
    attention.attend(torch.randn(2, 6, 64, device="cuda").bfloat16(), cache.layers[0])
    found, places = measure(seen[0], 0.7)
    for row, length in enumerate(lengths):
        for head in range(6):
            kv = head // 3
            of_head = (seen[0].q[row, head], keys[0][row, :length, kv], values[0][row, :length, kv])
            q, k, v = (oracles.array(x.cpu()) for x in of_head)
            weights = oracles.softmax(k @ q / 8)
            selection = seen[0].pruned.selection
            read = oracles.tokens_of(lists(selection)[row][kv], selection.granularity, length)
            assert float(found.mass[row, head]) == pytest.approx(weights[read].sum(), abs=1e-6)
            exact, _ = oracles.attend(q, k, v, 1 / 8)
            error = np.linalg.norm(oracles.array(seen[0].out[row, head].cpu()) - exact) / np.linalg.norm(exact)
            assert float(found.output_error[row, head]) == pytest.approx(error, abs=1e-6)
            assert int(found.oracle_b1[row, head]) == len(oracles.top_p(k @ q / 8, 0.7))
            assert int(found.b1_query[row, head]) <= len(read)
    if not isinstance(pruner, NoPruning):
        assert found.b1_query.long().equal(seen[0].pruned.per_query_head.long())
        assert float(places.top_p.sum()) == float(found.b1_query.sum())
