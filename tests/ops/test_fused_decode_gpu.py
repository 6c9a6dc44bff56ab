"""The fused kernel, stage by stage on what it says it chose: candidates, kept tokens and output against the twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.test_spgemv_gpu import Paged, pytestmark  # noqa: F401
from twilight import Selection, ops
from twilight.budget import Budget
from twilight.ops.quantize import split_shadow
from twilight.ops.top_p import top_p_mask
from twilight.selector import combine_group


class Case(Paged):
    """A `Paged` with values, their means if there is to be a tail, vectors of the pages and budgets."""

    def __init__(self, lengths, *, vectors=2, share=0.25, tail=False, scale=1.0, **sizes):
        super().__init__(lengths, **sizes)
        self.q *= scale
        # Means that are worth something.
        self.v_pages = torch.randn_like(self.k_pages) + torch.randn_like(self.k_pages[:, :, :1])
        full = torch.ones(len(self.k_pages), self.page, dtype=torch.bool, device="cuda")
        self.vectors = {
            0: (),
            1: ops.page_means(self.k_pages, full, 8),
            2: ops.quantize_bounds(self.k_pages.amax(2), self.k_pages.amin(2)),
        }[vectors]
        self.means = None
        if tail:
            self.means = ops.MeanValues(ops.page_means(self.v_pages, full, 8), self.page, self.table.shape[1])
        tokens = (self.seq_lens.double() * share).ceil().clamp(min=1).minimum(self.seq_lens.double()).int()
        longest = max(1, int(max(lengths) * share + 1))
        self.budget = Budget(tokens[:, None].expand(-1, self.heads).contiguous(), longest)
        self.given = None

    def run(self, p, backend="cuda", *, lists=True, **options):
        return ops.fused_decode(
            self.q, self.k_pages, self.v_pages, self.shadow, self.vectors, self.table, self.seq_lens,
            self.budget if self.vectors else None, p, lists=lists, means=self.means, candidates=self.given,
            backend=backend, **options,
        )  # fmt: skip


def as_mask(selection, n):
    """`[b, Hkv, n]`: which entries a selection holds; checks that they are ascending on the way."""
    counted, lists = selection.counted(), selection.indices.long()
    assert bool(((lists[..., 1:] > lists[..., :-1]) | ~counted[..., 1:]).all())
    mask = torch.zeros(*lists.shape[:2], n + 1, dtype=torch.bool, device=lists.device)
    return mask.scatter_(-1, lists.masked_fill(~counted, n), True)[..., :n]


def check(case, p, *, reduce="softmax", min_tokens=1, max_tokens=None):
    bounds = {"min_tokens": min_tokens, "max_tokens": max_tokens}
    got = case.run(p, reduce=reduce, **bounds)
    page, pages = case.page, case.table.shape[1]
    have = (case.seq_lens + page - 1) // page

    # Candidates: the newest page, and no page left out that ranks clearly above one that is in.
    size = page if case.given is None else case.given.granularity
    chosen = as_mask(got.candidates, pages * page // size)
    if case.vectors:
        want = case.budget.pages(page).minimum(have[:, None])
        assert torch.equal(got.candidates.lengths, want)
        scores = ops.page_scores(case.q, case.vectors, case.table, case.seq_lens, page_size=page, backend="torch")
        ranked = combine_group(scores, case.heads, reduce, scale=case.q.shape[-1] ** -0.5)
        newest = torch.arange(pages, device="cuda") == (have - 1)[:, None, None]
        assert bool((chosen | ~newest).all())
        worst = ranked.masked_fill(~chosen | newest, torch.inf).amin(-1)
        best = ranked.masked_fill(chosen, -torch.inf).amax(-1)
        assert bool((worst >= best - 2e-3 * (1 + best.abs())).all())
    elif case.given is None:
        assert torch.equal(got.candidates.lengths, have[:, None].expand(-1, case.heads))
    else:
        assert got.candidates.indices is case.given.indices
        assert torch.equal(got.candidates.lengths, case.given.lengths)

    # What top-p keeps of their logits.
    clean = Selection(
        got.candidates.indices.masked_fill(~got.candidates.counted(), 0), got.candidates.lengths, size
    )  # fmt: skip
    logits = ops.estimate_scores(
        case.q, case.shadow, case.table, case.seq_lens, clean, page_size=page, out_dtype=torch.float16, backend="torch"
    )
    positions, valid = clean.positions(case.seq_lens)
    n = pages * page
    kept = as_mask(got.pruned.selection, n)
    here = kept.gather(-1, positions) & valid
    assert torch.equal(here.sum(-1), got.pruned.selection.lengths.long())
    weights = torch.softmax(logits.double(), -1).nan_to_num(0).unflatten(1, (case.heads, -1))
    mass = (weights * here.unsqueeze(2)).sum(-1)
    if max_tokens is None:
        assert bool((mass >= p - 2e-3)[got.candidates.lengths > 0].all())
    reference = top_p_mask(logits, p, **bounds).unflatten(1, (case.heads, -1))
    union = reference.any(2)
    missing = (union & ~here).sum(-1)
    assert bool((missing <= 2 + 0.01 * union.sum(-1)).all()), (
        "tokens at the threshold may differ by rounding, no others"
    )
    assert bool((here.sum(-1) <= 1.06 * union.sum(-1) + 24).all())
    counts = got.pruned.per_query_head.unflatten(1, (case.heads, -1))
    assert bool((counts >= reference.sum(-1) - 2 - 0.01 * reference.sum(-1)).all())
    assert bool((counts <= got.pruned.selection.lengths[..., None]).all())
    if max_tokens is None:
        per_head = got.pruned.mass.unflatten(1, (case.heads, -1))
        assert bool((per_head >= p - 1e-6)[got.candidates.lengths > 0].all())
    # A head keeps its heaviest, so that their number says which they are, and what they weigh.
    ranked = weights.sort(-1, descending=True).values
    own = ranked.cumsum(-1).gather(-1, (counts.long() - 1).clamp(min=0)[..., None])[..., 0]
    some = counts > 0
    torch.testing.assert_close(
        got.pruned.mass.unflatten(1, counts.shape[1:])[some].double(), own[some], rtol=0, atol=4e-3
    )
    there = valid.sum(-1)[..., None]
    assert bool((counts >= there.clamp(max=min_tokens)).all())
    if max_tokens is not None:
        # Halves repeat, and what is as heavy as the last one stays.
        sorted_logits = logits.double().unflatten(1, (case.heads, -1)).sort(-1, descending=True).values
        last = sorted_logits[..., min(max_tokens, sorted_logits.shape[-1]) - 1].nan_to_num(0, 0, 0)
        ties = (sorted_logits >= (last - 2e-3 * last.abs() - 1e-3)[..., None]).sum(-1)
        assert bool((counts <= ties.clamp(min=max_tokens)).all())

    # Attention over exactly these.
    listed = Selection(
        got.pruned.selection.indices.masked_fill(~got.pruned.selection.counted(), 0), got.pruned.selection.lengths
    )
    tail = None
    if case.means is not None:
        # A page's pruned mass, and the page's mean with it.
        tail = ops.page_tail(logits, clean, listed, case.seq_lens, case.means)
        behind = ~clean.counted().repeat_interleave(case.group, 1)
        lost = got.pruned.tail.pages.log_weight.masked_fill(behind, -torch.inf)
        want = tail.pages.log_weight.masked_fill(behind, -torch.inf)
        # Weights of e^-80 of the largest and below are 0.
        both = (lost > -torch.inf) & (want > -torch.inf)
        peak = logits.double().amax(-1, keepdim=True)
        assert bool((both | (want == lost) | (want < peak - 80)).all())
        torch.testing.assert_close(lost[both], want[both], rtol=4e-3, atol=1e-2)
        tail = replace(tail, pages=replace(tail.pages, log_weight=lost))
    out, lse = ops.sparse_attention(
        case.q, case.k_pages, case.v_pages, case.table, case.seq_lens, listed, tail=tail, backend="torch"
    )
    torch.testing.assert_close(got.lse, lse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.out.float(), out.float(), rtol=2e-2, atol=4e-3)
    return got


@pytest.mark.parametrize("vectors", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim,page", [(64, 16), (128, 16), (128, 32), (256, 16)])
@pytest.mark.parametrize("heads,group", [(2, 4), (1, 1), (3, 3), (2, 8), (1, 5), (2, 6), (1, 7)])
def test_ragged_rows(vectors, dtype, dim, page, heads, group):
    case = Case([1500, 0, 1, 777, 16, 4100], vectors=vectors, heads=heads, group=group, dim=dim, page=page, dtype=dtype)
    check(case, 0.9)


@pytest.mark.parametrize("batch,length", [(1, 8192), (1, 32768), (1, 131071), (3, 40000), (20, 5000), (40, 3001)])
def test_every_size_of_cluster(batch, length):
    check(Case([length - 7 * i for i in range(batch)], heads=8), 0.9)


@pytest.mark.parametrize("p", [0.3, 0.95, 0.999, 0.9999, 0.99999, 1.0])
@pytest.mark.parametrize("length", [300, 20000])
def test_p(p, length):
    check(Case([length, length // 3], heads=4), p)


BOUNDS = [(1, None), (32, 256), (200, None), (1, 40), (64, 64)]


@pytest.mark.parametrize("low,high", BOUNDS)
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])  # diffuse and focused heads
@pytest.mark.parametrize(
    "lengths", [[1500, 0, 1, 777, 16, 4100], [30000], [9000, 17, 33], [1000 + i for i in range(70)]]
)
def test_bounds(lengths, scale, low, high):
    check(Case(lengths, heads=2, scale=scale), 0.9, min_tokens=low, max_tokens=high)


@pytest.mark.parametrize("p", [0.3, 0.999, 1.0])
@pytest.mark.parametrize("low,high", BOUNDS[1:])
def test_bounds_at_any_p(p, low, high):
    check(Case([5000, 300], heads=2), p, min_tokens=low, max_tokens=high)


@pytest.mark.parametrize("vectors", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim,page", [(64, 16), (128, 16), (128, 32), (256, 16)])
@pytest.mark.parametrize("heads,group", [(2, 4), (1, 1), (3, 3), (2, 8)])
def test_tails(vectors, dtype, dim, page, heads, group):
    options = {"vectors": vectors, "heads": heads, "group": group, "dim": dim, "page": page, "dtype": dtype}
    check(Case([1500, 0, 1, 777, 16, 4100], tail=True, **options), 0.6, min_tokens=4, max_tokens=60)


@pytest.mark.parametrize("low,high", [(1, None), (16, 128), (1, 1)])
@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("lengths", [[30000], [131071], [9000, 17, 33], [1000 + i for i in range(70)], [3000] * 40])
def test_tails_of_every_size_of_cluster(lengths, scale, low, high):
    check(Case(lengths, heads=8, scale=scale, tail=True), 0.9, min_tokens=low, max_tokens=high)


def test_a_tail_of_everything_but_one_token():
    # All logits alike but one: what is kept is that one, and the means carry the rest.
    case = Case([4000], heads=1, group=1, vectors=0, tail=True, dtype=torch.float16)
    case.q.zero_()
    case.q[0, 0, 0] = 8.0
    case.k_pages[..., 0] = 0.0
    page, slot = int(case.table[0, 100]), 5
    case.k_pages[page, 0, slot, 0] = 8 * 128**0.5 / 8
    codes, params = split_shadow(case.shadow, case.page)
    codes[:], params[:] = ops.quantize(case.k_pages)
    got = case.run(0.1)
    # e^8 / (e^8 + 3999) = 0.43
    assert got.pruned.selection.lengths.item() == 1 and got.pruned.selection.indices[0, 0, 0] == 1605
    assert abs(float(got.pruned.mass) - 0.427) < 0.02
    v = case.v_pages[case.table[0].long()].flatten(0, 2)[:4000].double()
    means = case.means.gather(case.table[:1].long()[:, None])[0, 0].double()
    weight = torch.full((250,), 16.0, device="cuda", dtype=torch.double)
    weight[100] = 15
    want = (2980.958 * v[1605] + weight @ means) / (2980.958 + 3999)
    torch.testing.assert_close(got.out[0, 0].double(), want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
def test_reduce(reduce):
    check(Case([9000, 5000], heads=4), 0.9, reduce=reduce)


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_budgets_of_everything_and_of_a_page(share):
    check(Case([5000, 90, 17], heads=4, share=share), 0.9)


def test_all_pages_alike():
    case = Case([6000, 333], heads=4)
    case.k_pages[:] = case.k_pages[:1, :, :1]
    case.shadow[:] = case.shadow[:1]
    codes, params = ops.quantize_bounds(case.k_pages.amax(2), case.k_pages.amin(2))
    case.vectors = (codes, params)
    stored_codes, stored_params = split_shadow(case.shadow, case.page)
    stored_codes[:], stored_params[:] = ops.quantize(case.k_pages)
    got = case.run(0.5)
    # Ties are all kept, and equal scores go to the lower page.
    want = case.budget.pages(case.page)
    first = torch.arange(case.table.shape[1], device="cuda") < (want - 1)[..., None]
    newest = torch.arange(case.table.shape[1], device="cuda") == (case.table.new_tensor([374, 20]))[:, None, None]
    assert torch.equal(as_mask(got.candidates, case.table.shape[1]), first | newest)
    tokens = (want - 1) * case.page + torch.tensor([6000 % 16 or 16, 333 % 16], device="cuda")[:, None]
    assert torch.equal(got.pruned.selection.lengths, tokens.int())


BOUNDED = {"min_tokens": 16, "max_tokens": 100}


@pytest.mark.parametrize("options", [{}, BOUNDED], ids=["plain", "bounded"])
@pytest.mark.parametrize("vectors", [0, 2])
@pytest.mark.parametrize(
    "lengths", [[32768], [200, 1, 0], [9000, 17, 4097], [3000] * 40, [1500 + 37 * i for i in range(70)]]
)
def test_without_lists_the_same_is_kept(vectors, lengths, options):
    # Pages are dealt out in turn then, in runs with lists: other sums, the same sets.
    case = Case(lengths, heads=8, vectors=vectors, tail=bool(options))
    want, got = case.run(0.9, **options), case.run(0.9, lists=False, **options)
    assert got.candidates.indices.shape[-1] == got.pruned.selection.indices.shape[-1] == 0
    assert torch.equal(got.candidates.lengths, want.candidates.lengths)
    assert torch.equal(got.pruned.selection.lengths, want.pruned.selection.lengths)
    assert torch.equal(got.pruned.per_query_head, want.pruned.per_query_head)
    torch.testing.assert_close(got.pruned.mass, want.pruned.mass, rtol=0, atol=2e-6)
    torch.testing.assert_close(got.lse, want.lse, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.out.float(), want.out.float(), rtol=1e-2, atol=2e-3)


def test_fewer_pages_than_blocks():
    # A cluster is cut for the longest row that the table has room for; this one leaves most blocks without a page.
    case = Case([40], heads=2)
    case.table = torch.nn.functional.pad(case.table, (0, 2048 - case.table.shape[1]))
    for lists in (True, False):
        got, want = case.run(0.9, lists=lists), case.run(0.9, "torch")
        assert torch.equal(got.pruned.selection.lengths, want.pruned.selection.lengths)
        torch.testing.assert_close(got.out.float(), want.out.float(), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("reduce", ["softmax", "sum", "max"])
@pytest.mark.parametrize("length", [3000, 30000])
def test_pages_of_nan_come_first(reduce, length):
    case = Case([length], heads=2, share=0.1)
    worst = [3, 77, 120]
    codes, params = case.vectors
    params[case.table[0, worst].long(), 0] = torch.nan
    got = case.run(0.9, reduce=reduce)
    pages = case.table.shape[1]
    chosen, want = as_mask(got.candidates, pages), case.budget.pages(case.page)
    if reduce == "softmax":  # one NaN among a head's pages is one in each of their shares, and ties go by position
        assert chosen[0, 0, : int(want[0, 0])].all()
    else:
        assert chosen[0, 0, [*worst, pages - 1]].all()
    assert chosen[0, 1, pages - 1]
    assert torch.equal(chosen.sum(-1), want.long())
    twin = as_mask(case.run(0.9, reduce=reduce, backend="torch").candidates, pages)
    assert reduce != "softmax" or torch.equal(chosen[0, 0], twin[0, 0])
    # Enough of them: the lowest pages, and not even the newest beside them.
    params[case.table[0].long(), 1] = torch.nan
    params[case.table[0, -1].long(), 1] = 1.0
    chosen = as_mask(case.run(0.9, reduce=reduce).candidates, pages)
    n = int(want[0, 1])
    assert chosen[0, 1, :n].all() and int(chosen[0, 1].sum()) == n


@pytest.mark.parametrize("lengths", [[32000], [3000] * 40])
@pytest.mark.parametrize("options", [{}, BOUNDED], ids=["plain", "bounded"])
def test_replays_follow_lengths_and_budgets(lengths, options):
    case = Case(lengths, heads=8, tail=bool(options))
    full = case.seq_lens.clone()
    page_budget = case.budget.pages(case.page)
    case.run(0.9, lists=False, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = case.run(0.9, lists=False, **options)
    for share in (1.0, 0.4, 0.9):
        case.seq_lens.copy_((full * share).int())
        page_budget.copy_((full[:, None] * share / 80).int().clamp(min=1).expand_as(page_budget))
        graph.replay()
        want = case.run(0.9, lists=False, **options)
        assert torch.equal(got.out, want.out) and torch.equal(got.pruned.mass, want.pruned.mass)
        assert torch.equal(got.candidates.lengths, page_budget)


class Step:
    """A case whose rows' newest tokens have yet to be appended, and the same after `ops.append` has done it."""

    def __init__(self, lengths, counts=None, *, vectors=2, **options):
        self.case, self.whole = (Case(lengths, vectors=vectors, **options) for _ in range(2))
        case, shape = self.case, (len(lengths), self.case.heads, self.case.q.shape[-1])
        counts = [int(n > 0) for n in lengths] if counts is None else counts
        # Cut from the projection of q, k and v at once, as models do.
        qkv = (2 * torch.randn(shape[0], 4, *shape[1:], device="cuda")).to(case.q.dtype)
        self.new = ops.NewTokens(qkv[:, 1], qkv[:, 3], torch.tensor(counts, dtype=torch.int32, device="cuda"))
        self.rule = {0: None, 1: "mean", 2: "bounds"}[vectors]

    def append(self):
        whole, new = self.whole, self.new
        ops.append(
            new.k[:, None], new.v[:, None], whole.k_pages, whole.v_pages, whole.shadow, whole.table, whole.seq_lens,
            new.counts, summary=self.rule and ops.Summary(self.rule, whole.vectors),
            value_summary=whole.means and ops.Summary("mean", whole.means.values), backend="cuda",
        )  # fmt: skip
        return whole

    def buffers(self):
        for each in (self.case, self.whole):
            means = () if each.means is None else each.means.values
            parts = (each.k_pages, each.v_pages, each.shadow, *each.vectors, *means)
            yield [part.view(torch.uint8) for part in parts]


