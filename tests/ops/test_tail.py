"""Tails: the pruned mass of every page and what attention makes of it, against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracles
from twilight import Selection, ops
from twilight.ops.tail import MeanValues, Tail

INF = math.inf
DIM, PAGE, HEADS = 8, 4, 2
LENGTHS = [37, 9, 0, 16, 4]


def _case(group: int, granularity: int, packed: bool):
    """Logits of candidates, the tokens kept of them, and pages whose means are known."""
    generator = torch.Generator().manual_seed(granularity)
    b = len(LENGTHS)
    values = torch.randn(b, max(LENGTHS), HEADS, DIM, generator=generator)
    table = oracles.page_table(LENGTHS, PAGE)
    pages = oracles.lay_out(values, LENGTHS, table, PAGE)
    means = torch.full((len(pages), HEADS, DIM), torch.nan)
    for row, length in enumerate(LENGTHS):
        for first in range(0, length, PAGE):
            means[int(table[row, first // PAGE])] = values[row, first : min(length, first + PAGE)].mean(0)
    kept_means = ops.quantize(means, 8) if packed else (means,)
    lists = oracles.random_lists([-(-length // granularity) for length in LENGTHS], HEADS, seed=granularity)
    spelled = [[oracles.tokens_of(lists[r][h], granularity, LENGTHS[r]) for h in range(HEADS)] for r in range(b)]
    candidates = Selection(*oracles.pad(lists), granularity)
    logits = torch.full((b, HEADS * group, candidates.capacity * granularity), -INF)
    estimates = [[{} for _ in range(HEADS * group)] for _ in range(b)]
    kept = [[[] for _ in range(HEADS)] for _ in range(b)]
    for row in range(b):
        for head in range(HEADS):
            places = [
                entry * granularity + offset
                for entry in range(len(lists[row][head]))
                for offset in range(granularity)
                if lists[row][head][entry] * granularity + offset < LENGTHS[row]
            ]
            for query in range(head * group, (head + 1) * group):
                for place, token in zip(places, spelled[row][head], strict=True):
                    estimate = float(3 * torch.randn((), generator=generator))
                    logits[row, query, place] = estimates[row][query][token] = estimate
            coins = torch.rand(len(places), generator=generator).tolist()
            kept[row][head] = [token for token, coin in zip(spelled[row][head], coins, strict=True) if coin < 0.3]
    lens = torch.tensor(LENGTHS, dtype=torch.int32)
    page_means = MeanValues(tuple(kept_means), PAGE, table.shape[1])
    return logits, estimates, candidates, kept, spelled, values, pages, table, lens, page_means


def _by_page(estimates: dict[int, float], kept: list[int]) -> dict[int, float]:
    """Return the log of the pruned mass of each page that holds a pruned token."""
    mass: dict[int, float] = {}
    for token, estimate in estimates.items():
        if token not in kept:
            mass[token // PAGE] = mass.get(token // PAGE, 0.0) + math.exp(estimate)
    return {page: math.log(total) for page, total in mass.items()}


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("granularity", [1, 2, PAGE, 2 * PAGE])
def test_every_pruned_token_counts_on_its_page(granularity: int, group: int) -> None:
    logits, estimates, candidates, kept, _, _, _, _, lens, means = _case(group, granularity, False)
    tail = ops.page_tail(logits, candidates, Selection(*oracles.pad(kept)), lens, means)
    assert tail.pages.granularity == PAGE and tail.pages.log_weight.dtype == torch.float32
    for row in range(len(LENGTHS)):
        for head in range(HEADS):
            count = int(tail.pages.lengths[row, head])
            listed = tail.pages.indices[row, head, :count].tolist()
            assert listed == sorted(set(listed))
            wanted = [
                _by_page(estimates[row][query], kept[row][head]) for query in range(head * group, (head + 1) * group)
            ]
            assert set().union(*wanted) <= set(listed)
            if granularity != PAGE:
                assert set().union(*wanted) == set(listed)  # pages where nothing was pruned are not read
            for query, mass in zip(range(head * group, (head + 1) * group), wanted, strict=True):
                mine = tail.pages.log_weight[row, query, :count].tolist()
                assert mine == pytest.approx([mass.get(page, -INF) for page in listed], abs=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("granularity", [1, 2, PAGE, 2 * PAGE])
@pytest.mark.parametrize("kind", ["page_mean", "mean"])
def test_attention_counts_a_page_as_one_token(kind: str, granularity: int, group: int, packed: bool) -> None:
    logits, estimates, candidates, kept, _, values, v_pages, table, lens, means = _case(group, granularity, packed)
    keys = torch.randn(len(LENGTHS), max(LENGTHS), HEADS, DIM)
    k_pages = oracles.lay_out(keys, LENGTHS, table, PAGE)
    q = torch.randn(len(LENGTHS), HEADS * group, DIM)
    selection = Selection(*oracles.pad(kept))
    tail = ops.page_tail(logits, candidates, selection, lens, means)
    if kind == "mean":
        tail = ops.mean_tail(tail, lens)
    out, lse = ops.sparse_attention(q, k_pages, v_pages, table, lens, selection, tail=tail)
    for row, length in enumerate(LENGTHS):
        for query in range(HEADS * group):
            head = query // group
            exact = {
                t: float(oracles.array(q[row, query]) @ oracles.array(keys[row, t, head])) * DIM**-0.5
                for t in kept[row][head]
            }
            terms = [(z, oracles.array(values[row, t, head])) for t, z in exact.items()]
            rows = oracles.array(values[row, :length, head])
            pages = {
                page: oracles.mean_value(rows[page * PAGE : (page + 1) * PAGE], packed=packed)
                for page in range(-(-length // PAGE))
            }
            lost = _by_page(estimates[row][query], kept[row][head])
            if kind == "page_mean":
                terms += [(mass, pages[page]) for page, mass in lost.items()]
            elif lost:
                sizes = [min(PAGE, length - page * PAGE) for page in pages]
                mean = sum(n * pages[page] for page, n in zip(pages, sizes, strict=True)) / length
                terms.append((math.log(math.fsum(map(math.exp, lost.values()))), mean))
            total = math.fsum(math.exp(logit) for logit, _ in terms)
            want = sum((math.exp(logit) / total * value for logit, value in terms), torch.zeros(DIM).double().numpy())
            assert out[row, query].tolist() == pytest.approx(want.tolist(), abs=2e-5)
            assert float(lse[row, query]) == pytest.approx(math.log(total) if terms else -INF, abs=1e-5)


def test_a_tail_of_exact_logits_leaves_the_mass_of_all_candidates() -> None:
    # With estimates that are exact the denominator is that of dense attention, whatever is kept; and where every token
    # of a page has the same value, so is the output.
    lens = torch.tensor([24], dtype=torch.int32)
    table = oracles.page_table([24], PAGE)
    keys = torch.randn(1, 24, 1, DIM)
    values = torch.randn(1, 6, 1, DIM).repeat_interleave(PAGE, 1)
    k_pages, v_pages = (oracles.lay_out(rows, [24], table, PAGE) for rows in (keys, values))
    q = torch.randn(1, 2, DIM)
    logits = ops.exact_logits(q, k_pages, table, lens, max_seq_len=24)
    everything = Selection.everything(lens, 1, max_seq_len=24, granularity=PAGE)
    dense, dense_lse = ops.sparse_attention(q, k_pages, v_pages, table, lens, everything)
    means = MeanValues((v_pages.mean(2),), PAGE, table.shape[1])
    for p in (0.1, 0.5, 0.9):
        pruned = ops.top_p(logits, everything, lens, p, means=means)
        assert int(pruned.selection.lengths) < 24
        out, lse = ops.sparse_attention(q, k_pages, v_pages, table, lens, pruned.selection, tail=pruned.tail)
        torch.testing.assert_close(lse, dense_lse)
        torch.testing.assert_close(out, dense)


def test_nothing_pruned_leaves_no_tail() -> None:
    logits, _, candidates, _, spelled, values, v_pages, table, lens, means = _case(2, PAGE, False)
    selection = Selection(*oracles.pad(spelled))
    tail = ops.page_tail(logits, candidates, selection, lens, means)
    assert (tail.pages.log_weight == -INF).all()
    q = torch.randn(len(LENGTHS), 2 * HEADS, DIM)
    for with_tail in (tail, ops.mean_tail(tail, lens)):
        out, lse = ops.sparse_attention(q, v_pages, v_pages, table, lens, selection, tail=with_tail)
        plain, plain_lse = ops.sparse_attention(q, v_pages, v_pages, table, lens, selection)
        torch.testing.assert_close(out, plain)
        torch.testing.assert_close(lse, plain_lse)


def test_refuses_what_does_not_fit() -> None:
    logits, _, candidates, kept, _, _, v_pages, table, lens, means = _case(1, PAGE, False)
    selection = Selection(*oracles.pad(kept))
    with pytest.raises(ValueError, match=r"values: expected \(means,\) or \(codes, params\), got 3 tensors"):
        MeanValues((v_pages, v_pages, v_pages), PAGE, 9)
    with pytest.raises(TypeError, match=r"values\[1\]: expected dtype float16, got float32"):
        MeanValues((means.values[0].to(torch.uint8), torch.zeros(len(v_pages), HEADS, 2)), PAGE, 9)
    with pytest.raises(ValueError, match="pages: expected a granularity of page_size=4, got 1"):
        Tail(selection, means)
    with pytest.raises(ValueError, match="pages: expected a log_weight"):
        Tail(candidates, means)
    tail = ops.page_tail(logits, candidates, selection, lens, means)
    narrow = Tail(tail.pages, MeanValues((means.values[0][..., :4],), PAGE, table.shape[1]))
    with pytest.raises(ValueError, match=r"tail.means.values\[0\]: expected shape .*, 2, 8\], got .*, 2, 4\]"):
        ops.sparse_attention(torch.zeros(5, 2, DIM), v_pages, v_pages, table, lens, selection, tail=narrow)
