"""Label scores: the dot product of a few channels of the query with the same channels of every key (Double Sparsity,
arXiv 2408.07092, section 4).

A label is r channels of a token's key, in the order of the kv head's list of channels: as they are, or in 2 or 4 bits
with a scale and a zero a token, packed as `twilight.ops.quantize` packs a key of r channels. With codes c, scale s and
zero z, `q . label = s * sum(q_i * c_i) + z * sum(q_i)`, as for the 4-bit keys.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_tensor
from twilight.ops.quantize import unpack
from twilight.ops.scratch import counters

_HALVES = {torch.float16: "half", torch.bfloat16: "bf16"}
_SIZES = (8, 16, 32, 64)
_MAX_HEADS = 8
_WARPS_PER_SM = 16
_MAX_WARPS = 8
_THREADS_ANY = 128
_MAX_SMEM = 48 * 1024
_HEADS = {8: (1, 4, 8), 16: (1, 4, 8), 32: (2, 4, 8), 64: (4, 8)}
"""Query heads that one launch of the kernel is made for, by the channels of a label in 2 or 4 bits."""

_MIN_STEP = {8: 64, 16: 32, 32: 16, 64: 16}
"""Tokens that a warp scores at a time at least, by the channels of a label."""


class LabelSource(ctypes.Structure):
    """Mirrors the struct of raw_kernels/label_stream.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "channels", "label", "label_params", "page_table", "seq_lens")),
        ("sm_scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "q_is_bf16", "kv_heads", "group", "head_dim", "max_pages", "page_size", "n"
        )),
    ]  # fmt: skip


class LabelScoresParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/label_scores.cu."""

    _fields_ = [
        ("source", LabelSource),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "partials", "counters")),
        *((name, ctypes.c_int) for name in ("batch", "num_channels", "bits")),
    ]  # fmt: skip


STRUCTS = (LabelScoresParams,)
INSTANTIATIONS = tuple(
    expression
    for out, with_lse in (("float", "false"), ("half", "false"), ("half", "true"))
    for expression in (
        *(
            f"label_scores<{out}, u{bits}, {r}, {heads}, {with_lse}>"
            for bits in (2, 4) for r in _SIZES for heads in _HEADS[r]
        ),
        *(f"label_scores<{out}, {kind}, {r}, {_MAX_HEADS}, {with_lse}>" for kind in _HALVES.values() for r in _SIZES),
    )
) + tuple(f"label_scores_any<{out}>" for out in ("float", "half"))  # fmt: skip


def label_scores(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    with_lse: bool = False,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Score every token of every sequence by its label, for every query head.

    Args:
        q: `[b, Hq, d]`.
        label: `(labels,)`, `[pages, Hkv, P, r]` of a floating point type; or `(codes, params)`,
            `[pages, Hkv, P, r*bits/8]` uint8 and `[pages, Hkv, P, 2]` float16 (scale, zero), bits being 2 or 4.
        channels: `[Hkv, r]` int32, which channels a kv head's labels are; of the query they are gathered here.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        sm_scale: the factor of the scores, 1/sqrt(d) by default.
        out_dtype: float32, or float16, which halves what is written; scores are then clamped to +-65504.
        with_lse: return the log-sum-exp of each query head's scores as well, which `top_k` then need not find.
        backend: which implementation. The kernel takes half and bfloat16 queries, native labels in the type of q, and
            is fast where r is 8, 16, 32 or 64 and pages hold a power of two tokens. It reads the query as two 8-bit
            numbers where labels are codes, 16 bits in all.

    Returns:
        `(scores, lse)`: `[b, Hq, max_pages * P]` of `out_dtype`, `-inf` behind a sequence's end and, if it is float16,
        nowhere else; and `[b, Hq]` float32, of the scores before they are rounded, or None.

    Raises:
        TypeError, ValueError: shapes and types that do not fit together.
    """
    bits = check_labels(q, label, channels, page_table, seq_lens)
    if out_dtype not in (torch.float32, torch.float16):
        raise TypeError(f"out_dtype: expected float32 or float16, got {out_dtype}")
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    if kernels.use_kernel(backend, q.device, unsupported_label(q, label, channels)):
        return _cuda(q, label, channels, page_table, seq_lens, bits, scale, out_dtype, with_lse)
    return _torch(q, label, channels, page_table, seq_lens, bits, scale, out_dtype, with_lse)


