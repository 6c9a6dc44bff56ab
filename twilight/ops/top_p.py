"""Top-p: the smallest set of candidates whose mass reaches p, joined over the query heads of a group.

Over one query head's candidates, `w = softmax(logits)`. Kept is `{i : w_i >= t}` for the largest t whose kept mass is
at least p (Twilight, definition 3.3 and section 4.2). Ties at the threshold are all kept, p = 1 keeps every candidate,
at least one is kept. A kv head then keeps what any query head of its group keeps (appendix B.2).

Bounds move the threshold: with t_n the n-th largest weight, it becomes `max(min(t, t_floor), t_ceiling)`. What is kept
is still all that reaches a threshold, ties with it included, so a class of equal weights that the ceiling cuts through
is kept whole.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from twilight import kernels
from twilight.checks import FLOAT_DTYPES, check_p, check_positive, check_tensor
from twilight.ops.page_tail import page_tail
from twilight.ops.scratch import shared_memory
from twilight.ops.tail import MeanValues, Tail
from twilight.selection import Selection

_BINS = 512
_THREADS = 512
_THREADS_SMALL = 384
"""Where a block has a whole row of halves in shared memory: 3 blocks of 384 threads fill a multiprocessor better than 2
of 512.
"""
_MIN_SLICE = 512
"""Candidates of a block, below which a row is not split further."""


class TopPParams(ctypes.Structure):
    """Mirrors the struct of raw_kernels/top_p.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "logits", "indices", "lengths", "log_weight", "kept", "kept_lengths", "per_query_head", "mass",
            "kept_log_weight", "tail",
        )),
        ("p", ctypes.c_float),
        ("bins_per_nat", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "capacity", "granularity_shift", "slice_capacity", "bits", "group", "min_tokens", "max_tokens",
        )),
    ]  # fmt: skip


STRUCTS = (TopPParams,)
INSTANTIATIONS = tuple(
    f"top_p<{kind}, {_THREADS}, {cluster}, {shared}{extended}>"
    for extended in ("", ", true") for kind in ("half", "float") for cluster in (1, 2, 4, 8)
    for shared in ("true", "false") if shared == "true" or cluster in (1, 8)
) + (f"top_p<half, {_THREADS_SMALL}, 1, true>",)  # fmt: skip


@dataclass(frozen=True)
class Pruned:
    """What is kept, and what each query head asked for.

    Attributes:
        selection: the union over each group: tokens, or pages where nothing was pruned.
        per_query_head: `[b, Hq]` int32, tokens that each query head kept; None if that is what `selection` stands for.
        mass: `[b, Hq]` float32, the share of the candidates' estimated mass that the head's own tokens hold; None if it
            is all of it.
        tail: pseudo-tokens that carry the mass of what was pruned; None if that is dropped.
    """

    selection: Selection
    per_query_head: torch.Tensor | None
    mass: torch.Tensor | None
    tail: Tail | None = None


@dataclass(frozen=True)
class MassRule:
    """What `top_p` is asked for.

    Attributes:
        p: mass to keep, in (0, 1].
        min_tokens, max_tokens: bounds of what one query head keeps; see `top_p_mask`.
        means: the mean value of every page, if what is pruned shall leave a tail; see `twilight.ops.tail`.
    """

    p: float
    min_tokens: int = 1
    max_tokens: int | None = None
    means: MeanValues | None = None


def top_p_mask(logits: torch.Tensor, p: float, *, min_tokens: int = 1, max_tokens: int | None = None) -> torch.Tensor:
    """Return which entries of each row top-p keeps.

    Args:
        logits: `[..., n]`, `-inf` where there is no candidate.
        p: mass to keep, in (0, 1].
        min_tokens: keep so many of the heaviest, if there are so many, even where fewer reach p.
        max_tokens: keep so many of the heaviest at most, and their ties, even where they do not reach p.

    Returns:
        `[..., n]` bool. A row without candidates keeps nothing. A row with a NaN or `+inf` keeps all of its candidates,
        so that whatever is wrong with it shows in its own output.
    """
    check_tensor("logits", logits, dtype=FLOAT_DTYPES)
    check_p(p)
    check_bounds(min_tokens, max_tokens)
    logits = logits.double()
    candidates = logits != -torch.inf
    if p == 1.0 and max_tokens is None:
        return candidates
    descending = logits.sort(dim=-1, descending=True).values
    weights = torch.softmax(descending, dim=-1)
    # The first prefix that reaches p; rounding may leave the last one a hair below, hence the clamp.
    last = logits.shape[-1] - 1
    reached = (weights.cumsum(-1) < p).sum(-1, keepdim=True)
    if p == 1.0:  # whatever the rounding of the sums says
        reached.fill_(last)
    reached = reached.clamp(min=min_tokens - 1, max=last if max_tokens is None else max_tokens - 1)
    threshold = descending.gather(-1, reached.clamp(max=last))
    # Softmax of a row with NaN or +inf is NaN; of an empty row too, but that has no candidates.
    return candidates & ((logits >= threshold) | weights.isnan().any(-1, keepdim=True))


