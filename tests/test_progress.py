"""What one long run says of itself."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from rich.console import Console

from twilight.evaluation.session import Session, hearing
from twilight.progress import Doing


def said(every: float) -> list[str]:
    out = io.StringIO()
    with Doing("p = 0.75", every=every, console=Console(file=out)) as doing:
        doing.say("token 1 of [2]")
        doing.say("token 2 of [2]")
    return out.getvalue().splitlines()


def test_a_file_gets_a_line_once_in_a_while():
    assert said(0.0) == ["p = 0.75: token 1 of [2]", "p = 0.75: token 2 of [2]"]
    assert said(60.0) == []


def test_a_terminal_gets_one_line_that_changes():
    out = io.StringIO()
    with Doing("p = 0.75", console=Console(file=out, force_terminal=True, width=60)) as doing:
        doing.say("token 1 of [2]")
    assert "token 1 of [2]" in out.getvalue() and "\x1b[" in out.getvalue()


def test_a_session_says_how_many_tokens_are_decoded():
    def model(ids, **_):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 3))

    model.device = torch.device("cpu")
    session, heard = Session(SimpleNamespace(model=model), handle=None), []
    with hearing(heard.append), session.steps(None, 2) as step:
        for _ in range(2):
            step(torch.zeros(4, dtype=torch.int64))
    assert heard == ["token 1 of 2, 4 at once", "token 2 of 2, 4 at once"]
    with session.steps(None, 1) as step:  # nobody hears
        step(torch.zeros(1, dtype=torch.int64))
    assert len(heard) == 2
