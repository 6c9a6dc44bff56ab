"""Random numbers for selectors that sample: a function of counters, not of a state.

A generator's state would make a step depend on the steps before it, on the device and on how a batch is made up. A hash
of (seed, layer, head, step, position) does not: a rerun, a replayed CUDA graph, a CPU and a GPU draw the same numbers.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF


def uniform(seed: int, *counters: torch.Tensor | int) -> torch.Tensor:
    """Return a number in (0, 1) for each combination of counters.

    Args:
        seed: whose draw it is; two draws of the same tokens take two seeds, or a counter that tells them apart.
        counters: ints, or int tensors that broadcast against each other; at least one tensor. Their low 32 bits count.

    Returns:
        float64 of the broadcast shape: 32 random bits each, so that among 10**5 tokens a tie is rare (about two pairs).
    """
    state: torch.Tensor | int = seed & _MASK
    for counter in counters:
        number = counter.long() if isinstance(counter, torch.Tensor) else counter
        # The counter is mixed too: added as it is, the streams of two heads would be the same one, shifted.
        state = _mix(state ^ _mix((number + 0x9E3779B9) & _MASK))
    if not isinstance(state, torch.Tensor):
        raise TypeError("counters: expected at least one tensor, got ints only")
    return (state.double() + 0.5) / 2.0**32


def _mix(x: torch.Tensor | int) -> torch.Tensor | int:
    """Hash 32 bits to 32 bits, each of which depends on all (a bijection; constants of Wellons' lowbias32).

    In 64-bit integers, whose products wrap: the low 32 bits, which are all that is kept, are right.
    """
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
