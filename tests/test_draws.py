"""Draws: the numbers by hand, that they are even, and that no counter's stream is another's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twilight.draws import uniform


def by_hand(seed: int, *counters: int) -> float:
    """The same hash in Python's integers."""

    def mix(x: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x ^= x >> shift
            x = x * factor % 2**32
        return x ^ x >> 16

    state = seed % 2**32
    for counter in counters:
        state = mix(state ^ mix((counter + 0x9E3779B9) % 2**32))
    return (state + 0.5) / 2**32


@pytest.mark.parametrize("seed", [0, 7, -1, 2**31, 2**40 + 7])
def test_the_numbers_by_hand(seed: int) -> None:
    steps = torch.tensor([[0], [2**31 - 1], [12345]], dtype=torch.int32)
    tokens = torch.arange(5)
    have = uniform(seed, 3, steps, tokens)
    assert have.dtype == torch.float64
    want = [[by_hand(seed, 3, int(step), token) for token in range(5)] for step in steps]
    assert have.tolist() == want


def test_they_are_even_and_do_not_hang_together() -> None:
    n = 20_000
    numbers = uniform(1, torch.arange(4)[:, None], torch.arange(n)).numpy()
    assert numbers.min() > 0 and numbers.max() < 1
    # 64 bins of 312.5: chi-squared with 63 degrees of freedom stays below 120 but once in 10**5.
    for row in numbers:
        counts = np.histogram(row, 64, (0, 1))[0]
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 120
    # Four standard deviations of a correlation, between streams, and within one at small distances.
    bound = 4 / np.sqrt(n)
    assert np.abs(np.corrcoef(numbers) - np.eye(4)).max() < bound
    for shift in (1, 2, 3, 16, 64):
        assert abs(np.corrcoef(numbers[0, shift:], numbers[0, :-shift])[0, 1]) < bound


def test_the_order_of_counters_matters() -> None:
    tokens = torch.arange(8)
    assert not torch.equal(uniform(0, 1, 2, tokens), uniform(0, 2, 1, tokens))
    assert not torch.equal(uniform(1, 0, tokens), uniform(0, 1, tokens))


def test_needs_a_tensor() -> None:
    with pytest.raises(TypeError, match="counters: expected at least one tensor"):
        uniform(0, 1, 2)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_does() -> None:
    steps, tokens = torch.arange(7, dtype=torch.int32)[:, None], torch.arange(1000)
    assert torch.equal(uniform(3, steps.cuda(), 2, tokens.cuda()).cpu(), uniform(3, steps, 2, tokens))
