"""Methods: what is timed is the step, stage by stage and as a whole, and nothing is left changed."""

from __future__ import annotations

import functools

import pytest
import torch

from twilight import BoundedTopP, Geometry, Selection, TopP, TwilightAttention
from twilight.benchmarks import methods as rows
from twilight.benchmarks.cells import Cell
from twilight.benchmarks.check import WrongOutput, check_step
from twilight.benchmarks.methods import Method, Stages, make, measure_method, methods, num_tokens, whole_steps
from twilight.benchmarks.workload import make_workload
from twilight.graph import StaticCache

LENGTH = 256


@pytest.fixture
def work():
    return make_workload(Geometry(2, 8, 2, 32, 16, torch.float32), 3, LENGTH, make("quest"), 4)


@pytest.fixture
def static(work):
    return StaticCache(work.cache, LENGTH)


def test_the_rows_are_those_of_the_paper_and_the_selectors_there_are(work, monkeypatch):
    found = {method.name: method.attention for method in methods(work, work.cache.selector, 0.8)}
    expected = [
        "quest top-k, N/8", "quest + top-p", "quest + bounded top-p", "quest + bounded top-p + tail", "full + top-p",
        "block_mean + top-p", "double_sparsity + top-p",
    ]  # fmt: skip
    assert list(found) == [name for name in expected if "block_mean" not in name or rows.built_in("block_mean")]
    assert found["quest top-k, N/8"].budget.value == 0.125
    assert not found["quest top-k, N/8"].pruner.needs_logits
    assert found["quest + top-p"].budget.value == 0.25
    assert found["full + top-p"].pruner.p == 0.8
    assert rows.built_in("nobody") is None
    with pytest.raises(ModuleNotFoundError, match="no built-in selector 'nobody'"):
        make("nobody")


def test_double_sparsity_labels_the_workloads_own_channels(work, static):
    for method in methods(work, work.cache.selector, 0.9):
        if method.name.startswith("double"):
            stages = Stages(method, work, static)
    selector = work.cache.selector
    assert (selector.name, selector.channels, selector.label_bits) == ("double_sparsity", 16, 4)
    for layer, direction in enumerate(work.directions):
        chosen = selector._orders[layer]
        left = direction.abs().scatter(-1, chosen, 0)
        assert (direction.abs().gather(-1, chosen).amin(-1) >= left.amax(-1)).all()
    # And they find the heavy tokens: most of the exact mass is in what is kept.
    check = check_step(stages.attention, static, work.queries[0], stages.kept[0], "x")
    assert check["true_mass_kept"] > 0.8


def test_stages_one_after_another_are_the_step(work, static):
    for method in methods(work, work.cache.selector, 0.9):
        stages = Stages(method, work, static)
        for i in range(2):
            whole, parts = stages.total(i), stages.attend(i)
            torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=0)
            torch.testing.assert_close(parts[1], whole[1], rtol=0, atol=0)
        assert set(stages.calls()) == ({"select", "estimate", "prune", "attend", "total"} if stages.prunes else
                                       {"select", "attend", "total"})  # fmt: skip


def test_a_row_has_times_bytes_budgets_and_a_check(work, static):
    cell = Cell(3, LENGTH, 8, 2, 32)
    quest = work.cache.selector
    row = measure_method(Method("x", TwilightAttention(quest, TopP(0.9), 0.25)), work, static, cell, repeats=1)
    for column in ("select", "estimate", "prune", "attend", "total", "append", "decode", "budget"):
        assert row[column]["us"] >= 0
        assert row[column]["p10"] <= row[column]["p90"]
    union = row["budgets"]["union"]["mean"]
    assert 1 <= union < row["budgets"]["candidates"] == 64
    # d = 32, page 16: bounds of 68 bytes a page, 4-bit keys of 20 bytes, K and V of 128 in half precision.
    assert row["bytes"]["select"] == 3 * 2 * LENGTH / 16 * 68
    assert row["bytes"]["estimate"] == 3 * 2 * 64 * 20
    assert row["bytes"]["attend"] == pytest.approx(3 * 2 * union * 128)
    assert row["budgets"]["tail_pages"] == 0
    assert row["check"]["error_to_reference"] < 1e-5
    assert row["check"]["true_mass_kept_min"] <= row["check"]["true_mass_kept"] <= 1.00001
    assert row["ran_dense"] is False


