"""Page scores: how well each page goes with a query, from one or two vectors that stand for its keys.

One vector is the mean of the keys (block means, as in NSA's selection, arXiv 2502.11089): the score is `q . mean`, the
mean of the page's logits. Kept as it is, or in 8 bits by the rule of `twilight.ops.quantize`.

Two are channel-wise bounds of the keys (Quest, arXiv 2406.10774). With the maximum M and the minimum m of a page's keys
in every channel,

    U(page) = sum_c max(q_c * M_c, q_c * m_c) = relu(q) . M + min(q, 0) . m  >=  q . k   for every key k of the page.

The bounds are kept as they are, or in 8 bits, in two tensors, so that a page's codes lie on 16-byte boundaries:

    codes   [pages, Hkv, 2*d] uint8    d codes of the maxima, rounded up, then d of the minima, rounded down
    params  [pages, Hkv, 2] float16    (scale, zero), shared by both: M <= scale * code + zero, m >= scale * code + zero

    zero  = fp16 of the smallest minimum, rounded down
    scale = fp16 of (largest maximum - zero) / 255, rounded up, at least 2**-14

so that the bound holds: what was quantised is never below the maxima nor above the minima, which is checked in float32
when it is written, and mended by one code where a division was rounded the wrong way.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_positive, check_tensor
from twilight.ops.quantize import MIN_SCALE, dequantize

_DIMS = (64, 128, 256)
_HALVES = {torch.float16: "half", torch.bfloat16: "bf16"}
_STAGES = 3
_WARPS_PER_SM = 16
_RUN = 2080
"""Bytes of a page that a block takes at most: 8 heads in INT8 at d=128. Three stages then fit the 99 KB of sm_86 and
sm_89.
"""


class PageScoresParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/page_scores.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "high", "low", "params", "page_table", "seq_lens", "out")),
        *((name, ctypes.c_int) for name in (
            "q_is_bf16", "kv_heads", "group", "max_pages", "num_pages", "page_size", "rows", "even",
            "page_words",
        )),
    ]  # fmt: skip


STRUCTS = (PageScoresParams,)
INSTANTIATIONS = tuple(
    f"page_scores<{kind}, {dim}, {vectors}, {tiles}, {_STAGES}>"
    for kind in ("u8", "half", "bf16") for dim in _DIMS for vectors in (1, 2)
    for tiles in ((1, 2, 4) if kind == "u8" else (1, 2))
)  # fmt: skip


def quantize_bounds(page_max: torch.Tensor, page_min: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise bounds to 8 bits.

    Args:
        page_max, page_min: `[..., d]` of any floating point type.

    Returns:
        `(codes, params)`, `[..., 2*d]` uint8 and `[..., 2]` float16, as above. A NaN gives a NaN scale, so that it
        shows in the page's score.
    """
    check_tensor("page_max", page_max, dtype=FLOAT_DTYPES)
    check_tensor("page_min", page_min, page_max.shape, dtype=page_max.dtype)
    high, low = page_max.float(), page_min.float()
    zero = _round_half(low.amin(-1, keepdim=True), up=False)
    top = high.amax(-1, keepdim=True)
    # Divided by a tensor: by a number, torch multiplies with its reciprocal on a GPU, and the bytes would differ.
    scale = _round_half(((top - zero.float()) / torch.full_like(top, 255)).clamp(min=MIN_SCALE), up=True)
    # The quotient itself may have been rounded down onto a half.
    scale = torch.where(255 * scale.float() + zero.float() < top, _next_half(scale, up=True), scale)
    s, z = scale.float(), zero.float()
    high_code = ((high - z) / s).ceil().clamp(0, 255)
    high_code = (high_code + (s * high_code + z < high)).clamp(max=255)
    low_code = ((low - z) / s).floor().clamp(0, 255)
    low_code = (low_code - (s * low_code + z > low).float()).clamp(min=0)
    codes = torch.cat([high_code, low_code], dim=-1).nan_to_num(0).to(torch.uint8)
    return codes, torch.cat([scale, zero], dim=-1)


