"""Dense decode attention to be compared with: torch's SDPA, FlashInfer over pages, and this package's own.

SDPA is given K and V of each sequence in one piece, which no paged cache has; the best of all these is what ratios are
against. FlashInfer is planned once, outside of what is timed, for lengths that do not change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from twilight import Geometry, ops
from twilight.graph import StaticCache

from .check import check_close
from .timing import Deadline, Times, time_calls
from .workload import Workload, contiguous

TWILIGHT = "twilight, paged"
FLASHINFER = {"flashinfer": False, "flashinfer, tensor cores": True}
"""FlashInfer's kernels by name, and whether they use tensor cores."""


@dataclass(frozen=True)
class Peer:
    """A dense kernel over the layers of a workload.

    Attributes:
        name: what reports call it.
        call: from the number of a layer to the output `[b, Hq, d]`.
        paged: whether it reads the cache's pages; otherwise `contiguous` views of them.
    """

    name: str
    call: Callable[[int], torch.Tensor]
    paged: bool


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, *, folded: bool) -> torch.Tensor:
    """Attend with one of torch's kernels.

    Args:
        q: `[b, Hq, d]`.
        k, v: `[b, Hkv, n, d]`.
        backend: which kernel.
        folded: give it the group's heads as so many queries of one kv head, which needs no mask, instead of as heads.

    Returns:
        `[b, Hq, d]`.
    """
    b, q_heads, _ = q.shape
    rows = q.view(b, k.shape[1], q_heads // k.shape[1], -1) if folded else q.unsqueeze(2)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(rows, k, v, enable_gqa=not folded).reshape(q.shape)


def sdpa_backends(device: torch.device) -> dict[str, SDPBackend]:
    """Return torch's kernels by name; on a CPU the one that runs everywhere."""
    if device.type != "cuda":
        return {"torch math": SDPBackend.MATH}
    return {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def sdpa_peers(work: Workload) -> Iterator[Peer]:
    """Torch's kernels, on contiguous K and V."""
    cache = work.cache
    batch, group = cache.num_rows, cache.geometry.group_size

    def call(i: int, backend: SDPBackend, folded: bool) -> torch.Tensor:
        k, v = (contiguous(pages, batch) for pages in (cache.layers[i].k_pages, cache.layers[i].v_pages))
        return sdpa(work.queries[i], k, v, backend, folded=folded)

    for name, backend in sdpa_backends(cache.geometry.device).items():
        for folded in (False, True) if group > 1 else (False,):
            label = f"{name}, folded" if folded else name
            yield Peer(label, functools.partial(call, backend=backend, folded=folded), paged=False)


def twilight_peer(work: Workload, static: StaticCache) -> Peer:
    """The package's own kernel, which steps that are better dense fall back to."""

    def call(i: int) -> torch.Tensor:
        layer = static.layers[i]
        pages = (layer.k_pages, layer.v_pages, layer.page_table, layer.seq_lens)
        return ops.dense_attention(work.queries[i].unsqueeze(1), *pages, max_seq_len=layer.max_seq_len)[0].squeeze(1)

    return Peer(TWILIGHT, call, paged=True)


class FlashInfer:
    """FlashInfer's paged decode, planned for the lengths that a cache has.

    Args:
        geometry: sizes.
        page_table: `[b, max_pages]` int32.
        lengths: tokens of every row, new ones counted.
        tensor_cores: which of its two kernels.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, geometry: Geometry, page_table: torch.Tensor, lengths: int, *, tensor_cores: bool) -> None:
        import flashinfer

        g = geometry
        batch = len(page_table)
        pages = -(-lengths // g.page_size)
        self._append: Callable[..., None] = flashinfer.append_paged_kv_cache
        self._indices = page_table[:, :pages].contiguous().flatten()
        self._indptr = torch.arange(batch + 1, dtype=torch.int32, device=g.device) * pages
        self._last = torch.full((batch,), lengths - (pages - 1) * g.page_size, dtype=torch.int32, device=g.device)
        self._rows = torch.arange(batch, dtype=torch.int32, device=g.device)
        self._newest = torch.full((batch,), lengths - 1, dtype=torch.int32, device=g.device)
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=g.device)
        self._wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=tensor_cores
        )
        self._wrapper.plan(
            self._indptr, self._indices, self._last, g.num_q_heads, g.num_kv_heads, g.head_dim, g.page_size,
            q_data_type=g.dtype, kv_data_type=g.dtype,
        )  # fmt: skip

    def append(self, k: torch.Tensor, v: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write each row's newest token, `[b, Hkv, d]`, into its place."""
        self._append(k, v, self._rows, self._newest, pages, self._indices, self._indptr, self._last, kv_layout="HND")

    def attend(self, q: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return `[b, Hq, d]`."""
        out: torch.Tensor = self._wrapper.run(q, pages)
        return out


def flashinfer_peers(work: Workload, static: StaticCache) -> Iterator[Peer]:
    """FlashInfer's kernels, if it is installed; it may compile them first."""
    layers = static.layers

    def call(i: int, flash: FlashInfer) -> torch.Tensor:
        return flash.attend(work.queries[i], (layers[i].k_pages, layers[i].v_pages))

    for name, tensor_cores in FLASHINFER.items():
        flash = FlashInfer(static.geometry, static.page_table, work.length, tensor_cores=tensor_cores)
        yield Peer(name, functools.partial(call, flash=flash), paged=True)


def measure_dense(
    work: Workload, static: StaticCache, repeats: int, l2_bytes: float, deadline: Deadline
) -> tuple[dict[str, Times], dict[str, str]]:
    """Time every dense kernel that runs here, and check its first sequence.

    Returns:
        Times by name, with ``error`` beside them, and for what was not timed the reason.
    """
    g, layer = static.geometry, work.cache.layers[0]
    # Dense reads everything: few layers are enough to fill the L2 cache four times.
    each = 2 * layer.k_pages.nbytes
    count = max(1, min(len(work.queries), int(-(-4 * l2_bytes // each))))
    found: dict[str, Times] = {}
    skipped: dict[str, str] = {}
    try:
        others = list(flashinfer_peers(work, static))
    except Exception as problem:  # not installed, or it compiles at first use, which fails in ways of its own
        others, skipped["flashinfer"] = [], first_line(problem)
    for peer in (*sdpa_peers(work), twilight_peer(work, static), *others):
        deadline.check()
        try:
            error = check_close(peer.call(0)[:1], _reference(work, static, paged=peer.paged), peer.name)
            calls = [functools.partial(peer.call, i) for i in range(count)]
            found[peer.name] = time_calls(calls, repeats, g.device) | {"error": error}
        except Exception as problem:  # sizes that a kernel cannot take
            if peer.name == TWILIGHT:
                raise
            skipped[peer.name] = first_line(problem)
        if g.device.type == "cuda":
            torch.cuda.empty_cache()
    return found, skipped


def _reference(work: Workload, static: StaticCache, *, paged: bool) -> torch.Tensor:
    """Return exact attention of the first sequence, `[1, Hq, d]` float32."""
    layer, q = static.layers[0], work.queries[0][:1].float()
    if paged:
        table, lens = layer.page_table[:1], layer.seq_lens[:1]
        pages = (layer.k_pages, layer.v_pages)
        out = ops.dense_attention(
            work.queries[0][:1, None], *pages, table, lens, max_seq_len=work.length, backend="torch"
        )[0]
        return out[:, 0].float()
    k, v = (contiguous(pages, len(layer.seq_lens))[:1].float() for pages in (layer.k_pages, layer.v_pages))
    logits = q.unflatten(1, (k.shape[1], -1)) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return (logits.softmax(-1) @ v).flatten(1, 2)


def first_line(error: Exception) -> str:
    """Return what went wrong, short enough for a table."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
