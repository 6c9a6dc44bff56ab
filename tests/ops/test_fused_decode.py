"""Fused decode's reference against numpy in float64: every stage written out once more, on its own bytes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests import fused_launches
from tests.caches import fill
from twilight import BoundedTopP, Geometry, PagedKVCache, Selection, ops
from twilight.budget import Budget
from twilight.ops.quantize import split_shadow, unpack
from twilight_selectors.block_mean import BlockMean
from twilight_selectors.full import Full
from twilight_selectors.quest import Quest

fused = sys.modules["twilight.ops.fused_decode"]  # `ops.fused_decode` is the function


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def row_by_hand(q, k, v, codes, params, bounds, bound_params, budget, p, page):
    """One sequence and kv head: q `[G, d]`, k and v `[n, d]`, 4-bit codes of its tokens, 8-bit bounds of its pages."""
    d, n = q.shape[1], len(k)
    pages = -(-n // page)
    share = np.zeros(pages)
    scores = []
    for head in q:
        high = bounds[:, :d] * bound_params[:, :1] + bound_params[:, 1:]
        low = bounds[:, d:] * bound_params[:, :1] + bound_params[:, 1:]
        scores.append(np.maximum(head * high, head * low).sum(-1) / np.sqrt(d))
        share += softmax(scores[-1])
    share[-1] = np.inf
    chosen = sorted(np.argsort(-share, kind="stable")[: min(pages, budget)])
    tokens = [t for c in chosen for t in range(c * page, min(n, c * page + page))]
    keys = codes[tokens] * params[tokens, :1] + params[tokens, 1:]
    union, counts = set(), []
    for head in q:
        logits = (keys @ head / np.sqrt(d)).astype(np.float16).astype(np.float64)
        weights = softmax(logits)
        order = np.sort(weights)[::-1]
        least = order[min(np.searchsorted(order.cumsum(), p), len(order) - 1)]
        mine = {t for t, w in zip(tokens, weights, strict=True) if w >= least}
        counts.append(len(mine))
        union |= mine
    kept = sorted(union)
    out = [softmax(k[kept] @ head / np.sqrt(d)) @ v[kept] for head in q]
    lse = [np.log(np.exp(k[kept] @ head / np.sqrt(d)).sum()) for head in q]
    return chosen, kept, counts, np.array(out), np.array(lse)


@pytest.mark.parametrize("p", [0.5, 0.9])
@pytest.mark.parametrize("page", [16, 32])
def test_is_every_stage_after_the_other(p, page):
    lengths = [300, 1, 47]
    geometry = Geometry(1, 6, 2, 64, page_size=page, dtype=torch.float32, device=torch.device("cpu"))
    cache, keys, values = fill(geometry, lengths, Quest())
    layer = cache.layers[0]
    q = 3 * torch.randn(3, 6, 64)
    tokens = torch.tensor([[100, 40], [1, 1], [20, 47]], dtype=torch.int32)
    bounds = (layer.metadata("bounds"), layer.metadata("bounds_params"))
    got = ops.fused_decode(
        q, layer.k_pages, layer.v_pages, layer.shadow, bounds, layer.page_table, layer.seq_lens, Budget(tokens, 100), p
    )
    codes, params = (part.double().numpy() for part in map_shadow(layer.shadow, page))
    for row, n in enumerate(lengths):
        table = layer.page_table[row, : -(-n // page)].long().numpy()
        for head in range(2):
            mine = slice(3 * head, 3 * head + 3)
            chosen, kept, counts, out, lse = row_by_hand(
                q[row, mine].double().numpy(), keys[0][row, :n, head].double().numpy(),
                values[0][row, :n, head].double().numpy(), codes[table, head].reshape(-1, 64)[:n],
                params[table, head].reshape(-1, 2)[:n], bounds[0][table, head].double().numpy(),
                bounds[1][table, head].double().numpy(), -(-int(tokens[row, head]) // page), p, page,
            )  # fmt: skip
            assert got.candidates.indices[row, head, : got.candidates.lengths[row, head]].tolist() == chosen
            selection = got.pruned.selection
            assert selection.indices[row, head, : selection.lengths[row, head]].tolist() == kept
            assert got.pruned.per_query_head[row, mine].tolist() == counts
            np.testing.assert_allclose(got.out[row, mine].double().numpy(), out, atol=2e-5)
            np.testing.assert_allclose(got.lse[row, mine].double().numpy(), lse, atol=2e-5)


def map_shadow(shadow, page):
    codes, params = split_shadow(shadow, page)
    return unpack(codes), params


def test_refuses_what_does_not_go_together():
    geometry = Geometry(1, 4, 2, 64, dtype=torch.float32, device=torch.device("cpu"))
    cache, _, _ = fill(geometry, [20], Quest())
    layer = cache.layers[0]
    q = torch.randn(1, 4, 64)
    pages = (layer.k_pages, layer.v_pages, layer.shadow)
    bounds = (layer.metadata("bounds"), layer.metadata("bounds_params"))
    with pytest.raises(ValueError, match="vectors: expected"):
        ops.fused_decode(q, *pages, bounds, layer.page_table, layer.seq_lens, None, 0.9)
    with pytest.raises(TypeError, match="seq_lens: expected dtype int32, got int64"):
        ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens.long(), None, 0.9)
    with pytest.raises(ValueError, match=r"shadow: expected shape"):
        ops.fused_decode(q, *pages[:2], pages[2][..., 1:], (), layer.page_table, layer.seq_lens, None, 0.9)
    with pytest.raises(ValueError, match=r"budget: expected shape \[1, 2\], got \[1\]"):
        tokens = torch.tensor([20], dtype=torch.int32)
        ops.fused_decode(q, *pages, bounds, layer.page_table, layer.seq_lens, Budget(tokens, 20), 0.9)
    with pytest.raises(ValueError, match="sm_scale: expected a positive number"):
        ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens, None, 0.9, sm_scale=-1.0)
    with pytest.raises(ValueError, match="p: "):
        ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens, None, 1.5)
    tokens = torch.tensor([[20, 20]], dtype=torch.int32)
    with pytest.raises(ValueError, match="codes: expected 64 or 128 of each page, got 32"):
        narrow = (bounds[0][..., :32], bounds[1])
        ops.fused_decode(q, *pages, narrow, layer.page_table, layer.seq_lens, Budget(tokens, 20), 0.9)
    values = (bounds[0][..., :64].contiguous(), bounds[1])
    with pytest.raises(ValueError, match="means: expected those of pages of 16 tokens of 64 channels"):
        means = ops.MeanValues(values, 32, 2)
        ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens, None, 0.9, means=means)
    with pytest.raises(ValueError, match="multiple of 2 heads"):
        ops.fused_decode(q[:, :3], *pages, (), layer.page_table, layer.seq_lens, None, 0.9)
    rest = (layer.page_table, layer.seq_lens)
    chosen, lists = torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="candidates: expected no vectors and no budget"):
        ops.fused_decode(q, *pages, bounds, *rest, Budget(tokens, 20), 0.9, candidates=Selection(chosen, lists, 16))
    with pytest.raises(ValueError, match="candidates: expected tokens or pages of 16, and no log_weight"):
        ops.fused_decode(q, *pages, (), *rest, None, 0.9, candidates=Selection(chosen, lists, 32))
    with pytest.raises(ValueError, match="candidates: expected tokens or pages of 16, and no log_weight"):
        weighted = Selection(chosen, lists, 16, torch.zeros(1, 4, 1))
        ops.fused_decode(q, *pages, (), *rest, None, 0.9, candidates=weighted)
    with pytest.raises(ValueError, match=r"candidates.indices: expected shape \[1, 2, any\], got \[1, 1, 1\]"):
        fewer = Selection(chosen[:, :1].contiguous(), lists[:, :1].contiguous(), 16)
        ops.fused_decode(q, *pages, (), *rest, None, 0.9, candidates=fewer)


@pytest.mark.parametrize(
    ("rule", "plain", "bounds"),
    [
        ({}, "true", (1, 2**31 - 1)),
        ({"min_tokens": 2}, "false", (2, 2**31 - 1)),
        ({"max_tokens": 10**6}, "false", (1, 10**6)),
        ({"min_tokens": 16, "max_tokens": 128}, "false", (16, 128)),
        ({"means": True}, "false", (1, 2**31 - 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_kernel_that_knows_no_bounds_and_no_tail_is_asked_for_neither(rule, plain, bounds, dtype, monkeypatch):
    geometry = Geometry(1, 4, 2, 64, dtype=dtype, device=torch.device("cpu"))
    layer = fill(geometry, [300], Quest())[0].layers[0]
    codes, params = (layer.metadata("bounds"), layer.metadata("bounds_params"))
    made = fused_launches.record(monkeypatch)
    values = (codes[..., :64].contiguous(), params.clone())
    if "means" in rule:
        rule = {"means": ops.MeanValues(values, 16, layer.page_table.shape[1])}
    pages = (layer.k_pages, layer.v_pages, layer.shadow)
    budget = Budget(torch.tensor([[100, 100]], dtype=torch.int32), 100)
    q = torch.zeros(1, 4, 64, dtype=dtype)
    tokens = Selection(torch.zeros(1, 2, 40, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32), 1)
    ops.fused_decode(q, *pages, (codes, params), layer.page_table, layer.seq_lens, budget, 0.9, backend="cuda", **rule)
    if "means" not in rule:
        rest = (layer.page_table, layer.seq_lens, None, 0.9)
        ops.fused_decode(q, *pages, (), *rest, candidates=tokens, backend="cuda", **rule)
    kinds = [expression.split(", ")[2:3] + expression.strip(">").split(", ")[4:] for expression, _ in made]
    assert kinds == [["2", "false", plain], ["0", "true", plain]][: len(made)]
    assert len(made) == (1 if "means" in rule else 2)
    for _, told in made:
        assert (told.min_tokens, told.max_tokens) == bounds
        assert told.value_codes == (values[0].data_ptr() if "means" in rule else None)
        assert told.q_is_bf16 == (dtype == torch.bfloat16)


def test_empty_lists_and_tails_of_tokens_are_for_the_stages():
    geometry = Geometry(1, 4, 2, 64, dtype=torch.float16, device=torch.device("cpu"))
    layer = fill(geometry, [20], Full())[0].layers[0]
    pages = (layer.k_pages, layer.v_pages, layer.shadow, (), layer.page_table, layer.seq_lens)
    q, lengths = torch.zeros(1, 4, 64, dtype=torch.float16), torch.zeros(1, 2, dtype=torch.int32)
    for capacity, said in ((0, "there are no candidates"), (1, None)):
        given = Selection(torch.zeros(1, 2, capacity, dtype=torch.int32), lengths, 16)
        assert fused.unsupported(q, *pages, None, None, given) == said
    means = ops.MeanValues((torch.zeros(9, 2, 64, dtype=torch.uint8), torch.zeros(9, 2, 2, dtype=torch.float16)), 16, 2)
    for granularity, said in ((16, None), (1, "the candidates are tokens, of which the kernel keeps no tail")):
        given = Selection(torch.zeros(1, 2, 1, dtype=torch.int32), lengths, granularity)
        assert fused.unsupported(q, *pages, None, means, given) == said
        assert fused.unsupported(q, *pages, None, None, given) is None


def test_what_is_given_are_the_candidates():
    geometry = Geometry(1, 6, 2, 64, dtype=torch.float32, device=torch.device("cpu"))
    layer = fill(geometry, [300, 1, 47], Quest())[0].layers[0]
    q = 3 * torch.randn(3, 6, 64)
    pages = (layer.k_pages, layer.v_pages, layer.shadow)
    bounds = (layer.metadata("bounds"), layer.metadata("bounds_params"))
    budget = Budget(torch.tensor([[100, 40], [1, 1], [20, 47]], dtype=torch.int32), 100)
    want = ops.fused_decode(q, *pages, bounds, layer.page_table, layer.seq_lens, budget, 0.9)
    got = ops.fused_decode(
        q, *pages, (), layer.page_table, layer.seq_lens, None, 0.9, candidates=want.candidates
    )  # fmt: skip
    everything = ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens, None, 0.9)
    assert got.candidates is want.candidates and got.out.equal(want.out)
    assert got.pruned.selection.lengths.equal(want.pruned.selection.lengths)
    assert not got.out.equal(everything.out)
    # Their tokens, one by one, are the same candidates.
    positions, valid = want.candidates.positions(layer.seq_lens)
    tokens = Selection.compact(positions.int(), valid, granularity=1)
    listed = ops.fused_decode(q, *pages, (), layer.page_table, layer.seq_lens, None, 0.9, candidates=tokens)
    assert listed.candidates is tokens and listed.pruned.selection.lengths.equal(want.pruned.selection.lengths)
    torch.testing.assert_close(listed.out, want.out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("selector", [Quest(), BlockMean(), Full()], ids=lambda s: s.name)
def test_a_new_token_is_where_append_would_have_put_it(selector, tail):
    pruner = BoundedTopP(0.8, 4, 40, tail="page_mean" if tail else "none")
    # The last row has no page before its token, so that pages have the same owners in both caches.
    lengths, counts = [301, 48, 0, 97, 1], torch.tensor([1, 1, 0, 0, 1], dtype=torch.int32)
    geometry = Geometry(1, 6, 2, 64, dtype=torch.float32, device=torch.device("cpu"))
    caches, q = [], 3 * torch.randn(5, 6, 64)
    for missing in (torch.zeros_like(counts), counts):
        torch.manual_seed(0)
        have = (torch.tensor(lengths) - missing).tolist()
        cache = PagedKVCache(geometry, num_rows=5, num_pages=40, selector=selector, pruner=pruner)
        k, v = torch.randn(2, 5, max(lengths), 2, 64)
        cache.layers[0].append(k, v, have)
        caches.append(cache)
    whole, short = (cache.layers[0] for cache in caches)
    newest = (torch.arange(5), torch.tensor(lengths).clamp(min=1) - 1)
    new = ops.NewTokens(k[newest], v[newest], counts)
    third = (torch.tensor(lengths, dtype=torch.int32) // 3 + 1)[:, None].repeat(1, 2)
    budget = None if selector.name == "full" else Budget(third, 110)

    def run(layer, new):
        pages, rule = (
            (layer.k_pages, layer.v_pages, layer.shadow, selector.ranking(layer).vectors),
            pruner.mass_rule(layer),
        )
        return ops.fused_decode(
            q, *pages, whole.page_table, whole.seq_lens, budget, rule.p, lists=True, min_tokens=rule.min_tokens,
            max_tokens=rule.max_tokens, means=rule.means, new=new,
        )  # fmt: skip

    want, got = run(whole, None), run(short, new)
    used = sorted({int(page) for page in whole.page_table.flatten() if page})
    for name in (
        "k_pages",
        "v_pages",
        "shadow",
        *(f"metadata {spec.name}" for spec in (*whole.specs, *whole.pruner_specs)),
    ):
        mine, theirs = (
            each.metadata(name.split()[1]) if " " in name else getattr(each, name) for each in (short, whole)
        )
        assert mine[used].equal(theirs[used]), name
    assert got.out.equal(want.out) and got.pruned.selection.lengths.equal(want.pruned.selection.lengths)
    # And what a step of the stages makes of it.
    layer_budget = budget or Budget(torch.full((5, 2), 301, dtype=torch.int32), 301)
    candidates = selector.select(q, whole, layer_budget)
    logits = ops.estimate_scores(
        q, whole.shadow, whole.page_table, whole.seq_lens, candidates, page_size=16, out_dtype=torch.float16
    )
    pruned = pruner(logits, candidates, whole)
    out, _ = ops.sparse_attention(
        q, whole.k_pages, whole.v_pages, whole.page_table, whole.seq_lens, pruned.selection, tail=pruned.tail
    )
    assert got.out.equal(out) and (got.pruned.tail is None) == (not tail)