def dequantize_bounds(codes: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the bounds `(page_max, page_min)`, `[..., d]` float32 each, that `codes` and `params` stand for."""
    scale, zero = params.float().unsqueeze(-2).unbind(-1)
    high, low = (codes.float() * scale + zero).chunk(2, dim=-1)
    return high, low


def _round_half(x: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Round float32 to float16 in one direction."""
    nearest = x.half()
    wrong = nearest.float() < x if up else nearest.float() > x
    return torch.where(wrong, _next_half(nearest, up=up), nearest)


def _next_half(x: torch.Tensor, *, up: bool) -> torch.Tensor:
    """Return the neighbour of each half; the bits of a half of one sign count in its magnitude's order."""
    bits = x.view(torch.int16)
    away = (bits >= 0) == up
    step = torch.where(away, bits + 1, bits - 1)
    # From either zero, the smallest number of the wanted sign.
    step = torch.where(x == 0, torch.full_like(bits, 1 if up else -32767), step)
    return step.view(torch.float16)


def page_scores(
    q: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> torch.Tensor:
    """Score every page: the mean, or an upper bound, of the dot products of q with its keys.

    Args:
        q: `[b, Hq, d]`.
        vectors: what stands for a page. Means: `(means,)`, `[pages, Hkv, d]`, or `(codes, params)`, `[pages, Hkv, d]`
            uint8 and `[pages, Hkv, 2]` float16. Bounds: `(page_max, page_min)`, `[pages, Hkv, d]` each, or
            `(codes, params)` with `[pages, Hkv, 2*d]` codes.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        page_size: P.
        backend: which implementation. The kernel takes half and bfloat16 queries, d of 64, 128 or 256, and groups of up
            to 16; native vectors in the type of q.

    Returns:
        `[b, Hq, max_pages]` float32, not scaled, `-inf` behind a sequence's last page.
    """
    check_tensor("q", q, (seq_lens.shape[0], None, None), dtype=FLOAT_DTYPES)
    check_positive("page_size", page_size)
    dim = q.shape[-1]
    means = _means(vectors, dim)
    check_tensor("vectors[0]", vectors[0], (None, None, dim if means or not _packed(vectors) else 2 * dim))
    if _packed(vectors):
        check_tensor("vectors[1]", vectors[1], (*vectors[0].shape[:2], 2), dtype=torch.float16)
    else:
        check_tensor("vectors[0]", vectors[0], dtype=FLOAT_DTYPES)
        if not means:
            check_tensor("vectors[1]", vectors[1], vectors[0].shape, dtype=vectors[0].dtype)
    if q.shape[1] % vectors[0].shape[1]:
        raise ValueError(f"q: expected a multiple of {vectors[0].shape[1]} heads, got {q.shape[1]}")
    if kernels.use_kernel(backend, q.device, _unsupported(q, vectors)):
        return _cuda(q, vectors, page_table, seq_lens, page_size)
    return _torch(q, vectors, page_table, seq_lens, page_size)


def _packed(vectors: Sequence[torch.Tensor]) -> bool:
    return vectors[0].dtype == torch.uint8


def _means(vectors: Sequence[torch.Tensor], dim: int) -> bool:
    """Say whether these are means, one vector a page, and refuse what is neither those nor bounds."""
    packed = bool(vectors) and _packed(vectors)
    if len(vectors) == 2 or (len(vectors) == 1 and not packed):
        return vectors[0].shape[-1] == dim if packed else len(vectors) == 1
    raise ValueError(f"vectors: expected (means,), (page_max, page_min) or (codes, params), got {len(vectors)} tensors")


def _torch(
    q: torch.Tensor, vectors: Sequence[torch.Tensor], page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> torch.Tensor:
    grouped = q.float().unflatten(1, (vectors[0].shape[1], -1))
    first, *second = (part[page_table.long()] for part in vectors)
    if _means(vectors, q.shape[-1]):
        means = dequantize(first, second[0], bits=8) if _packed(vectors) else first
        products = [(grouped, means)]
    else:
        high, low = dequantize_bounds(first, second[0]) if _packed(vectors) else (first, second[0])
        products = [(grouped.clamp(min=0), high), (grouped.clamp(max=0), low)]
    # [b, Hkv, G, d] x [b, Hkv, d, max_pages], in float32: 128 products of halves overflow one.
    terms = [query @ part.permute(0, 2, 3, 1).float() for query, part in products]
    scores = torch.stack(terms).sum(0).flatten(1, 2)
    num_pages = (seq_lens + page_size - 1) // page_size
    past = torch.arange(scores.shape[-1], device=q.device) >= num_pages[:, None, None]
    return scores.masked_fill(past, -torch.inf)


def _unsupported(q: torch.Tensor, vectors: Sequence[torch.Tensor]) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if q.dtype not in _HALVES:
        return f"q is {q.dtype}; the kernel reads float16 and bfloat16"
    if q.shape[-1] not in _DIMS:
        return f"head_dim is {q.shape[-1]}; the kernel is made for {', '.join(map(str, _DIMS))}"
    if q.shape[1] // vectors[0].shape[1] > 16:
        return f"a group has {q.shape[1] // vectors[0].shape[1]} query heads; the kernel takes up to 16"
    if not _packed(vectors) and vectors[0].dtype != q.dtype:
        return f"vectors are {vectors[0].dtype} and q is {q.dtype}"
    if not all(part.is_contiguous() for part in vectors):
        return "vectors are not contiguous"
    return None


def _cuda(
    q: torch.Tensor, vectors: Sequence[torch.Tensor], page_table: torch.Tensor, seq_lens: torch.Tensor, page_size: int
) -> torch.Tensor:
    b, q_heads, dim = q.shape
    kv_heads, num_pages = vectors[0].shape[1], page_table.shape[1]
    group = q_heads // kv_heads
    packed, count = _packed(vectors), 1 if _means(vectors, dim) else 2
    out = torch.empty((b, q_heads, num_pages), dtype=torch.float32, device=q.device)
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    kind = "u8" if packed else _HALVES[q.dtype]
    kernel, heads, page_words = _kernel(kind, dim, count, kv_heads, group, q.get_device())
    tiles = -(-num_pages // 16)
    rows = b * (kv_heads // heads)
    # What fits the GPU at once; a block for every tile if there are fewer.
    blocks = min(kernels.num_sms(q.get_device()) * _WARPS_PER_SM // heads, rows * tiles)
    smem = _STAGES * 16 * page_words * 4
    params = PageScoresParams(
        q.data_ptr(), vectors[0].data_ptr(), None if packed else vectors[-1].data_ptr(),
        vectors[1].data_ptr() if packed else None, page_table.data_ptr(), seq_lens.data_ptr(), out.data_ptr(),
        q.dtype == torch.bfloat16, kv_heads, group, num_pages, num_pages, page_size, rows, b == 1, page_words,
    )  # fmt: skip
    kernel.launch((blocks, 1, 1), (32 * heads, 1, 1), params, smem)
    return out


@functools.cache
def _kernel(kind: str, dim: int, count: int, kv_heads: int, group: int, device: int) -> tuple[kernels.Kernel, int, int]:
    """Return the kernel, the kv heads of a block, and the words between two pages of a tile in shared memory."""
    packed = kind == "u8"
    record = count * dim + 4 if packed else 2 * count * dim
    # As many heads a block as give it about 2 KB of each page: 33 KB for 16 pages.
    heads = next(h for h in (8, 4, 2, 1) if kv_heads % h == 0 and (h == 1 or h * record <= _RUN))
    quads = -(-heads * record // 16)
    page_words = 4 * (quads | 1)  # an odd number of 16 bytes: no bank conflicts between the 8 rows of a fragment
    tiles = (1 if group <= 4 else 2 if group <= 8 else 4) if packed else (1 if group <= 8 else 2)
    most = _STAGES * 16 * (_RUN + 16)
    expression = f"page_scores<{kind}, {dim}, {count}, {tiles}, {_STAGES}>"
    return kernels.load("page_scores", expression, max_dynamic_smem=most, device=device), heads, page_words
