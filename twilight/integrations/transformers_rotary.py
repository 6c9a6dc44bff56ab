"""How a transformers model rotates its queries and keys, found out by trying."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from twilight.ops.rotate import rotate

_FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds of scaling whose frequencies do not change with the length of the text."""


@torch.no_grad()
def rotary_frequencies(model: torch.nn.Module, attentions: Sequence[Any]) -> tuple[float, ...]:
    """Return `Geometry.inv_freq` of a model, or nothing if it does not rotate as that says, or cannot be asked.

    Args:
        model: the model.
        attentions: its attention modules.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)]
    functions = {getattr(sys.modules[type(m).__module__], "apply_rotary_pos_emb", None) for m in attentions}
    function = functions.pop() if len(functions) == 1 else None
    if function is None or len(found) != 1 or getattr(found[0], "rope_type", None) not in _FIXED:
        return ()
    rotary = found[0]
    inv_freq = tuple(rotary.inv_freq.tolist())
    x = torch.linspace(-1.0, 1.0, attentions[0].head_dim, device=rotary.inv_freq.device).expand(1, 1, 2, -1)
    positions = torch.tensor([[3, 20]], device=x.device)
    try:
        turned = function(x, x, *rotary(x, positions))[0]
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return ()  # another signature
    # Some scale what they rotate (YaRN): only the turn between two positions is of interest.
    wanted = rotate(turned[:, :, 0], positions[:, 1:] - positions[:, :1], inv_freq)
    return inv_freq if torch.allclose(wanted, turned[:, :, 1].float(), atol=1e-4) else ()