def check_step(step, **options):
    before = [part.clone() for part in next(step.buffers())]
    want, got = step.append().run(0.9, **options), step.case.run(0.9, new=step.new, **options)
    mine, theirs = step.buffers()
    changed = [not part.equal(old) for part, old in zip(mine, before, strict=True)]
    assert all(changed) == bool(step.new.counts.any()), "there is something to append, or there is not"
    for part, other in zip(mine, theirs, strict=True):
        assert part.equal(other)
    for a, b in ((got.out, want.out), (got.lse, want.lse), (got.pruned.mass, want.pruned.mass)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert got.pruned.selection.lengths.equal(want.pruned.selection.lengths)
    assert got.candidates.lengths.equal(want.candidates.lengths)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("vectors", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dim,page", [(64, 16), (64, 32), (128, 16), (128, 32), (256, 16), (256, 32)])
@pytest.mark.parametrize("heads,group", [(2, 4), (1, 1), (3, 8)])
def test_a_new_token_as_append_writes_it(vectors, dtype, dim, page, heads, group, tail):
    lengths = [1500, 0, 1, 777, 16, 17, 32, 33, 4100, 2]
    options = {
        "tail": tail,
        "vectors": vectors,
        "heads": heads,
        "group": group,
        "dim": dim,
        "page": page,
        "dtype": dtype,
    }
    check_step(Step(lengths, [1, 0, 1, 1, 1, 1, 1, 1, 0, 1], **options))


@pytest.mark.parametrize("lists", [True, False])
@pytest.mark.parametrize("vectors,share", [(0, 1.0), (1, 0.25), (2, 0.25), (2, 1.0)])
@pytest.mark.parametrize("lengths", [[32768], [32769], [131071], [9000, 17, 4097], [3000] * 40, [256 * 16 - 15] * 70])
def test_a_new_token_in_every_size_of_cluster(lengths, vectors, share, lists):
    if vectors == 0 and max(lengths) > 40000:
        lengths = [40001]
    check_step(Step(lengths, vectors=vectors, share=share, heads=8), lists=lists)
    check_step(Step(lengths, vectors=vectors, share=share, heads=8, tail=True), lists=lists, **BOUNDED)


@pytest.mark.parametrize("vectors", [1, 2])
def test_new_tokens_of_any_value(vectors):
    step = Step([100] * 6, vectors=vectors, heads=2)
    step.new.k[0] = 3.0
    step.new.k[1, :, 5] = torch.nan
    step.new.k[2, :, 7] = torch.inf
    step.new.k[3] = 0.0
    step.new.v[4] = torch.nan
    step.new.k[5] *= 1e4
    check_step(step)


def test_no_new_tokens():
    check_step(Step([100, 5000], [0, 0], heads=2))


def test_a_replayed_step_appends_where_the_row_then_ends():
    step = Step([4000, 900], heads=4)
    start = step.case.seq_lens - 40
    step.case.seq_lens.copy_(start), step.whole.seq_lens.copy_(start)
    graph = torch.cuda.CUDAGraph()
    step.case.run(0.9, lists=False, new=step.new), step.append().run(0.9, lists=False)
    with torch.cuda.graph(graph):
        got = step.case.run(0.9, lists=False, new=step.new)
    for i in range(40):
        step.new.k.copy_(torch.randn_like(step.new.k)), step.new.v.copy_(torch.randn_like(step.new.v))
        step.new.counts[1] = i % 3 > 0
        step.case.seq_lens.add_(step.new.counts), step.whole.seq_lens.add_(step.new.counts)
        graph.replay()
        want = step.append().run(0.9, lists=False)
        assert got.out.equal(want.out) and got.lse.equal(want.lse)
        assert all(a.equal(b) for a, b in zip(*step.buffers(), strict=True))


@pytest.mark.parametrize("options", [{}, BOUNDED], ids=["plain", "bounded"])
def test_nan_stays_in_its_row(options):
    case = Case([3000, 3000, 3000], heads=2, tail=bool(options))
    want = case.run(0.9, **options)
    case.q[1, 2] = torch.nan
    got = case.run(0.9, **options)
    assert int(got.pruned.per_query_head[1, 2]) == int(got.candidates.num_tokens(case.seq_lens)[1, 0])
    assert got.out[1, 2].isnan().all()
    assert torch.equal(got.out[0], want.out[0]) and torch.equal(got.out[2], want.out[2])
    assert torch.equal(got.out[1, 4:], want.out[1, 4:])


@pytest.mark.parametrize("lengths", [[32768], [9000, 1, 4097], [3000] * 40])
@pytest.mark.parametrize("options", [{}, BOUNDED], ids=["plain", "bounded"])
def test_twenty_runs_are_bitwise_equal(lengths, options):
    case = Case(lengths, heads=8, tail=bool(options))
    first = case.run(0.9, **options)
    for _ in range(20):
        again = case.run(0.9, **options)
        assert torch.equal(first.out, again.out) and torch.equal(first.lse, again.lse)
        assert torch.equal(first.pruned.selection.lengths, again.pruned.selection.lengths)
        assert torch.equal(first.pruned.mass, again.pruned.mass)
