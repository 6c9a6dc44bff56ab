"""Microseconds a call: replays of a CUDA graph on a GPU, calls one after another on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Times = dict[str, float]
"""Median (``us``), 10th (``p10``) and 90th percentile (``p90``) over repeats, in microseconds."""

_CALLS_A_GRAPH = 12
"""Layers that one replay goes through at least, unless they are slow: a graph's own start is 9 us on an H200."""
_LONG_ENOUGH = 5000.0
"""Microseconds that a replay need not exceed."""


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device, *, layers: int = 1) -> Times:
    """Time calls that are made one after another, again and again.

    Args:
        calls: all of them go into one CUDA graph. They find the L2 cache full of each other's data, if that is larger.
        repeats: replays that count; two more come first.
        device: where they run. On a CPU they are called as they are.
        layers: how many layers one call goes through.

    Returns:
        Microseconds a call.
    """
    if device.type != "cuda":
        return summary([_elapsed(lambda: [call() for call in calls]) / len(calls) for _ in range(repeats)])
    torch.cuda.synchronize(device)  # what the calls read may still be in the making
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        once = _events(lambda: [call() for call in calls])  # the first time compiles
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        rounds = max(1, min(_CALLS_A_GRAPH // (len(calls) * layers), int(_LONG_ENOUGH / once)))
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        times = [_events(graph.replay) / (rounds * len(calls)) for _ in range(repeats + 2)][2:]
    return summary(times)


def time_replays(replay: Callable[[], Any], repeats: int, device: torch.device) -> Times:
    """Time something that is a graph's replay already: microseconds a call, what the host does for it included."""
    one = _events if device.type == "cuda" else _elapsed
    return summary([one(replay) for _ in range(repeats + 2)][2:])


def summary(times: Sequence[float]) -> Times:
    """Return the median and the percentiles of some times."""
    ordered = sorted(times)
    return {
        "us": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[-1 - len(ordered) // 10],
    }


def copy_bandwidth(device: torch.device) -> float:
    """Return the TB/s, read and write counted, that a copy of 2 GB reaches (4 MB on a CPU)."""
    size = 2 << 30 if device.type == "cuda" else 4 << 20
    source, target = (torch.empty(size, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    return 2 * size / time_replays(lambda: target.copy_(source), 9, device)["us"] / 1e6


def _elapsed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _events(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


class OutOfTime(Exception):
    """The minutes that a run was given are over."""


class Deadline:
    """Minutes that a run may take; None is for ever.

    A cell is only begun if the longest one so far would still end in time, and is dropped if it does not.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._began = clock()
        self._limit = float("inf") if minutes is None else 60 * minutes
        self._longest = 0.0

    def begin(self) -> bool:
        """Return whether to begin another cell."""
        now = self._clock()
        self._began = now
        return now - self._start + self._longest < self._limit

    def end(self) -> float:
        """Note that a cell is done, and return the seconds it took."""
        took = self._clock() - self._began
        self._longest = max(self._longest, took)
        return took

    def check(self) -> None:
        """Raise `OutOfTime` if it is over."""
        if self._clock() - self._start >= self._limit:
            raise OutOfTime
