"""What the one launch would be told on an H200, without one: which instantiation, and with which parameters."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import pytest

from twilight import kernels
from twilight.ops.fused_plan import cut_row

fused = sys.modules["twilight.ops.fused_decode"]  # `ops.fused_decode` is the function

H200 = {"num_sms": 132, "block_limit": 227 * 1024, "total": 228 * 1024, "most_blocks": 16}


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Let `backend="cuda"` launch nothing on tensors of the CPU; return the list that fills: (expression, params)."""
    made: list[tuple[str, Any]] = []

    class Fake:
        def __init__(self, stem: str, expression: str, **_: Any) -> None:
            self.expression = expression

        def launch(self, grid: Any, block: Any, params: Any, *_: Any, **__: Any) -> None:
            made.append((self.expression, params))
            for lengths in (params.candidate_lengths, params.kept_lengths):  # which a `Selection` looks at
                ctypes.memset(lengths, 0, 4 * grid[1])

    monkeypatch.setattr(kernels, "use_kernel", lambda backend, *_: backend == "cuda")
    monkeypatch.setattr(kernels, "load", Fake)
    monkeypatch.setattr(kernels, "num_sms", lambda _: H200["num_sms"])
    monkeypatch.setattr(fused, "plan", lambda shape, _: cut_row(shape, **H200))
    monkeypatch.setattr(fused, "shared_memory", lambda _: (H200["block_limit"], H200["total"]))
    monkeypatch.setattr(fused, "max_cluster", lambda _: H200["most_blocks"])
    # Without what other tests have loaded, and nothing of these stays.
    monkeypatch.setattr(fused, "_kernel", functools.cache(fused._kernel.__wrapped__))
    return made
