"""Pruners in a decode step: what they keep, the tail they leave, the bytes they cost, the caches they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch

from tests import oracles
from tests.caches import fill
from twilight import (
    BoundedTopP,
    Geometry,
    MetadataSpec,
    NoPruning,
    Pruner,
    Selection,
    Selector,
    Threshold,
    TopP,
    TwilightAttention,
    ops,
)
from twilight_selectors.full import Full
from twilight_selectors.quest import Quest
from twilight_selectors.streaming_llm import StreamingLLM

PAGE, DIM = 4, 16
GEOMETRY = Geometry(1, 6, 2, DIM, PAGE, torch.float32)
LENGTHS = [61, 30, 5]


def _step(attention: TwilightAttention, geometry: Geometry = GEOMETRY):
    """Decode one token; return out, q, and keys and values with the new token in them."""
    cache, keys, values = fill(geometry, LENGTHS, attention.selector, pruner=attention.pruner)
    q = (2 * torch.randn(len(LENGTHS), geometry.num_q_heads, DIM)).to(geometry.dtype)
    k, v = (torch.randn(len(LENGTHS), geometry.num_kv_heads, DIM).to(geometry.dtype) for _ in range(2))
    out, lse = attention.decode(q, k, v, cache.layers[0])
    whole = []
    for rows, new in ((keys[0], k), (values[0], v)):
        rows = torch.cat([rows, torch.full_like(rows[:, :1], torch.nan)], dim=1)
        for row, length in enumerate(LENGTHS):
            rows[row, length] = new[row]
        whole.append(rows)
    return out, lse, q, *whole


Rule = Callable[[list[float]], set[int]]
RULES: list[tuple[Pruner, Rule]] = [
    (BoundedTopP(0.7, 4, 9, tail="none"), lambda z: oracles.bounded_top_p(z, 0.7, 4, 9)),
    (BoundedTopP(0.5, 1, None, tail="none"), lambda z: oracles.bounded_top_p(z, 0.5, 1, None)),
    (BoundedTopP(0.5, 6, 6, tail="none"), lambda z: oracles.bounded_top_p(z, 1.0, 1, 6)),
    (Threshold(0.2), lambda z: oracles.threshold(z, 0.2, 0.0)),
    (Threshold(0.0, 0.05), lambda z: oracles.threshold(z, 0.0, 0.05)),
]


def _candidates(selector: Selector, length: int) -> list[int]:
    if isinstance(selector, Full) or length <= 20:
        return list(range(length))
    return [0, 1, 2, 3, *range(length - 16, length)]


TAILS = [("none", "int8"), ("page_mean", "native"), ("page_mean", "int8"), ("mean", "native"), ("mean", "int8")]


@pytest.mark.parametrize(("tail", "tail_type"), TAILS)
@pytest.mark.parametrize("selector", [Full(), StreamingLLM()], ids=lambda s: s.name)
@pytest.mark.parametrize(("pruner", "rule"), RULES, ids=lambda x: repr(x) if isinstance(x, Pruner) else "")
def test_a_step_by_loops(pruner: Pruner, rule: Rule, selector: Selector, tail: str, tail_type: str) -> None:
    pruner = replace(pruner, tail=tail, tail_type=tail_type)  # type: ignore[type-var]
    attention = TwilightAttention(selector, pruner, 20, collect_stats=True)
    out, lse, q, keys, values = _step(attention)
    (record,) = attention.stats.records
    means_read = 0
    for row, old in enumerate(LENGTHS):
        length = old + 1
        mine = _candidates(selector, length)
        for head in range(2):
            k, v = (oracles.array(part[row, :length, head]) for part in (keys, values))
            read = np.array([oracles.dequantize(keys[row, t, head].numpy()) for t in mine])
            estimates, kept = [], []
            for query in range(3 * head, 3 * head + 3):
                logits = (read @ oracles.array(q[row, query]) / math.sqrt(DIM)).tolist()
                estimates.append(logits)
                kept.append({mine[place] for place in rule(logits)})
                assert int(record.b1_query[row, query]) == len(kept[-1])
            union = sorted(set().union(*kept))
            assert int(record.b1_group[row, head]) == len(union)
            pruned_pages = {t // PAGE for t in mine if t not in union}
            if tail == "page_mean":
                means_read += len({t // PAGE for t in mine}) if isinstance(selector, Full) else len(pruned_pages)
            elif tail == "mean":
                means_read += -(-length // PAGE)
            for logits, query in zip(estimates, range(3 * head, 3 * head + 3), strict=True):
                terms = [(float(oracles.array(q[row, query]) @ k[t]) / math.sqrt(DIM), v[t]) for t in union]
                mass = {page: 0.0 for page in pruned_pages}
                for t, logit in zip(mine, logits, strict=True):
                    if t not in union:
                        mass[t // PAGE] += math.exp(logit)
                packed = tail_type == "int8"
                means = [oracles.mean_value(v[n : n + PAGE], packed=packed) for n in range(0, length, PAGE)]
                if tail == "page_mean":
                    terms += [(math.log(lost), means[page]) for page, lost in mass.items()]
                elif tail == "mean" and mass:
                    sizes = [len(v[n : n + PAGE]) for n in range(0, length, PAGE)]
                    mean = sum(n * each for n, each in zip(sizes, means, strict=True)) / length
                    terms.append((math.log(sum(mass.values())), mean))
                total = math.fsum(math.exp(z) for z, _ in terms)
                want = sum(math.exp(z) / total * value for z, value in terms)
                assert out[row, query].tolist() == pytest.approx(want.tolist(), abs=2e-5)
                assert float(lse[row, query]) == pytest.approx(math.log(total), abs=1e-5)
    if tail == "none":
        assert record.tail_pages.sum() == 0
        return
    assert int(record.tail_pages.sum()) == means_read
    # 8 bits a channel and two halves, or a float a channel.
    assert record.tail_bytes == (DIM + 4 if tail_type == "int8" else DIM * 4)
    without = replace(record, tail_pages=torch.zeros_like(record.tail_pages))
    assert record.kv_bytes() - without.kv_bytes() == means_read * record.tail_bytes


def test_bounds_that_bind_nothing_are_top_p() -> None:
    results = []
    for pruner in (TopP(0.8), BoundedTopP(0.8, 1, None, tail="none"), BoundedTopP(0.8, 1, 62, tail="none")):
        torch.manual_seed(0)
        results.append(_step(TwilightAttention(Quest(), pruner, 24))[:2])
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize(
    "pruner",
    [
        TopP(0.1, layer_p=(0.3, 0.9)),
        BoundedTopP(0.1, 2, 9, tail="none", layer_p=(0.3, 0.9)),
        BoundedTopP(0.7, 2, 9, tail_type="native"),
        BoundedTopP(0.7, 2, None),
        BoundedTopP(1.0, 2, 9),
    ],
    ids=repr,
)
def test_the_rule_that_a_kernel_is_told_is_what_calling_does(pruner: TopP | BoundedTopP) -> None:
    cache, _, _ = fill(Geometry(2, 6, 2, DIM, PAGE, torch.float32), LENGTHS, Full(), pruner=pruner)
    for layer in cache.layers:
        candidates = Selection.everything(layer.seq_lens, 2, max_seq_len=64, granularity=PAGE)
        logits = 3 * torch.randn(len(LENGTHS), 6, 64)
        logits.masked_fill_(torch.arange(64) >= layer.seq_lens[:, None, None], -torch.inf)
        rule, got = pruner.mass_rule(layer), pruner(logits, candidates, layer)
        assert rule is not None
        bounds = {"min_tokens": rule.min_tokens, "max_tokens": rule.max_tokens, "means": rule.means}
        want = ops.top_p(logits, candidates, layer.seq_lens, rule.p, **bounds)
        assert got.selection.indices.equal(want.selection.indices) and got.per_query_head.equal(want.per_query_head)
        assert (got.tail is None) == (want.tail is None)
        if got.tail is not None and want.tail is not None:
            assert got.tail.pages.log_weight.equal(want.tail.pages.log_weight)


def test_a_mean_tail_is_no_rule_of_the_kernels() -> None:
    pruner = BoundedTopP(0.7, tail="mean")
    cache, _, _ = fill(GEOMETRY, LENGTHS, Full(), pruner=pruner)
    assert pruner.mass_rule(cache.layers[0]) is None


@pytest.mark.parametrize("tail", ["none", "page_mean", "mean"])
def test_p_of_one_keeps_everything_whatever_the_bounds(tail: str) -> None:
    attention = TwilightAttention(Full(), BoundedTopP(1.0, 1, 6, tail=tail), 20, collect_stats=True)
    torch.manual_seed(0)
    out, lse, *_ = _step(attention)
    (record,) = attention.stats.records
    assert torch.equal(record.b1_group, torch.tensor(LENGTHS, dtype=torch.int32)[:, None].expand(-1, 2) + 1)
    assert record.tail_pages.sum() == 0, "nothing is pruned"
    torch.manual_seed(0)
    dense, dense_lse, *_ = _step(TwilightAttention(Full(), TopP(1.0), 20))
    assert torch.equal(out, dense) and torch.equal(lse, dense_lse)


@pytest.mark.parametrize("cls", [TopP, BoundedTopP])
def test_each_layer_may_have_a_p_of_its_own(cls: type[TopP] | type[BoundedTopP]) -> None:
    geometry = Geometry(3, 4, 2, 8, 4, layer_ids=(2, 5, 6))
    q, k = torch.randn(1, 4, 8).bfloat16(), torch.randn(1, 2, 8).bfloat16()

    def outputs(pruner: Pruner) -> list[torch.Tensor]:
        torch.manual_seed(0)
        attention = TwilightAttention(Full(), pruner, 1.0, min_context=0)
        cache, _, _ = fill(geometry, [60], attention.selector)
        return [attention.decode(q, k, k, layer)[0] for layer in cache.layers]

    more = {} if cls is TopP else {"min_tokens": 1, "max_tokens": None, "tail": "none"}
    mixed = outputs(cls(0.1, layer_p=(0.3, 1.0, 0.8), **more))
    for nth, p in enumerate((0.3, 1.0, 0.8)):
        assert torch.equal(mixed[nth], outputs(cls(p, **more))[nth])
    assert not torch.equal(mixed[0], outputs(cls(1.0, **more))[0])
    with pytest.raises(ValueError, match="layer_p: expected a p for each of 3 sparse layers, got 2"):
        outputs(cls(0.9, layer_p=(0.3, 0.8), **more))


def test_a_page_tail_brings_the_output_closer_to_dense() -> None:
    """On values that vary little within a page, which is what a page's mean can stand for."""
    errors = {}
    for tail in ("none", "page_mean"):
        torch.manual_seed(0)
        attention = TwilightAttention(Full(), BoundedTopP(0.3, 1, 4, tail=tail, tail_type="native"))
        cache, keys, _ = fill(GEOMETRY, [60], attention.selector, pruner=attention.pruner)
        cache.free(0)
        pages = torch.randn(15, 2, DIM).repeat_interleave(PAGE, 0)
        values = (pages + 0.1 * torch.randn(60, 2, DIM))[None]
        cache.layers[0].append(keys[0], values)
        q, k, v = 0.3 * torch.randn(1, 6, DIM), torch.randn(1, 2, DIM), torch.randn(1, 2, DIM)
        out, _ = attention.decode(q, k, v, cache.layers[0])
        attention.min_context = 100
        dense, _ = attention.attend(q, cache.layers[0])
        errors[tail] = float((out - dense).norm() / dense.norm())
    assert errors["page_mean"] < 0.3 * errors["none"]