def check_labels(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> int | None:
    """Refuse what does not fit together; return the bits of a code, or None where labels are as they are."""
    check_tensor("seq_lens", seq_lens, (None,), dtype=torch.int32)
    check_tensor("q", q, (seq_lens.shape[0], None, None), dtype=FLOAT_DTYPES)
    check_tensor("page_table", page_table, (seq_lens.shape[0], None), dtype=torch.int32)
    kv_heads, r = check_tensor("channels", channels, (None, None), dtype=torch.int32).shape
    if q.shape[1] % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {q.shape[1]}")
    if len(label) == 1:
        check_tensor("label[0]", label[0], (None, kv_heads, None, r), dtype=FLOAT_DTYPES)
        return None
    if len(label) != 2:
        raise ValueError(f"label: expected (labels,) or (codes, params), got {len(label)} tensors")
    check_tensor("label[0]", label[0], (None, kv_heads, None, None), dtype=torch.uint8)
    check_tensor("label[1]", label[1], (*label[0].shape[:3], 2), dtype=torch.float16)
    for bits in (2, 4):
        if 8 * label[0].shape[-1] == r * bits:
            return bits
    raise ValueError(
        f"label[0]: {r} channels take {r / 4:g} bytes in 2 bits and {r / 2:g} in 4, not {label[0].shape[-1]}"
    )


def _torch(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    bits: int | None,
    sm_scale: float,
    out_dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    grouped = q.float().unflatten(1, (channels.shape[0], -1))
    query = grouped.gather(-1, channels.long()[None, :, None].expand(*grouped.shape[:3], -1))
    # [b, Hkv, max_pages * P, ...]
    stored = [part[page_table.long()].transpose(1, 2).flatten(2, 3) for part in label]
    if bits is None:
        scores = query @ stored[0].float().transpose(-1, -2)
    else:
        scale, zero = stored[1].float().unsqueeze(2).unbind(-1)
        dots = query @ unpack(stored[0], bits).float().transpose(-1, -2)
        scores = scale * dots + zero * query.sum(-1, keepdim=True)
    past = torch.arange(scores.shape[-1], device=q.device) >= seq_lens[:, None, None]
    scores = (scores * sm_scale).flatten(1, 2).masked_fill(past, -torch.inf)
    lse = scores.logsumexp(-1) if with_lse else None
    if out_dtype == torch.float16:
        scores = scores.clamp(-65504, 65504).masked_fill(past, -torch.inf)
    return scores.to(out_dtype), lse


def unsupported_label(q: torch.Tensor, label: Sequence[torch.Tensor], channels: torch.Tensor) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if q.dtype not in _HALVES:
        return f"q is {q.dtype}; the kernel reads float16 and bfloat16"
    if len(label) == 1 and label[0].dtype != q.dtype:
        return f"labels are {label[0].dtype} and q is {q.dtype}"
    if not all(part.is_contiguous() and part.data_ptr() % 16 == 0 for part in label):
        return "labels are not contiguous, or do not begin at a multiple of 16 bytes"
    group, r = q.shape[1] // channels.shape[0], channels.shape[1]
    if not is_fast(label, r) and 4 * group * r > _MAX_SMEM:
        return f"{group} query heads of {r} channels do not fit shared memory"
    return None


def is_fast(label: Sequence[torch.Tensor], r: int) -> bool:
    page_size = label[0].shape[2]
    return r in _SIZES and page_size >= 2 and page_size & (page_size - 1) == 0


def _cuda(
    q: torch.Tensor,
    label: Sequence[torch.Tensor],
    channels: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    bits: int | None,
    sm_scale: float,
    out_dtype: torch.dtype,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    b, q_heads, _ = q.shape
    (kv_heads, r), page_size = channels.shape, label[0].shape[2]
    group, n = q_heads // kv_heads, page_table.shape[1] * page_size
    out = torch.empty((b, q_heads, n), dtype=out_dtype, device=q.device)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, channels, page_table, seq_lens = (t.contiguous() for t in (q, channels, page_table, seq_lens))
    kind = "half" if out_dtype == torch.float16 else "float"
    fast = is_fast(label, r)
    # A warp a kv head, as many as share a page: what they read lies side by side.
    warps = next(w for w in (8, 4, 2, 1) if kv_heads % w == 0)
    subsets = -(-group // _MAX_HEADS)
    # What fits the GPU at once; a block for every step if there are fewer.
    steps = b * (kv_heads // warps) * -(-n // _MIN_STEP.get(r, n))
    blocks = min(kernels.num_sms(q.get_device()) * _WARPS_PER_SM // warps, steps)
    lse = partials = arrived = None
    if with_lse and fast and kind == "half":
        lse = torch.empty((b, q_heads), dtype=torch.float32, device=q.device)
        partials = torch.empty((subsets, blocks, 2, _MAX_WARPS, _MAX_HEADS, 2), dtype=torch.float32, device=q.device)
        arrived = counters(q.device, subsets * b * kv_heads)
    params = LabelScoresParams(
        label_source(q, channels, label, page_table, seq_lens, sm_scale), out.data_ptr(),
        *(None if each is None else each.data_ptr() for each in (lse, partials, arrived)), b, r, bits or 16,
    )  # fmt: skip
    if fast:
        label_type = _HALVES[q.dtype] if bits is None else f"u{bits}"
        _kernel(kind, label_type, r, group, lse is not None, q.get_device()).launch(
            (blocks, subsets, 1), (32 * warps, 1, 1), params
        )
    else:
        kernel = kernels.load("label_scores", f"label_scores_any<{kind}>", device=q.device)
        kernel.launch((b * kv_heads * -(-n // _THREADS_ANY), 1, 1), (_THREADS_ANY, 1, 1), params, 4 * group * r)
    if with_lse and lse is None:
        lse = out.float().logsumexp(-1)
    return out, lse


def label_source(
    q: torch.Tensor,
    channels: torch.Tensor,
    label: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    sm_scale: float,
) -> LabelSource:
    """Point a kernel to tensors that lie in one piece, and that the caller keeps until the launch."""
    kv_heads, page_size, max_pages = channels.shape[0], label[0].shape[2], page_table.shape[1]
    return LabelSource(
        q.data_ptr(), channels.data_ptr(), label[0].data_ptr(), label[1].data_ptr() if len(label) > 1 else None,
        page_table.data_ptr(), seq_lens.data_ptr(), sm_scale, q.dtype == torch.bfloat16, kv_heads,
        q.shape[1] // kv_heads, q.shape[2], max_pages, page_size, max_pages * page_size,
    )  # fmt: skip


@functools.cache
def _kernel(kind: str, label_type: str, r: int, group: int, with_lse: bool, device: int) -> kernels.Kernel:
    made_for = _HEADS[r] if label_type in ("u2", "u4") else (_MAX_HEADS,)
    heads = next(h for h in made_for if h >= min(group, _MAX_HEADS))
    expression = f"label_scores<{kind}, {label_type}, {r}, {heads}, {'true' if with_lse else 'false'}>"
    return kernels.load("label_scores", expression, device=device)