def test_a_tail_is_checked_and_its_bytes_are_counted(work, static):
    cell = Cell(3, LENGTH, 8, 2, 32)
    pruner = BoundedTopP(0.5, 1, 4, tail="page_mean")
    attention = TwilightAttention(work.cache.selector, pruner, 0.25)
    row = measure_method(Method("x", attention), work, static, cell, repeats=1)
    assert row["budgets"]["tail_pages"] == 4  # all candidate pages: 64 tokens
    # 32 codes and two halves a page, beside K and V of what is kept.
    union = row["budgets"]["union"]["mean"]
    assert row["bytes"]["attend"] == pytest.approx(3 * 2 * (union * 128 + 4 * 36))
    assert row["check"]["error_to_reference"] < 1e-5
    plain = measure_method(Method("y", TwilightAttention(work.cache.selector, TopP(0.5))), work, static, cell, 1)
    assert plain["budgets"]["tail_bytes"] == 0 and work.cache.pruner_specs == ()


def test_whole_steps_leave_the_lengths_and_append_in_place(work, static):
    attention = TwilightAttention(work.cache.selector, TopP(0.9), 0.25)
    before = [layer.k_pages.clone() for layer in work.cache.layers]
    times = whole_steps(attention, static, work.queries, repeats=2)
    assert set(times) == {"append", "decode", "budget"}
    assert static.lengths == [LENGTH] * 3
    assert static.seq_lens.tolist() == [LENGTH] * 3
    newest = [row[-1] for row in work.cache.table.rows]
    for layer, old in zip(work.cache.layers, before, strict=True):
        changed = (layer.k_pages != old).any(-1).any(1).nonzero().tolist()  # (page, slot)
        assert sorted(changed) == sorted([page, 15] for page in newest)
    # Nothing of a captured step is left behind.
    assert static._budgets == {}


def test_what_a_step_does_once_is_taken_off(work, static, monkeypatch):
    """With clocks of our own: appending takes 30 us for two layers, 10 of them for the lengths."""
    fake = iter([10.0, 30.0, 56.0, 6.0])
    monkeypatch.setattr(rows, "time_calls", lambda *args, **named: dict.fromkeys(("us", "p10", "p90"), next(fake)))
    times = whole_steps(TwilightAttention(work.cache.selector), static, work.queries, repeats=1)
    assert times["append"]["us"] == (30 - 10) / 2
    assert times["decode"]["us"] == (56 - 10 - 6) / 2
    assert times["budget"]["us"] == 6


def test_a_wrong_step_is_found(work, static):
    attention = TwilightAttention(work.cache.selector, TopP(0.9), 0.25)
    stages = Stages(Method("x", attention), work, static)
    work.cache.layers[0].v_pages[work.cache.table.rows[0][0]] += 100  # its sinks, which are kept
    check_step(attention, static, work.queries[0], stages.kept[0], "x")  # of what is there now, it is right
    wrong = functools.partial(check_step, attention, static, work.queries[0], stages.kept[1], "x")
    with pytest.raises(WrongOutput, match="x, beside its stages: the output is"):
        wrong()


def test_an_output_of_other_tokens_than_were_kept_is_found(work, static, monkeypatch):
    attention = TwilightAttention(work.cache.selector, TopP(0.9), 0.25)
    stages = Stages(Method("x", attention), work, static)
    right = attention.attend

    def attend(q, layer):
        out, lse = right(q, layer)
        return (out if attention.observer else 1.02 * out), lse

    monkeypatch.setattr(attention, "attend", attend)
    with pytest.raises(WrongOutput, match="x: the output is 0.02 away"):
        check_step(attention, static, work.queries[0], stages.kept[0], "x")
    assert attention.observer is None


def test_num_tokens_counts_as_the_selection_does():
    lens = torch.tensor([40, 64], dtype=torch.int32)
    indices = torch.tensor([[[0, 2, 0]], [[1, 2, 3]]], dtype=torch.int32)
    pages = Selection(indices, torch.tensor([[2], [3]], dtype=torch.int32), granularity=16)
    assert num_tokens(pages, lens).tolist() == [[16 + 8], [48]]
    assert torch.equal(num_tokens(pages, lens), pages.num_tokens(lens))
    tokens = Selection(indices, torch.tensor([[2], [3]], dtype=torch.int32))
    assert num_tokens(tokens, lens).tolist() == [[2], [3]]