def test_a_cache_without_page_means_is_refused_before_anything_is_written() -> None:
    attention = TwilightAttention(Full(), BoundedTopP(tail="page_mean"))
    q, k = torch.zeros(1, 6, DIM), torch.zeros(1, 2, DIM)
    for pruner in (None, TopP(), BoundedTopP(tail="page_mean", tail_type="native")):
        cache, _, _ = fill(GEOMETRY, [5], Full(), pruner=pruner)
        with pytest.raises(ValueError, match=r"layer: its cache keeps nothing for BoundedTopP\(.*\n.*pruner=attention"):
            attention.decode(q, k, k, cache.layers[0])
        assert cache.table.lengths == [5]
    # What is kept is the same for every p and both kinds of tail, and more than is needed does no harm.
    cache, _, _ = fill(GEOMETRY, [5], Full(), pruner=Threshold(tail="mean"))
    attention.decode(q, k, k, cache.layers[0])
    TwilightAttention(Full(), TopP(0.5)).decode(q, k, k, cache.layers[0])
    assert cache.table.lengths == [7]


def test_nan_in_a_row_stays_in_that_row() -> None:
    outs = []
    for poisoned in (False, True):
        torch.manual_seed(0)
        attention = TwilightAttention(Quest(), BoundedTopP(0.5, 2, 6, tail="page_mean"), 24)
        cache, _, _ = fill(GEOMETRY, LENGTHS, attention.selector, pruner=attention.pruner)
        q, k, v = torch.randn(3, 6, DIM), torch.randn(3, 2, DIM), torch.randn(3, 2, DIM)
        if poisoned:
            v[1] = torch.nan
        outs.append(attention.decode(q, k, v, cache.layers[0])[0])
    torch.testing.assert_close(outs[1][[0, 2]], outs[0][[0, 2]])
    assert outs[1][1].isnan().all()


