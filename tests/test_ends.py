"""The ends of a sequence, and how a small budget divides itself among them."""

from __future__ import annotations

import pytest
import torch

from twilight import Budget
from twilight.ends import ends


@pytest.mark.parametrize(
    ("length", "tokens", "want"),
    [
        (20, 14, [0, 1, 2, 17, 18, 19]),  # room for all: 3 sinks, 3 of the newest
        (20, 12, [0, 1, 2, 17, 18, 19]),
        (20, 10, [0, 1, 2, 18, 19]),  # half of 10: the sinks first, of the newest what is left
        (20, 6, [0, 1, 19]),  # the newest token before any sink
        (20, 3, [19]),
        (20, 1, [19]),
        (5, 5, [0, 1, 2, 3, 4]),  # a budget of everything gives the ends all they ask for
        (2, 2, [0, 1]),
        (1, 1, [0]),
        (0, 0, []),
    ],
)
def test_which_tokens(length: int, tokens: int, want: list[int]) -> None:
    budget = Budget(torch.tensor([[tokens, tokens]], dtype=torch.int32), max(1, tokens))
    mask = ends(budget, torch.tensor([length], dtype=torch.int32), 24, sinks=3, local=3)
    assert mask.shape == (1, 2, 24)
    assert [row.nonzero().flatten().tolist() for row in mask[0]] == [want, want]


def test_heads_have_budgets_of_their_own_and_no_sinks_are_none() -> None:
    budget = Budget(torch.tensor([[2, 8]], dtype=torch.int32), 8)
    mask = ends(budget, torch.tensor([20], dtype=torch.int32), 20, sinks=0, local=3)
    assert [row.nonzero().flatten().tolist() for row in mask[0]] == [[19], [17, 18, 19]]
