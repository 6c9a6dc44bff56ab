"""Budget: the tokens, and the pages, that each kv head may propose at a step."""

from __future__ import annotations

import ctypes
import functools
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import check_positive, check_tensor

_THREADS = 256


class BudgetParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/budget.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("seq_lens", "tokens", "pages")),
        ("fraction", ctypes.c_double),
        *((name, ctypes.c_int) for name in ("value", "min_tokens", "batch", "kv_heads", "page_size")),
    ]  # fmt: skip


STRUCTS = (BudgetParams,)
INSTANTIATIONS = (f"budget<{_THREADS}>",)


def budget(
    seq_lens: torch.Tensor,
    num_kv_heads: int,
    value: int | float,
    *,
    min_tokens: int,
    page_size: int,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a budget into tokens and pages.

    Args:
        seq_lens: `[b]` int32.
        num_kv_heads: kv heads, Hkv, which all get the same.
        value: tokens (int), or a fraction of each length (float): ceil(length * fraction), the product in float64.
        min_tokens: a fraction asks for at least this many.
        page_size: P.
        backend: which implementation.

    Returns:
        `(tokens, pages)`, both `[b, Hkv]` int32: no more tokens than the sequence has, and the pages that hold as many.
    """
    check_tensor("seq_lens", seq_lens, (None,), dtype=torch.int32)
    check_positive("page_size", page_size)
    if kernels.use_kernel(backend, seq_lens.device, None):
        return _cuda(seq_lens.contiguous(), num_kv_heads, value, min_tokens, page_size)
    if isinstance(value, float):
        # In float64: float32 would turn 0.1 * 2**24 into a different number of tokens than the host's arithmetic.
        wanted = torch.ceil(seq_lens.double() * value).clamp(min=min_tokens)
    else:
        wanted = torch.full_like(seq_lens, value, dtype=torch.float64)
    tokens = torch.minimum(wanted, seq_lens.double()).to(torch.int32)
    tokens = tokens[:, None].expand(-1, num_kv_heads).contiguous()
    return tokens, (tokens + page_size - 1) // page_size


def _cuda(
    seq_lens: torch.Tensor, num_kv_heads: int, value: int | float, min_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = seq_lens.shape[0] * num_kv_heads
    tokens, pages = torch.empty((2, len(seq_lens), num_kv_heads), dtype=torch.int32, device=seq_lens.device)
    fraction, number = (value, 0) if isinstance(value, float) else (0.0, min(value, 2**31 - 1))
    params = BudgetParams(
        seq_lens.data_ptr(), tokens.data_ptr(), pages.data_ptr(), fraction, number, min(min_tokens, 2**31 - 1),
        len(seq_lens), num_kv_heads, page_size,
    )  # fmt: skip
    kernel = _kernel(seq_lens.get_device())
    kernel.launch((-(-rows // _THREADS), 1, 1), (_THREADS, 1, 1), params)
    return tokens, pages


@functools.cache
def _kernel(device: int) -> kernels.Kernel:
    return kernels.load("budget", INSTANTIATIONS[0], device=device)