def test_a_plugin_may_bring_a_pruner_with_metadata_of_its_own() -> None:
    @dataclass(frozen=True)
    class LargestValues(Pruner):
        """Keep the page whose values are largest."""

        name: ClassVar[str] = "largest_values"
        needs_logits: ClassVar[bool] = False

        def metadata(self, geometry):
            return (MetadataSpec("largest", (1,), torch.float32),)

        def summarize(self, values, valid, layer):
            return {"largest": values.abs().amax((-1, -2)).unsqueeze(-1)}

        def __call__(self, logits, candidates, layer):
            scores = layer.metadata("largest")[layer.page_table.long()].squeeze(-1).transpose(1, 2)
            ones = torch.ones_like(candidates.lengths)
            return ops.keep_all(Selection.top(scores, ones, capacity=1, granularity=PAGE), layer.seq_lens)

    attention = TwilightAttention(Full(), LargestValues(), collect_stats=True)
    out, _, q, keys, values = _step(attention)
    for row, old in enumerate(LENGTHS):
        for head in range(2):
            v = values[row, : old + 1, head]
            page = max(range(-(-(old + 1) // PAGE)), key=lambda n: float(v[n * PAGE : (n + 1) * PAGE].abs().max()))
            tokens = oracles.tokens_of([page], PAGE, old + 1)
            k = oracles.array(keys[row, tokens, head])
            want, _ = oracles.attend(oracles.array(q[row, 3 * head]), k, oracles.array(v[tokens]), DIM**-0.5)
            assert out[row, 3 * head].tolist() == pytest.approx(want.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BoundedTopP(1.5), ValueError, r"p: expected a float in \(0, 1\], got 1.5"),
        (lambda: TopP(0.5, (0.5, 1.5)), ValueError, r"layer_p: p: expected a float in \(0, 1\], got 1.5"),
        (lambda: BoundedTopP(0.5, 0), ValueError, "min_tokens: expected at least 1, got 0"),
        (lambda: BoundedTopP(0.5, 64, 32), ValueError, "max_tokens: expected at least min_tokens=64, got 32"),
        (lambda: BoundedTopP(tail="pages"), ValueError, "tail: expected 'none', 'mean', 'page_mean', got 'pages'"),
        (lambda: BoundedTopP(tail_type="fp8"), ValueError, "tail_type: expected 'int8', 'native', got 'fp8'"),
        (lambda: Threshold(0.0), ValueError, "share: expected more than 0 where weight is 0"),
        (lambda: Threshold(tail="pages"), ValueError, "tail: expected"),
        (lambda: TwilightAttention(Full(), "top_p"), TypeError, "pruner: expected a pruner such as TopP"),
        (lambda: TwilightAttention(Full(), NoPruning), TypeError, "pruner: expected a pruner such as TopP"),
    ],
)
def test_refuses_bad_parameters(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
