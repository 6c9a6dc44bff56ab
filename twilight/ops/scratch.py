"""Counters that kernels leave at zero, and what fits a multiprocessor."""

from __future__ import annotations

import functools

import torch

_slabs: dict[tuple[int, int], torch.Tensor] = {}
_MIN_COUNTERS = 16384
_STREAMS = 32


def counters(device: torch.device, count: int) -> torch.Tensor:
    """Return at least `count` int32 zeros for a kernel on the current stream, which leaves them at zero.

    Kernels of one stream run one after another and may share them; every stream has its own.

    Raises:
        RuntimeError: a CUDA graph is being captured, and nothing ran on this device before.
    """
    index = device.index if device.index is not None else torch.cuda.current_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    slab = _slabs.get((index, stream))
    if slab is not None and slab.numel() >= count:
        return slab
    if torch.cuda.is_current_stream_capturing():
        # Memory made in a capture is not zero before the first replay, and belongs to the graph: use one made ahead.
        spare = _slabs.get((index, -1))
        if spare is None or not len(spare) or spare.shape[1] < count:
            raise RuntimeError("run the step once outside of the CUDA graph before capturing it")
        _slabs[index, -1], _slabs[index, stream] = spare[1:], spare[0]
        return spare[0]
    size = max(_MIN_COUNTERS, 1 << (count - 1).bit_length())
    _slabs[index, stream] = torch.zeros(size, dtype=torch.int32, device=device)
    spare = _slabs.get((index, -1))
    if spare is None or not len(spare) or spare.shape[1] < size:
        _slabs[index, -1] = torch.zeros((_STREAMS, size), dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()  # another stream will use them
    return _slabs[index, stream]


@functools.cache
def max_cluster(index: int) -> int:
    """Blocks of a cluster at most: 16 in data centres' GPUs, 8 in the others, which run portable sizes only."""
    major, _ = torch.cuda.get_device_capability(index)
    return 1 if major < 9 else 16 if major in (9, 10) else 8


@functools.cache
def shared_memory(index: int) -> tuple[int, int]:
    """Return the bytes of shared memory that a block may have, and that a multiprocessor has."""
    properties = torch.cuda.get_device_properties(index)
    block = getattr(properties, "shared_memory_per_block_optin", None)
    total = getattr(properties, "shared_memory_per_multiprocessor", None)
    if block is None or total is None:  # older torch: the CUDA programming guide's table
        total = {(8, 0): 164, (8, 7): 164, (9, 0): 228, (10, 0): 228}.get(
            (properties.major, properties.minor), 100
        ) * 1024
        block = total - 1024
    return int(block), int(total)
