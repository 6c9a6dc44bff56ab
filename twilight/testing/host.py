"""Does a selector wait for the GPU? Found without one: what would wait is in its own lines, or in `trimmed`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from twilight.testing.world import Failure

_WAITS = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose",
}  # fmt: skip
"""Functions whose result is on the host, or of a size that only the device knows."""
_COPIES = {"tensor", "as_tensor", "from_numpy"}
"""Functions that bring numbers from the host."""


class no_waiting(TorchFunctionMode):
    """Raise `Failure` where what runs inside would wait for the GPU. The package's own torch references may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masks = name in ("__getitem__", "__setitem__") and _has_mask(args[1])
        if name in _WAITS or name in _COPIES or masks:
            where = _caller()
            if where is not None:
                what = "an index that is a mask" if masks else name
                raise Failure(
                    f"{what} waits for the GPU, which a step in a CUDA graph cannot: {where}\n"
                    "  keep shapes fixed (budget.capacity, layer.max_seq_len), choose with masks, torch.where and "
                    "torch.arange(..., device=q.device)"
                )
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


def _caller() -> str | None:
    """Return file and line of the selector's call; None if it is the package's own."""
    frame = sys._getframe(2)
    ours = False
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("twilight."):
            if not (module == "twilight.selection" and frame.f_code.co_name == "trimmed"):
                return None
            ours = True
        elif module != "torch" and not module.startswith("torch."):
            via = " (Selection.trimmed)" if ours else ""
            return f"{frame.f_code.co_filename}:{frame.f_lineno}{via}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
