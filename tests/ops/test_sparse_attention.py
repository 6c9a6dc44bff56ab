"""Sparse attention against loops in float64, and what must not reach it: stale keys, padding, another row's NaN."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from tests import oracles
from twilight import Selection, kernels, ops
from twilight.attention import why_reference

DIM = 8
LENGTHS = [37, 1, 0, 16, 20]


def _case(page_size: int, group: int, granularity: int, dtype: torch.dtype = torch.float32):
    keys, values = (torch.randn(len(LENGTHS), max(LENGTHS), 2, DIM).to(dtype) for _ in range(2))
    table = oracles.page_table(LENGTHS, page_size)
    pages = tuple(oracles.lay_out(rows, LENGTHS, table, page_size) for rows in (keys, values))
    q = torch.randn(len(LENGTHS), 2 * group, DIM).to(dtype)
    lists = oracles.random_lists([-(-length // granularity) for length in LENGTHS], 2, seed=granularity)
    lists[4][0] = []  # a row that selects nothing for one of its heads
    return keys, values, pages, table, q, lists, torch.tensor(LENGTHS, dtype=torch.int32)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("page_size", "granularity"), [(16, 1), (16, 16), (4, 4), (1, 1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_loops(
    page_size: int, granularity: int, group: int, dtype: torch.dtype, atol: float, weighted: bool
) -> None:
    keys, values, pages, table, q, lists, lens = _case(page_size, group, granularity, dtype)
    indices, lengths = oracles.pad(lists)
    extra = None
    if weighted:
        extra = torch.randn(len(LENGTHS), 2 * group, indices.shape[-1])
        extra[0, 0, :2] = -torch.inf
        extra[3, group, :] = -torch.inf
        behind = torch.arange(indices.shape[-1]) >= lengths.repeat_interleave(group, 1).unsqueeze(-1)
        extra[behind] = torch.nan
    out, lse = ops.sparse_attention(q, *pages, table, lens, Selection(indices, lengths, granularity, extra))
    assert out.dtype == dtype and lse.dtype == torch.float32
    for row, length in enumerate(LENGTHS):
        for head in range(2 * group):
            entries = lists[row][head // group]
            tokens = oracles.tokens_of(entries, granularity, length)
            k, v = (oracles.array(part[row, tokens, head // group]) for part in (keys, values))
            log_weight = None
            if extra is not None:
                of_entry = dict(zip(entries, extra[row, head].tolist(), strict=False))
                log_weight = [of_entry[token // granularity] for token in tokens]
            want, want_lse = oracles.attend(oracles.array(q[row, head]), k, v, DIM**-0.5, log_weight)
            assert oracles.array(out[row, head]).tolist() == pytest.approx(want.tolist(), abs=atol, rel=atol)
            assert float(lse[row, head]) == pytest.approx(want_lse, abs=1e-5)


def test_nothing_selected_gives_zeros_and_no_mass() -> None:
    _, _, pages, table, q, lists, lens = _case(4, 2, 1)
    out, lse = ops.sparse_attention(q, *pages, table, lens, Selection(*oracles.pad(lists)))
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()  # an empty sequence
    assert (out[4, :2] == 0).all() and (lse[4, :2] == -torch.inf).all()  # an empty list in a sequence that is not
    assert (lse[4, 2:] > -torch.inf).all()


def test_sm_scale_replaces_the_default() -> None:
    keys, values, pages, table, q, _, lens = _case(4, 1, 1)
    everything = Selection.everything(lens, 2, max_seq_len=37, granularity=4)
    out, lse = ops.sparse_attention(q, *pages, table, lens, everything, sm_scale=0.1)
    k, v = (oracles.array(part[0, :37, 1]) for part in (keys, values))
    want, want_lse = oracles.attend(oracles.array(q[0, 1]), k, v, 0.1)
    assert out[0, 1].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert float(lse[0, 1]) == pytest.approx(want_lse, abs=1e-5)


@pytest.mark.parametrize("granularity", [1, 4])
def test_nan_stays_in_its_row(granularity: int) -> None:
    _, _, (k_pages, v_pages), table, q, lists, lens = _case(4, 2, granularity)
    selection = Selection(*oracles.pad(lists), granularity)
    clean, clean_lse = ops.sparse_attention(q, k_pages, v_pages, table, lens, selection)
    for pages in (k_pages, v_pages):
        pages[table[0].long(), 1] = torch.nan
    q[3, 0] = torch.nan
    out, lse = ops.sparse_attention(q, k_pages, v_pages, table, lens, selection)
    assert out[0, 2:].isnan().all() and out[3, 0].isnan().all()
    out[0, 2:], lse[0, 2:] = clean[0, 2:], clean_lse[0, 2:]
    out[3, 0], lse[3, 0] = clean[3, 0], clean_lse[3, 0]
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


def test_parts_merge_to_the_whole() -> None:
    _, _, pages, table, q, _, lens = _case(4, 2, 1)
    whole = ops.sparse_attention(q, *pages, table, lens, Selection.everything(lens, 2, max_seq_len=37, granularity=4))
    thirds = []
    for part in range(3):
        lists = [[[t for t in range(length) if t * 7 % 3 == part] for _ in range(2)] for length in LENGTHS]
        thirds.append(ops.sparse_attention(q, *pages, table, lens, Selection(*oracles.pad(lists))))
    out, lse = ops.merge(torch.stack([o for o, _ in thirds]), torch.stack([s for _, s in thirds]))
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])


def test_refuses_what_does_not_fit() -> None:
    _, _, (k_pages, v_pages), table, q, lists, lens = _case(4, 2, 1)
    selection = Selection(*oracles.pad(lists))
    with pytest.raises(ValueError, match="q: expected a multiple of 2 heads, got 3"):
        ops.sparse_attention(q[:, :3], k_pages, v_pages, table, lens, selection)
    with pytest.raises(ValueError, match=r"q: expected shape \[5, any, 8\], got \[4, 4, 8\]"):
        ops.sparse_attention(q[:4], k_pages, v_pages, table, lens, selection)
    with pytest.raises(TypeError, match="v_pages: expected dtype float32, got float16"):
        ops.sparse_attention(q, k_pages, v_pages.half(), table, lens, selection)
    with pytest.raises(TypeError, match="q: expected a torch.Tensor, got list"):
        ops.sparse_attention(q.tolist(), k_pages, v_pages, table, lens, selection)  # type: ignore[arg-type]
    other = Selection(selection.indices[:, :1].contiguous(), selection.lengths[:, :1].contiguous())
    with pytest.raises(ValueError, match=r"selection.indices: expected shape \[5, 2, any\], got \[5, 1, "):
        ops.sparse_attention(q, k_pages, v_pages, table, lens, other)
    extra = torch.zeros(5, 2, selection.capacity)
    other = Selection(selection.indices, selection.lengths, log_weight=extra)
    with pytest.raises(ValueError, match=r"selection.log_weight: expected shape \[5, 4, any\], got \[5, 2, "):
        ops.sparse_attention(q, k_pages, v_pages, table, lens, other)


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_weights_add_up_to_one_however_large_the_logits(size: float) -> None:
    _, _, (k_pages, v_pages), table, q, _, lens = _case(4, 1, 1)
    everything = Selection.everything(lens, 2, max_seq_len=37, granularity=4)
    out, lse = ops.sparse_attention(q * size, k_pages, torch.ones_like(v_pages), table, lens, everything)
    real = lens > 0
    torch.testing.assert_close(out[real], torch.ones_like(out[real]), rtol=1e-6, atol=0)
    assert lse[real].isfinite().all() and float(lse.max()) > 100


@pytest.mark.parametrize(
    ("dim", "rows", "sms", "kilobytes", "expected"),
    [
        (128, 8, 132, (227, 228), (4, 3, 2)),  # few rows: bytes under way
        (128, 64, 132, (227, 228), (4, 2, 3)),  # many: warps
        (64, 64, 132, (227, 228), (4, 4, 3)),  # 792 blocks for 64 rows would be 12 a row
        (64, 256, 132, (227, 228), (4, 2, 6)),
        (256, 1, 132, (227, 228), (4, 2, 1)),
        (256, 512, 132, (227, 228), (4, 2, 1)),  # not three blocks of two warps
        (128, 512, 84, (99, 100), (4, 3, 1)),
        (256, 512, 84, (99, 100), (2, 2, 1)),  # four warps do not fit
    ],
)
def test_blocks_follow_rows_and_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
    dim: int,
    rows: int,
    sms: int,
    kilobytes: tuple[int, int],
    expected: tuple[int, ...],
) -> None:
    module = importlib.import_module("twilight.ops.sparse_attention")
    block, total = kilobytes
    monkeypatch.setattr(module, "shared_memory", lambda index: (block * 1024, total * 1024))
    monkeypatch.setattr(module.kernels, "num_sms", lambda index: sms)
    assert module.choose_config.__wrapped__(dim, rows, 0) == expected


def test_more_rows_than_floats_divide_are_left_to_torch() -> None:
    module = importlib.import_module("twilight.ops.sparse_attention")
    heads = torch.zeros(1, dtype=torch.float16)
    assert module.too_many_rows(heads.expand(2**20, 1, 64)) is None
    assert "1048576 query heads" in module.too_many_rows(heads.expand(2**20 + 1, 1, 64))


def test_a_large_cache_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda device: True)
    pool = torch.empty(2**17, 8, 16, 128, dtype=torch.bfloat16, device="meta")  # 4 GB of keys, 2 million slots
    layer = SimpleNamespace(seq_lens=torch.zeros(1, dtype=torch.int32), k_pages=pool, v_pages=pool)
    assert why_reference(layer) is None  # type: ignore[arg-type]
