"""Which steps one launch does, the new token included, and that they are the steps of the stages one after another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.caches import fill
from tests.test_graph import GPU
from twilight import BoundedTopP, Geometry, NoPruning, Selection, Threshold, TopP, TwilightAttention, kernels, ops
from twilight.attention import _speaks_for as speaks_for
from twilight.graph import DecodeGraph, StaticCache
from twilight.selector import MetadataSpec
from twilight_selectors.block_mean import BlockMean
from twilight_selectors.full import Full
from twilight_selectors.quest import Quest

LENGTHS, LAYERS = [700, 33, 260], 3


class QuestAndMore(Quest):
    """Keeps something beside the bounds, which append cannot bring up to date."""

    def metadata(self, geometry):
        return (*super().metadata(geometry), MetadataSpec("count", (1,), torch.float32))

    def summarize(self, keys, valid, layer):
        return {"count": valid.sum(-1)[:, None, None].expand(-1, keys.shape[1], 1)}


def caches(selector, device, dtype, pruner=None, count=2):
    geometry = Geometry(LAYERS, 8, 2, 64, dtype=dtype, device=torch.device(device))
    made = []
    for _ in range(count):
        torch.manual_seed(0)
        made.append(fill(geometry, LENGTHS, selector, spare=4, pruner=pruner)[0])
    return made


@pytest.mark.parametrize(
    "selector,pruner,expected",
    [
        (Quest(), TopP(), True),
        (BlockMean(), TopP(), True),
        (Full(), TopP(), True),
        (Quest(metadata_type="native"), TopP(), False),
        (QuestAndMore(), TopP(), False),
        (Quest(), BoundedTopP(tail="page_mean"), True),
        (Quest(), BoundedTopP(tail="page_mean", tail_type="native"), False),
    ],
    ids=["quest", "means", "nothing", "keys not in 8 bits", "more", "tail", "tail not in 8 bits"],
)
def test_what_else_a_cache_keeps_is_not_left_to_the_launch(selector, pruner, expected):
    cache = caches(selector, "cpu", torch.float32, pruner, count=1)[0]
    layer = cache.layers[0]
    vectors = tuple(layer.metadata(spec.name) for spec in layer.specs if spec.name != "count")
    values = tuple(layer.metadata(spec.name) for spec in layer.pruner_specs)
    for each in (layer, StaticCache(cache, 800, 60).layers[0]):
        assert each.keeps_only(vectors, values) == expected
        # All of what it keeps, and it itself.
        assert not values or not each.keeps_only(vectors)
        assert not vectors or not each.keeps_only((), values)
        assert not vectors or not each.keeps_only(tuple(part.clone() for part in vectors), values)
        assert not each.keeps_only((*vectors, layer.shadow), values)


@pytest.mark.parametrize("static", [False, True])
def test_what_fails_between_lengths_and_tokens_leaves_no_gap(static):
    """Without a token in its place, a row that counts it would attend to whatever lay there."""
    pair = caches(Quest(), "cpu", torch.float32)
    layers = [(StaticCache(cache, 800, 60) if static else cache).layers[0] for cache in pair]
    k, v = torch.randn(2, 3, 2, 64)
    with pytest.raises(RuntimeError, match="between"), layers[0].appending(k, v):
        raise RuntimeError("between")
    if static:  # the lengths have grown: the token is there
        layers[1].append(k, v)
    assert layers[0].seq_lens.equal(layers[1].seq_lens)
    assert layers[0].k_pages[1:].equal(layers[1].k_pages[1:])
    assert layers[0].metadata("bounds")[1:].equal(layers[1].metadata("bounds")[1:])


class Halved(TopP):
    """Overrides what a rule would say it does."""

    def __call__(self, logits, candidates, layer):
        return TopP(self.p / 2)(logits, candidates, layer)


class FirstPages(Quest):
    """Likewise."""

    def select(self, q, layer, budget):
        chosen = super().select(q, layer, budget)
        return Selection(chosen.indices[..., :1], chosen.lengths.clamp(max=1), chosen.granularity)


def test_a_subclass_that_overrides_a_method_alone_promises_nothing():
    assert all(speaks_for(TopP(), *words) for words in [("mass_rule", "__call__")])
    assert speaks_for(BoundedTopP(), "mass_rule", "__call__") and not speaks_for(Halved(), "mass_rule", "__call__")
    assert speaks_for(Quest(), "ranking", "select") and not speaks_for(FirstPages(), "ranking", "select")
    assert speaks_for(QuestAndMore(), "ranking", "select")
    # The base classes' promise is None.
    assert NoPruning().mass_rule(None) is None and Threshold().mass_rule(None) is None


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_such_a_subclass_is_asked(device):
    for selector, pruner in ((Quest(), Halved(0.9)), (FirstPages(), TopP(0.9))):
        layer = caches(selector, device, torch.bfloat16, count=1)[0].layers[0]
        attention, steps = TwilightAttention(selector, pruner, 0.5), []
        attention.observer = steps.append
        q = torch.randn(3, 8, 64, device=device).bfloat16()
        attention.attend(q, layer)
        kept = steps[0].pruned.selection
        assert int(kept.lengths.min()) > 0
        if isinstance(pruner, Halved):
            assert not steps[0].one_after_select and float(steps[0].pruned.mass.mean()) < 0.6
        else:  # its pages, and the rest in one launch
            assert steps[0].one_after_select and steps[0].candidates.capacity == 1
            pages = (kept.indices // 16).masked_fill(~kept.counted(), -1)
            assert bool(((pages == steps[0].candidates.indices) | ~kept.counted()).all())
        assert not steps[0].one_launch


class Finished(Quest):
    """Sees what was kept."""

    def finish(self, q, layer, kept, out, lse):
        return out * 0 + kept.lengths.sum(), lse


class Tokens(FirstPages):
    """Chooses tokens, one of each page."""

    def select(self, q, layer, budget):
        chosen = super().select(q, layer, budget)
        return Selection(chosen.indices * 16, chosen.lengths, 1)


class Halves(FirstPages):
    """Chooses half pages, whose keys no kernel scores."""

    def select(self, q, layer, budget):
        chosen = super().select(q, layer, budget)
        return Selection(chosen.indices * 2, chosen.lengths, 8)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    "selector,pruner,names",
    [
        (Quest(metadata_type="native"), TopP(0.9), ["page_scores", "top_k", "fused_decode"]),
        (FirstPages(), TopP(0.9), ["page_scores", "top_k", "fused_decode"]),
        (FirstPages(), BoundedTopP(0.9, 4, 50, tail="page_mean"), ["page_scores", "top_k", "fused_decode"]),
        (FirstPages(), Halved(0.9), ["page_scores", "top_k", "spgemv", "top_p", "sparse_attention"]),
        (Finished(), TopP(0.9), ["page_scores", "top_k", "spgemv", "top_p", "sparse_attention"]),
        (Tokens(), TopP(0.9), ["page_scores", "top_k", "fused_decode"]),
        (Tokens(), BoundedTopP(0.9, 4, 50, tail="none"), ["page_scores", "top_k", "fused_decode"]),
        (
            Tokens(),
            BoundedTopP(0.9, 4, 50, tail="page_mean"),
            ["page_scores", "top_k", "spgemv", "top_p", "page_tail", "sparse_attention"],
        ),
        (Halves(), TopP(0.9), ["page_scores", "top_k", "top_p", "sparse_attention"]),
    ],
    ids=[
        "native",
        "pages",
        "bounded",
        "own pruner",
        "finish",
        "tokens",
        "bounded tokens",
        "tokens' tail",
        "half pages",
    ],
)
def test_what_any_selector_chooses_is_pruned_and_attended_to_in_one_launch(
    selector, pruner, names, device, monkeypatch
):
    layer = caches(selector, device, torch.bfloat16, pruner, count=1)[0].layers[0]
    attention, steps = TwilightAttention(selector, pruner, 0.5), []
    q = torch.randn(3, 8, 64, device=device).bfloat16()
    layer.budget(attention.budget)  # by a launch of its own, once a step
    seen = launches(monkeypatch)
    out, lse = attention.attend(q, layer)
    assert [kernel.expression.split("<")[0] for kernel in seen] == names
    attention.observer = steps.append
    again, _ = attention.attend(q, layer)
    torch.testing.assert_close(again.float(), out.float(), rtol=1e-2, atol=2e-3)
    # Attention over exactly what it says it kept.
    kept, tail = steps[0].pruned.selection, steps[0].pruned.tail
    listed = Selection(kept.indices.masked_fill(~kept.counted(), 0), kept.lengths)
    if tail is not None:
        pages = tail.pages
        behind = ~pages.counted()
        pages = replace(
            pages, indices=pages.indices.masked_fill(behind, 0),
            log_weight=pages.log_weight.masked_fill(behind.repeat_interleave(4, 1), -torch.inf),
        )  # fmt: skip
        tail = replace(tail, pages=pages)
    want, want_lse = ops.sparse_attention(
        q, layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens, listed, tail=tail, backend="torch"
    )
    assert steps[0].one_after_select == (names[-1] == "fused_decode") and not steps[0].one_launch
    if isinstance(selector, Finished):
        assert (out == kept.lengths.sum()).all()
    else:
        torch.testing.assert_close(out.float(), want.float(), rtol=2e-2, atol=8e-3)
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=2e-3)


def bounds(pruner, layer):
    rule = pruner.mass_rule(layer)
    return {"min_tokens": rule.min_tokens, "max_tokens": rule.max_tokens, "means": rule.means}


def launches(monkeypatch):
    seen, launch = [], kernels.Kernel.launch
    monkeypatch.setattr(
        kernels.Kernel, "launch", lambda self, *args, **options: seen.append(self) or launch(self, *args, **options)
    )
    return seen


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize(
    "selector,in_one",
    [(Quest(), True), (BlockMean(), True), (Full(), True), (QuestAndMore(), False)],
    ids=["quest", "means", "full", "more"],
)
def test_a_step_is_what_appending_and_attending_are(selector, in_one, bounded, static, device, monkeypatch):
    # A p of its own for each layer, far enough apart that the wrong one shows.
    ps = (0.3, 0.95, 0.6)
    pruner = BoundedTopP(0.1, 8, 50, tail="page_mean", layer_p=ps) if bounded else TopP(0.1, layer_p=ps)
    attention = TwilightAttention(selector, pruner, 0.5)
    pair = caches(selector, device, torch.bfloat16, pruner)
    layers = [(StaticCache(cache, 800, 60) if static else cache).layers for cache in pair]
    seen = launches(monkeypatch)
    torch.manual_seed(1)
    for _ in range(20):
        for mine, theirs, p in zip(*layers, ps, strict=True):
            q = torch.randn(3, 8, 64, device=device).bfloat16()
            k, v = torch.randn(2, 3, 2, 64, device=device).bfloat16()
            theirs.append(k, v)
            vectors = selector.ranking(theirs).vectors
            budget = theirs.budget(attention.budget)
            want = ops.fused_decode(
                q, theirs.k_pages, theirs.v_pages, theirs.shadow, vectors, theirs.page_table, theirs.seq_lens,
                budget if vectors else None, p, **bounds(pruner, theirs),
            )  # fmt: skip
            seen.clear()
            out, lse = attention.decode(q, k, v, mine)
            # The first layer of a step resolves the budgets, by a launch of their own.
            assert len(seen) == (1 if in_one else 2) or mine is layers[0][0]
            assert out.equal(want.out) and lse.equal(want.lse)
            for name in ("k_pages", "v_pages", "shadow"):
                assert getattr(mine, name)[1:].equal(getattr(theirs, name)[1:])
            for spec in (*mine.specs, *mine.pruner_specs):
                assert mine.metadata(spec.name)[1:].equal(theirs.metadata(spec.name)[1:])


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_a_captured_step_appends_to_active_rows_alone(device):
    attention = TwilightAttention(Quest(), TopP(0.8, layer_p=(0.5, 0.9, 0.99)), 0.5)
    statics = [StaticCache(cache, 800, 60) for cache in caches(Quest(), device, torch.bfloat16)]
    for static in statics:
        static.set_active([0, 2])
    q = torch.zeros(LAYERS, 3, 8, 64, device=device, dtype=torch.bfloat16)
    k, v = torch.zeros(2, LAYERS, 3, 2, 64, device=device, dtype=torch.bfloat16)
    graph = DecodeGraph(
        statics[0], lambda: [attention.decode(q[i], k[i], v[i], statics[0].layers[i])[0] for i in range(LAYERS)]
    )
    for step in range(40):
        if step == 20:
            for static in statics:
                static.set_active([1, 2])
        for part in (q, k, v):
            part.copy_(torch.randn_like(part))
        got = graph.replay()
        for i in range(LAYERS):
            statics[1].layers[i].append(k[i], v[i])
            out, _ = attention.attend(q[i], statics[1].layers[i])
            assert got[i].equal(out)
    assert statics[0].lengths == [720, 53, 300]
    for mine, theirs in zip(statics[0].layers, statics[1].layers, strict=True):
        for name in ("k_pages", "v_pages", "shadow"):
            assert getattr(mine, name)[1:].equal(getattr(theirs, name)[1:])