def check_bounds(min_tokens: object, max_tokens: object) -> None:
    """Refuse a floor or a ceiling of the tokens of a query head that is no number, or a floor above the ceiling."""
    check_positive("min_tokens", min_tokens)
    if max_tokens is not None and check_positive("max_tokens", max_tokens) < min_tokens:  # type: ignore[operator]
        raise ValueError(f"max_tokens: expected at least min_tokens={min_tokens}, got {max_tokens}")


def top_p(
    logits: torch.Tensor,
    candidates: Selection,
    seq_lens: torch.Tensor,
    p: float,
    *,
    min_tokens: int = 1,
    max_tokens: int | None = None,
    means: MeanValues | None = None,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Pruned:
    """Prune candidates to the mass p.

    Args:
        logits: `[b, Hq, capacity * granularity]`, `-inf` past a row's end.
        candidates: what the logits are of.
        seq_lens: `[b]` int32.
        p: mass to keep, in (0, 1].
        min_tokens, max_tokens: bounds of what one query head keeps; see `top_p_mask`.
        means: the mean value of every page, if what is pruned shall leave a tail (`twilight.ops.tail`).
        backend: which implementation. The kernel takes half and float32 logits and groups of up to 16. It keeps at
            least the mass p, and a few percent more tokens than the reference: see raw_kernels/top_p.cu.
    """
    check_tensor("logits", logits, (candidates.indices.shape[0], None, candidates.capacity * candidates.granularity))
    check_p(p)
    check_bounds(min_tokens, max_tokens)
    if logits.shape[1] % candidates.indices.shape[1]:
        raise ValueError(f"logits: expected a multiple of {candidates.indices.shape[1]} heads, got {logits.shape[1]}")
    if kernels.use_kernel(backend, logits.device, _unsupported(logits, candidates)):
        return _cuda(logits, candidates, seq_lens, p, min_tokens, max_tokens, means)
    keep = top_p_mask(logits, p, min_tokens=min_tokens, max_tokens=max_tokens)
    return join_group(keep, logits, candidates, seq_lens, means, backend=backend)


def keep_all(candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
    """Keep every candidate. Query heads are not told apart: counts and mass come a kv head."""
    if kernels.available(candidates.indices.device):
        return Pruned(candidates, None, None)  # the attention kernel reads pages as they are
    _, valid = candidates.positions(seq_lens)
    return _union(valid, torch.ones(valid.shape[:2], device=valid.device), candidates, seq_lens)


def join_group(
    keep: torch.Tensor,
    logits: torch.Tensor,
    candidates: Selection,
    seq_lens: torch.Tensor,
    means: MeanValues | None,
    *,
    backend: Literal["auto", "cuda", "torch"] = "auto",
) -> Pruned:
    """Keep for each kv head what any query head of its group keeps, and leave the rest to a tail if there are `means`.

    Args:
        keep: `[b, Hq, capacity * granularity]` bool, what each query head keeps.
        logits: `[b, Hq, capacity * granularity]` estimates, `-inf` past a row's end.
        candidates: what they are of.
        seq_lens: `[b]` int32.
        means: the mean value of every page, or None.
        backend: which implementation of `page_tail`; the rest is torch.
    """
    mass = (torch.softmax(logits.double(), dim=-1) * keep).sum(-1).float().nan_to_num(0.0)
    pruned = _union(keep, mass, candidates, seq_lens)
    if means is None:
        return pruned
    return replace(pruned, tail=page_tail(logits, candidates, pruned.selection, seq_lens, means, backend=backend))


def _union(keep: torch.Tensor, mass: torch.Tensor, candidates: Selection, seq_lens: torch.Tensor) -> Pruned:
    positions, _ = candidates.positions(seq_lens)
    union = keep.unflatten(1, (positions.shape[1], -1)).any(2)
    selection = Selection.compact(positions, union, granularity=1, log_weight=candidates.token_log_weight())
    if selection.indices.device.type == "cpu":
        # On a GPU the padding stays, so that no length has to reach the host; here it would be read for nothing.
        selection = selection.trimmed()
    return Pruned(selection, keep.sum(-1, dtype=torch.int32), mass)


def _unsupported(logits: torch.Tensor, candidates: Selection) -> str | None:
    """Say why the kernel cannot take these, or return None."""
    if logits.dtype not in (torch.float16, torch.float32):
        return f"the logits are {logits.dtype}; the kernel reads float16 and float32"
    group = logits.shape[1] // candidates.indices.shape[1]
    if group > 16:
        return f"a group has {group} query heads; the kernel takes up to 16"
    if candidates.granularity & (candidates.granularity - 1):
        return f"the candidates' granularity is {candidates.granularity}; the kernel needs a power of two"
    if candidates.lengths.numel() > 65535:
        return f"{candidates.lengths.numel()} rows are more than a grid's 65535"
    if not 0 < logits.shape[-1] <= 2**22:
        return f"a row has {logits.shape[-1]} candidates; the kernel takes 1 to 2**22"
    return None


@functools.lru_cache(1024)
def _plan(rows: int, n: int, group: int, element: int, index: int, unit: int = 8) -> tuple[int, bool, int, int]:
    """Return (cluster, whether logits fit shared memory, slice capacity, bytes of shared memory).

    Slices are of whole `unit`s of candidates.
    """
    budget = shared_memory(index)[0] - 4096
    clusters = (1, 2, 4, 8) if torch.cuda.get_device_capability(index) >= (9, 0) else (1,)

    def needs(cluster: int, shared: bool) -> tuple[int, int]:
        piece = -(-n // (unit * cluster)) * unit
        bins = 4 * _BINS * group * (2 if cluster > 1 else 1)
        keep = piece // 8 * group if piece // 8 > 4 * _BINS else 0
        return piece, bins + keep + (piece * group * element if shared else 0)

    # Two blocks a multiprocessor at once, if rows alone are not enough; never slices that leave threads idle.
    wanted = [c for c in clusters if rows * c <= 2 * kernels.num_sms(index) and n >= c * _MIN_SLICE]
    least = max(wanted, default=1)
    for cluster in (c for c in clusters if c >= least):
        piece, size = needs(cluster, True)
        if size <= budget:
            return cluster, True, piece, size
    cluster = clusters[-1]
    piece, size = needs(cluster, False)
    return cluster, False, piece, size


def _cuda(
    logits: torch.Tensor,
    candidates: Selection,
    seq_lens: torch.Tensor,
    p: float,
    min_tokens: int,
    max_tokens: int | None,
    means: MeanValues | None,
) -> Pruned:
    b, q_heads, n = logits.shape
    kv_heads, device = candidates.indices.shape[1], logits.device
    group = q_heads // kv_heads
    kept = torch.empty((b, kv_heads, n), dtype=torch.int32, device=device)
    # An allocation each: two views of one take longer.
    kept_lengths = torch.empty((b, kv_heads), dtype=torch.int32, device=device)
    per_query_head = torch.empty((b, q_heads), dtype=torch.int32, device=device)
    mass = torch.empty((b, q_heads), dtype=torch.float32, device=device)
    weights = None if candidates.log_weight is None else candidates.log_weight.contiguous()
    kept_weights = None if weights is None else torch.empty((b, q_heads, n), dtype=torch.float32, device=device)
    # Kept until the launch: a copy made here must not be freed and reused before the kernel is in the stream.
    logits, indices, lengths = logits.contiguous(), candidates.indices.contiguous(), candidates.lengths.contiguous()
    index = logits.get_device()
    page = candidates.granularity
    by_page = means is not None and page == means.page_size and page % 8 == 0
    lost = torch.empty((b, q_heads, candidates.capacity), dtype=torch.float32, device=device) if by_page else None
    extended = by_page or min_tokens > 1 or max_tokens is not None
    unit = page if by_page else 8
    cluster, shared, piece, smem = _plan(b * kv_heads, n, group, logits.element_size(), index, unit)
    kind = "half" if logits.dtype == torch.float16 else "float"
    # A warp works for one query head: groups that divide 12 warps.
    small = kind == "half" and cluster == 1 and shared and group in (1, 2, 3, 4, 6, 12) and not extended
    threads = _THREADS_SMALL if small else _THREADS
    kernel = _kernel(kind, threads, cluster, shared, extended, index)
    params = TopPParams(
        logits.data_ptr(), indices.data_ptr(), lengths.data_ptr(), None if weights is None else weights.data_ptr(),
        kept.data_ptr(), kept_lengths.data_ptr(), per_query_head.data_ptr(), mass.data_ptr(),
        None if kept_weights is None else kept_weights.data_ptr(), None if lost is None else lost.data_ptr(),
        p, 32.0 if p < 0.999 else 16.0, candidates.capacity, candidates.granularity.bit_length() - 1, piece, min(16, 31
        - (n - 1).bit_length()), group, min(min_tokens, n), n if max_tokens is None else min(max_tokens, n),
    )  # fmt: skip
    kernel.launch((cluster, b * kv_heads, 1), (threads, 1, 1), params, smem)
    selection = Selection(kept, kept_lengths, 1, kept_weights)
    tail = None
    if means is not None:
        if lost is None:
            tail = page_tail(logits, candidates, selection, seq_lens, means)
        else:
            tail = Tail(Selection(indices, lengths, page, lost), means)
    return Pruned(selection, per_query_head, mass, tail)


@functools.cache
def _kernel(kind: str, threads: int, cluster: int, shared: bool, extended: bool, device: int) -> kernels.Kernel:
    flags = ("true" if shared else "false") + (", true" if extended else "")
    expression = f"top_p<{kind}, {threads}, {cluster}, {flags}>"
    return kernels.load("top_p", expression, max_dynamic_smem=shared_memory(device)[0] - 4096, device=device)
