"""FlashInfer's paged decode, played by a reference of what its documentation says, head by head in float64."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one query `[Hq, d]` over `[n, Hkv, d]`, head by head in float64."""
    out = []
    for head, query in enumerate(q.double()):
        kv = head // (len(q) // k.shape[1])
        weights = torch.softmax(k[:, kv].double() @ query / q.shape[-1] ** 0.5, dim=0)
        out.append(weights @ v[:, kv].double())
    return torch.stack(out)


def sequence(pages: torch.Tensor, table: list[int], length: int) -> torch.Tensor:
    """Tokens of a row, `[n, Hkv, d]`."""
    return torch.stack([pages[table[n // 16], :, n % 16] for n in range(length)])


class FakeWrapper:
    """What `BatchDecodeWithPagedKVCacheWrapper` documents, over CSR pages."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert (workspace.dtype, layout) == (torch.uint8, "HND")
        self.wrong = use_tensor_cores and FakeWrapper.break_tensor_cores

    def plan(self, indptr, indices, last, q_heads, kv_heads, dim, page_size, q_data_type, kv_data_type):
        assert indptr.dtype == indices.dtype == last.dtype == torch.int32
        self.rows = [indices[a:b].tolist() for a, b in zip(indptr, indptr[1:], strict=False)]
        self.lengths = [(len(row) - 1) * page_size + int(n) for row, n in zip(self.rows, last, strict=True)]
        self.shape = (q_heads, kv_heads, dim)

    def run(self, q, pages):
        k, v = pages
        assert (q.shape[1], k.shape[1], q.shape[2]) == self.shape
        rows = zip(q, self.rows, self.lengths, strict=True)
        out = [attend(each, sequence(k, row, n), sequence(v, row, n)) for each, row, n in rows]
        return torch.stack(out).to(q.dtype) + self.wrong

    break_tensor_cores = False


def fake_append(k, v, rows, positions, pages, indices, indptr, last, kv_layout):
    assert kv_layout == "HND"
    for i, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        page = indices[int(indptr[row]) + position // 16]
        pages[0][page, :, position % 16] = k[i]
        pages[1][page, :, position % 16] = v[i]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import flashinfer` find it."""
    module = SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=FakeWrapper, append_paged_kv_cache=fake_append)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(FakeWrapper, "break_tensor_cores", False)
