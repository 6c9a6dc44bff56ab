"""Fused decode: append, page scores, top-k, logits from the 4-bit keys, top-p and attention in one launch.

What it computes is what the operators compute one after another, `append`, `page_scores`, `top_k`, `estimate_scores`,
`top_p` and `sparse_attention`, which is also how the reference is written. The kernel keeps everything between them in
shared memory; see raw_kernels/fused_decode.cu.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from twilight import kernels
from twilight.budget import Budget
from twilight.checks import FLOAT_DTYPES, check_p, check_tensor
from twilight.ops.append import aligned, append
from twilight.ops.fused_plan import TILE, Layout, Shape, late_rows, plan, static_bytes
from twilight.ops.page_scores import page_scores
from twilight.ops.quantize import shadow_bytes
from twilight.ops.scratch import max_cluster, shared_memory
from twilight.ops.sparse_attention import sparse_attention
from twilight.ops.spgemv import estimate_scores
from twilight.ops.summaries import Summary
from twilight.ops.tail import MeanValues, Tail
from twilight.ops.top_k import top_k
from twilight.ops.top_p import MassRule, Pruned, check_bounds, top_p
from twilight.selection import Selection
from twilight.selector import check_reduce

_DIMS = (64, 128, 256)
_HALVES = (torch.float16, torch.bfloat16)
_REDUCTIONS = ("softmax", "sum", "max")
_NO_LIMIT = 2**31 - 1


class FusedDecodeParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/fused_decode.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k", "v", "counts")),
        ("k_strides", ctypes.c_longlong * 2),
        ("v_strides", ctypes.c_longlong * 2),
        *((name, ctypes.c_void_p) for name in (
            "q", "k_pages", "v_pages", "shadow", "codes", "code_params", "value_codes", "value_params", "page_table",
            "seq_lens", "page_budget", "given", "given_lengths", "candidates", "candidate_lengths", "kept",
            "kept_lengths", "per_query_head", "mass", "tail", "out", "lse",
        )),
        *((name, ctypes.c_float) for name in ("sm_scale", "p", "bins_per_nat")),
        *((name, ctypes.c_int) for name in (
            "bits", "reduce", "q_is_bf16", "kv_heads", "group", "max_pages", "capacity", "page_shift", "page_share",
            "entry_share", "min_tokens", "max_tokens",
        )),
        ("at", Layout),
        ("stagger", ctypes.c_int),
        ("stagger_ns", ctypes.c_float),
    ]  # fmt: skip


STRUCTS = (FusedDecodeParams,)
INSTANTIATIONS = tuple(
    f"fused_decode<{dim}, {tiles}, {vectors}, {warps}, {listed}, {plain}>"
    for dim in _DIMS for tiles in (1, 2) for vectors, listed in ((0, "false"), (0, "true"), (1, "false"), (2, "false"))
    for warps in (8, 16) if dim < 256 or warps == 8 for plain in ("false", "true")
)  # fmt: skip


@dataclass(frozen=True)
class NewTokens:
    """A token of each sequence that is not in its pages yet.

    Attributes:
        k, v: `[b, Hkv, d]`.
        counts: `[b]` int32, 1 where there is one and 0 elsewhere; those that there are, `seq_lens` counts.
    """

    k: torch.Tensor
    v: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True)
class FusedDecode:
    """What one step leaves.

    Attributes:
        out: `[b, Hq, d]` in the type of q.
        lse: `[b, Hq]` float32.
        pruned: what was kept. Without `lists` the kernel leaves the indices of its selection empty, `[b, Hkv, 0]`, and
            only the lengths are there.
        candidates: the pages or tokens that were scored, likewise.
    """

    out: torch.Tensor
    lse: torch.Tensor
    pruned: Pruned
    candidates: Selection


def fused_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: Budget | None,
    p: float,
    *,
    sm_scale: float | None = None,
    reduce: str = "softmax",
    lists: bool = False,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    means: MeanValues | None = None,
    new: NewTokens | None = None,
    candidates: Selection | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> FusedDecode:
    """Choose pages by their vectors, prune their tokens to the mass p, and attend to what is left.

    The newest page is always chosen and counts towards the budget. With `new`, its token is first written to where it
    belongs, in place, as `append` writes it: K, V, the 4-bit keys, the vectors and the means of the values.

    Args:
        q: `[b, Hq, d]`.
        k_pages, v_pages: `[pages, Hkv, P, d]`.
        shadow: `[pages, Hkv, P*d/2 + 4*P]` uint8, the 4-bit keys; see `twilight.ops.quantize`.
        vectors: 8-bit vectors of each page as `page_scores` takes them, `(codes, params)`; or nothing, and every token
            is a candidate.
        page_table: `[b, max_pages]` int32.
        seq_lens: `[b]` int32.
        budget: tokens that each sequence and kv head may choose, rounded up to whole pages; None with no vectors.
        p: mass to keep, in (0, 1].
        sm_scale: the factor of the logits, 1/sqrt(d) by default.
        reduce: how query heads are combined to rank pages; see `twilight.combine_group`.
        lists: return the indices too, not only how many there are.
        min_tokens, max_tokens: bounds of what one query head keeps; see `twilight.ops.top_p`.
        means: the mean value of every page, in 8 bits, if what is pruned shall leave a tail (`twilight.ops.tail`).
        new: tokens to append first. Two vectors of a page are then bounds of its keys, and one is their mean.
        candidates: pages or tokens that have been chosen already, without a `log_weight`; no vectors and no budget
            then. Of tokens the kernel keeps no tail.
        backend: which implementation. The kernel takes what `unsupported` finds nothing to say about.
    """
    pool, kv_heads, page_size, dim = check_tensor("k_pages", k_pages, (None,) * 4, dtype=FLOAT_DTYPES).shape
    batch, device = check_tensor("seq_lens", seq_lens, (None,), dtype=torch.int32).shape[0], k_pages.device
    check_tensor("q", q, (batch, None, dim), dtype=FLOAT_DTYPES, device=device)
    check_tensor("v_pages", v_pages, k_pages.shape, dtype=k_pages.dtype, device=device)
    check_tensor("shadow", shadow, (pool, kv_heads, shadow_bytes(page_size, dim)), dtype=torch.uint8, device=device)
    check_tensor("page_table", page_table, (batch, None), dtype=torch.int32, device=device)
    check_tensor("seq_lens", seq_lens, device=device)
    check_p(p)
    check_bounds(min_tokens, max_tokens)
    check_reduce(reduce)
    if q.shape[1] % kv_heads:
        raise ValueError(f"q: expected a multiple of {kv_heads} heads, got {q.shape[1]}")
    if len(vectors) not in (0, 2) or (vectors and budget is None):
        raise ValueError(f"vectors: expected (codes, params) and a budget, or nothing, got {len(vectors)} and {budget}")
    if vectors and budget is not None:
        check_tensor("codes", vectors[0], (pool, kv_heads, None), device=device)
        check_tensor("params", vectors[1], (pool, kv_heads, 2), dtype=torch.float16, device=device)
        check_tensor("budget", budget.tokens, (batch, kv_heads), dtype=torch.int32, device=device)
    if candidates is not None:
        candidates.check_fits("candidates", batch, q.shape[1], kv_heads)
        if vectors or budget is not None:
            raise ValueError("candidates: expected no vectors and no budget beside them")
        if candidates.granularity not in (1, page_size) or candidates.log_weight is not None:
            raise ValueError(
                f"candidates: expected tokens or pages of {page_size}, and no log_weight, got {candidates}"
            )
    scale = dim**-0.5 if sm_scale is None else sm_scale
    if not 0.0 < scale < math.inf:
        raise ValueError(f"sm_scale: expected a positive number, got {sm_scale}")
    if new is not None:
        for name in ("k", "v"):
            check_tensor(name, getattr(new, name), (batch, kv_heads, dim), dtype=k_pages.dtype, device=device)
        check_tensor("counts", new.counts, (batch,), dtype=torch.int32, device=device)
    if means is not None:
        for part in means.values:
            check_tensor("means", part, (pool, kv_heads, None), device=device)
        if means.values[0].shape[-1] != dim or means.page_size != page_size:
            raise ValueError(f"means: expected those of pages of {page_size} tokens of {dim} channels, got {means}")
    widths = {0: None, dim: "mean", 2 * dim: "bounds"}
    if (width := vectors[0].shape[-1] if vectors else 0) not in widths:
        raise ValueError(f"codes: expected {dim} or {2 * dim} of each page, got {width}")
    pages = (k_pages, v_pages, shadow, vectors, page_table, seq_lens)
    rule = MassRule(p, min_tokens, max_tokens, means)
    if kernels.use_kernel(backend, q.device, unsupported(q, *pages, budget, means, candidates)):
        return _cuda(q, *pages, budget, rule, scale, reduce, lists, new, candidates)
    if new is not None:
        kept = widths[width]
        append(
            new.k[:, None], new.v[:, None], k_pages, v_pages, shadow, page_table, seq_lens, new.counts,
            summary=None if kept is None else Summary(kept, tuple(vectors)),
            value_summary=None if means is None else Summary("mean", means.values), backend="torch",
        )  # fmt: skip
    if vectors and budget is not None:
        scores = page_scores(q, vectors, page_table, seq_lens, page_size=page_size, backend="torch")
        candidates = top_k(
            scores, budget.pages(page_size), seq_lens, granularity=page_size,
            capacity=budget.page_capacity(page_size), reduce=reduce, scale=scale, force_newest=True, backend="torch",
        )  # fmt: skip
    elif candidates is None:
        candidates = Selection.everything(
            seq_lens, kv_heads, max_seq_len=page_table.shape[1] * page_size, granularity=page_size
        )
    # In halves, as the kernel keeps them.
    logits = estimate_scores(
        q, shadow, page_table, seq_lens, candidates, page_size=page_size, sm_scale=scale, out_dtype=torch.float16,
        backend="torch",
    )  # fmt: skip
    pruned = top_p(
        logits, candidates, seq_lens, p, min_tokens=min_tokens, max_tokens=max_tokens, means=means, backend="torch"
    )
    out, lse = sparse_attention(
        q, k_pages, v_pages, page_table, seq_lens, pruned.selection, tail=pruned.tail, sm_scale=scale, backend="torch"
    )  # fmt: skip
    return FusedDecode(out, lse, pruned, candidates)


def unsupported(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: Budget | None,
    means: MeanValues | None = None,
    candidates: Selection | None = None,
) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    group, page_size, dim = q.shape[1] // k_pages.shape[1], k_pages.shape[2], q.shape[-1]
    if q.dtype not in _HALVES or k_pages.dtype != q.dtype:
        return f"q is {q.dtype} and K is {k_pages.dtype}; the kernel reads float16 and bfloat16, both alike"
    if dim not in _DIMS:
        return f"head_dim is {dim}; the kernel is made for {', '.join(map(str, _DIMS))}"
    if group > 8:
        return f"a group has {group} query heads; the kernel takes up to 8"
    if q.shape[0] * k_pages.shape[1] > 65535:
        return f"{q.shape[0] * k_pages.shape[1]} rows are more than a grid's 65535"
    if page_size not in (16, 32):
        return f"page_size is {page_size}; the kernel takes 16 and 32"
    if vectors and (vectors[0].dtype != torch.uint8 or vectors[0].shape[-1] not in (dim, 2 * dim)):
        return "the vectors of the pages are not kept in 8 bits"
    values = () if means is None else means.values
    if values and len(values) != 2:
        return "the mean values of the pages are not kept in 8 bits"
    if not all(part.is_contiguous() for part in (k_pages, v_pages, shadow, *vectors, *values)):
        return "the pages are not contiguous"
    if candidates is not None and candidates.capacity == 0:
        return "there are no candidates"
    if candidates is not None and candidates.granularity == 1 and means is not None:
        return "the candidates are tokens, of which the kernel keeps no tail"
    if q.is_cuda:
        shape = _shape(q, k_pages, vectors, page_table, budget, means, candidates)
        if plan(shape, q.get_device()) is None:
            entries = (
                f"{shape.capacity * TILE} candidate tokens" if shape.listed else f"{shape.capacity} candidate pages"
            )
            return f"{entries} a row do not fit into the shared memory of a cluster"
    return None


def _shape(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    budget: Budget | None,
    means: MeanValues | None,
    candidates: Selection | None,
) -> Shape:
    dim, page_size, max_pages = q.shape[-1], k_pages.shape[2], page_table.shape[1]
    capacity, listed = max_pages, candidates is not None and candidates.granularity == 1
    if candidates is not None:
        capacity = -(-candidates.capacity // TILE) if listed else candidates.capacity
    if vectors and budget is not None:
        capacity = min(budget.page_capacity(page_size), max_pages)
    count = vectors[0].shape[-1] // dim if vectors else 0
    rows, group = q.shape[0] * k_pages.shape[1], q.shape[1] // k_pages.shape[1]
    return Shape(rows, max_pages, capacity, group, dim, count, page_size, means is not None, listed)


def _cuda(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    shadow: torch.Tensor,
    vectors: Sequence[torch.Tensor],
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    budget: Budget | None,
    rule: MassRule,
    sm_scale: float,
    reduce: str,
    lists: bool,
    new: NewTokens | None,
    given: Selection | None,
) -> FusedDecode:
    b, q_heads, dim = q.shape
    p, means = rule.p, rule.means
    shape = _shape(q, k_pages, vectors, page_table, budget, means, given)
    group, count, page_size, max_pages = shape.group, shape.vectors, shape.page_size, shape.max_pages
    kv_heads, index, device = k_pages.shape[1], q.get_device(), q.device
    cut = plan(shape, index)
    assert cut is not None
    capacity = shape.capacity if given is None else given.capacity
    granularity = page_size if given is None else given.granularity
    n = capacity * granularity
    # An allocation each: two views of one take longer.
    candidate_lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=device)
    kept_lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=device)
    per_query_head = torch.empty((b, q_heads), dtype=torch.int32, device=device)
    mass = torch.empty((b, q_heads), dtype=torch.float32, device=device)
    lse = torch.empty((b, q_heads), dtype=torch.float32, device=device)
    listed = capacity if lists and given is None else 0
    candidates = torch.empty((b, kv_heads, listed), dtype=torch.int32, device=device)
    kept = torch.empty((b, kv_heads, n if lists else 0), dtype=torch.int32, device=device)
    lost = None
    if means is not None:
        lost = torch.empty((b, q_heads, capacity if lists else 0), dtype=torch.float32, device=device)
    out = torch.empty((b, q_heads, dim), dtype=q.dtype, device=device)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    q, page_table, seq_lens = q.contiguous(), page_table.contiguous(), seq_lens.contiguous()
    page_budget = budget.pages(page_size).contiguous() if vectors and budget is not None else None
    chosen = () if given is None else (given.indices.contiguous(), given.lengths.contiguous())
    added: tuple[torch.Tensor, ...] = ()
    if new is not None:
        added = (*(t if aligned(t) else t.contiguous() for t in (new.k, new.v)), new.counts.contiguous())
    late, late_ns = late_rows(cut, shape, kernels.num_sms(index))
    most = _NO_LIMIT if rule.max_tokens is None else min(rule.max_tokens, _NO_LIMIT)
    plain = means is None and rule.min_tokens <= 1 and most == _NO_LIMIT
    kernel = _kernel(dim, group, count, cut.warps, shape.listed, plain, index)
    params = FusedDecodeParams(
        *((part.data_ptr() for part in added) if added else (None, None, None)),
        *((part.stride()[:2] for part in added[:2]) if added else ((0, 0), (0, 0))),
        q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), shadow.data_ptr(),
        vectors[0].data_ptr() if vectors else None, vectors[1].data_ptr() if vectors else None,
        *((None, None) if means is None else (part.data_ptr() for part in means.values)),
        page_table.data_ptr(), seq_lens.data_ptr(), None if page_budget is None else page_budget.data_ptr(),
        *((part.data_ptr() for part in chosen) if chosen else (None, None)),
        candidates.data_ptr() if listed else None, candidate_lengths.data_ptr(), kept.data_ptr() if lists else None,
        kept_lengths.data_ptr(), per_query_head.data_ptr(), mass.data_ptr(),
        None if lost is None or not lists else lost.data_ptr(), out.data_ptr(), lse.data_ptr(),
        sm_scale, p, 32.0 if p < 0.999 else 16.0, min(16, 31 - (n - 1).bit_length()), _REDUCTIONS.index(reduce),
        q.dtype == torch.bfloat16, kv_heads, group, max_pages, capacity, page_size.bit_length() - 1, cut.pages,
        cut.entries, min(rule.min_tokens, _NO_LIMIT), most, cut.layout, late, late_ns,
    )  # fmt: skip
    kernel.launch((cut.cluster, shape.rows, 1), (32 * cut.warps, 1, 1), params, cut.smem, cluster=cut.cluster)
    # Lengths as the kernel counted them: of a sequence without a token there is nothing, whatever was chosen.
    listed_entries = given.indices if given is not None and lists else candidates
    scored = Selection(listed_entries, candidate_lengths, granularity)
    tail = None if means is None else Tail(replace(scored, log_weight=lost), means)
    return FusedDecode(out, lse, Pruned(Selection(kept, kept_lengths, 1), per_query_head, mass, tail), scored)


@functools.cache
def _kernel(dim: int, group: int, vectors: int, warps: int, listed: bool, plain: bool, device: int) -> kernels.Kernel:
    flags = ", ".join("true" if flag else "false" for flag in (listed, plain))
    return kernels.load(
        "fused_decode",
        f"fused_decode<{dim}, {1 if group <= 4 else 2}, {vectors}, {warps}, {flags}>",
        max_dynamic_smem=shared_memory(device)[0] - static_bytes(group, dim),
        max_cluster=max_cluster(device),
        device=device,
    )
