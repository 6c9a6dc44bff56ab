"""Dense attention over pages against loops in float64: ragged batches, several tokens a step, causality."""

from __future__ import annotations

import math

import pytest
import torch

from tests import oracles
from twilight import ops

DIM = 8


def _case(lengths: list[int], page_size: int, group: int, steps: int, dtype: torch.dtype = torch.float32):
    keys, values = (torch.randn(len(lengths), max(1, *lengths), 2, DIM).to(dtype) for _ in range(2))
    table = oracles.page_table(lengths, page_size)
    pages = tuple(oracles.lay_out(rows, lengths, table, page_size) for rows in (keys, values))
    q = torch.randn(len(lengths), steps, 2 * group, DIM).to(dtype)
    return keys, values, pages, table, q, torch.tensor(lengths, dtype=torch.int32)


def _compare(
    lengths: list[int], new: list[int], group: int, page_size: int, dtype: torch.dtype, atol: float, given: bool
) -> None:
    steps = max(new)
    keys, values, pages, table, q, lens = _case(lengths, page_size, group, steps, dtype)
    counts = torch.tensor(new, dtype=torch.int32) if given else None
    out, lse = ops.dense_attention(q, *pages, table, lens, max_seq_len=max(lengths), new_tokens=counts)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.isfinite().all()
    for row, length in enumerate(lengths):
        for step in range(new[row]):
            seen = length - new[row] + step + 1
            for head in range(2 * group):
                k, v = (oracles.array(part[row, :seen, head // group]) for part in (keys, values))
                want, want_lse = oracles.attend(oracles.array(q[row, step, head]), k, v, DIM**-0.5)
                assert oracles.array(out[row, step, head]).tolist() == pytest.approx(want.tolist(), abs=atol, rel=atol)
                assert float(lse[row, step, head]) == pytest.approx(want_lse, abs=1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("lengths", "page_size"), [([37, 1, 16], 16), ([5, 5], 4), ([3], 1), ([20, 17, 18, 20], 4)])
@pytest.mark.parametrize("group", [1, 3])
def test_one_token_equals_loops(
    lengths: list[int], page_size: int, group: int, dtype: torch.dtype, atol: float
) -> None:
    _compare(lengths, [1] * len(lengths), group, page_size, dtype, atol, given=False)


@pytest.mark.parametrize("given", [False, True])
def test_several_tokens_are_causal(given: bool) -> None:
    _compare([20, 9, 4], [4, 4, 4], 2, 4, torch.float32, 1e-5, given)


@pytest.mark.parametrize("lengths", [[20, 9, 4, 6], [20, 20, 20, 20]])
def test_ragged_new_tokens(lengths: list[int]) -> None:
    _compare(lengths, [1, 5, 4, 0], 2, 4, torch.float32, 1e-5, given=True)


def test_empty_sequences_give_zeros_and_no_mass() -> None:
    _, _, pages, table, q, lens = _case([6, 0], 4, 2, 1)
    q[1] = torch.nan
    out, lse = ops.dense_attention(q, *pages, table, lens, max_seq_len=6)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all() and lse[0].isfinite().all()
    _, _, pages, table, q, lens = _case([0, 0], 4, 2, 1)
    out, lse = ops.dense_attention(q, *pages, table, lens, max_seq_len=0)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all()


def test_nan_stays_in_its_row() -> None:
    _, _, (k_pages, v_pages), table, q, lens = _case([12, 10, 12], 4, 2, 1)
    clean, clean_lse = ops.dense_attention(q, k_pages, v_pages, table, lens, max_seq_len=12)
    k_pages[table[0].long()] = v_pages[table[0].long()] = torch.nan
    out, lse = ops.dense_attention(q, k_pages, v_pages, table, lens, max_seq_len=12)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert torch.equal(out[1:], clean[1:]) and torch.equal(lse[1:], clean_lse[1:])


def test_sm_scale_replaces_the_default() -> None:
    keys, values, pages, table, q, lens = _case([9, 7], 4, 1, 1)
    out, lse = ops.dense_attention(q, *pages, table, lens, max_seq_len=9, sm_scale=0.05)
    k, v = (oracles.array(part[1, :7, 0]) for part in (keys, values))
    want, want_lse = oracles.attend(oracles.array(q[1, 0, 0]), k, v, 0.05)
    assert out[1, 0, 0].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert float(lse[1, 0, 0]) == pytest.approx(want_lse, abs=1e-5)


def test_exact_logits_are_dots_with_every_token() -> None:
    keys, _, (k_pages, _), table, q, lens = _case([9, 4, 0], 4, 2, 1)
    logits = ops.exact_logits(q[:, 0], k_pages, table, lens, max_seq_len=9)
    assert logits.shape == (3, 4, 9)
    for row, length in enumerate([9, 4, 0]):
        for head in range(4):
            for token in range(9):
                got = float(logits[row, head, token])
                if token >= length:
                    assert got == -math.inf
                else:
                    dot = oracles.array(q[row, 0, head]) @ oracles.array(keys[row, token, head // 2])
                    assert got == pytest.approx(float(dot) / math.sqrt(DIM), abs=1e-5)


def test_refuses_what_does_not_fit() -> None:
    _, _, pages, table, q, lens = _case([9, 4], 4, 2, 1)
    with pytest.raises(ValueError, match=r"q: expected shape \[2, any, any, 8\], got \[2, 4, 8\]"):
        ops.dense_attention(q[:, 0], *pages, table, lens, max_seq_len=9)
    with pytest.raises(TypeError, match="q: expected dtype .* got int64"):
        ops.dense_attention(q.long(), *pages, table, lens, max_seq_len=9)
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, got 3"):
        ops.dense_attention(q[:, :, :3], *pages, table, lens, max_seq_len=9)
