"""Times and deadlines, without a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from twilight.benchmarks.timing import Deadline, OutOfTime, summary, time_calls, time_replays

CPU = torch.device("cpu")


def test_a_summary_is_the_median_and_two_percentiles():
    assert summary([5.0, 1.0, 3.0]) == {"us": 3.0, "p10": 1.0, "p90": 5.0}
    assert summary([float(n) for n in range(100, 0, -1)]) == {"us": 50.5, "p10": 11.0, "p90": 90.0}


def test_every_call_is_made_in_turn():
    made: list[int] = []
    times = time_calls([lambda i=i: made.append(i) for i in range(3)], repeats=2, device=CPU)
    assert made == [0, 1, 2, 0, 1, 2]
    assert 0 <= times["p10"] <= times["us"] <= times["p90"]
    made.clear()
    time_replays(lambda: made.append(7), repeats=3, device=CPU)
    assert made == [7] * 5  # two come first


class FakeCuda:
    """Streams, events and graphs of a GPU on which a call takes as long as it says, and a replay 9 us more."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.captured, self.capturing, self.replays = 0.0, 0.0, False, []
        fake = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) / 1e3  # milliseconds

        class Graph:
            def replay(self) -> None:
                assert not fake.capturing
                fake.replays.append(fake.captured)
                fake.now += fake.captured + 9

        @contextlib.contextmanager
        def graph(graph, stream):
            fake.captured, fake.capturing = 0.0, True
            yield
            fake.capturing = False

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda device: None,
            "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda device: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, us: float) -> None:
        if self.capturing:
            self.captured += us
        else:
            self.now += us


@pytest.mark.parametrize(
    ("us", "calls", "layers", "rounds"),
    [(10, 2, 1, 6), (10, 30, 1, 1), (40, 1, 4, 3), (1500, 1, 1, 3), (9000, 1, 1, 1)],
)
def test_a_replay_is_long_enough_to_hide_its_start(monkeypatch, us, calls, layers, rounds):
    gpu = FakeCuda(monkeypatch)
    times = time_calls([lambda: gpu.call(us)] * calls, 5, torch.device("cuda"), layers=layers)
    assert gpu.replays == [rounds * calls * us] * 7  # two come first
    assert times["us"] == pytest.approx(us + 9 / (rounds * calls))


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_cell_is_begun_only_if_the_longest_would_still_end_in_time():
    clock = Clock()
    deadline = Deadline(minutes=10, clock=clock)
    assert deadline.begin()
    clock.now = 250
    assert deadline.end() == 250
    assert deadline.begin()  # 250 + 250 < 600
    clock.now = 400
    assert deadline.end() == 150
    assert not deadline.begin()  # the first took 250: until 650


def test_a_cell_that_takes_too_long_is_stopped():
    clock = Clock()
    deadline = Deadline(minutes=1, clock=clock)
    clock.now = 59.9
    deadline.check()
    clock.now = 60
    with pytest.raises(OutOfTime):
        deadline.check()
    assert not deadline.begin()


def test_without_minutes_there_is_no_end():
    clock = Clock()
    deadline = Deadline(None, clock=clock)
    clock.now = 1e9
    deadline.check()
    deadline.end()
    assert deadline.begin()
