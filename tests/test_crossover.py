"""From which context on sparse decoding is faster: what the table says between its rows, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twilight import crossover
from twilight.benchmarks import crossover as measured

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows(monkeypatch):
    """A table of two groups."""
    made = [crossover.Crossover(*row) for row in ((8, 4, 16000), (64, 4, 4000), (32, 1, 9000))]
    monkeypatch.setattr(crossover, "table", lambda: tuple(made))
    crossover.crossover.cache_clear()
    yield
    crossover.crossover.cache_clear()


@pytest.mark.parametrize(
    ("kv_rows", "group", "tokens"),
    [
        (8, 4, 16000), (64, 4, 4000),
        (63, 4, 16000), (1000, 4, 4000),  # of the next smaller number of rows
        (2, 4, 64000),  # as many tokens in all
        (64, 8, 4000), (64, 3, 4000), (64, 1, 9000),  # the nearest group
    ],
)  # fmt: skip
def test_between_what_was_measured(rows, kv_rows, group, tokens):
    assert crossover.crossover(kv_rows, group) == tokens


def cell(length: int, sparse: float, dense: float = 100.0, *, batch: int = 8) -> dict:
    return {
        "batch": batch, "kv_heads": 8, "q_heads": 32, "length": length,
        "dense": {"cudnn": {"us": 1.0}, "twilight, paged": {"us": dense}},
        "methods": {"quest + top-p": {"total": {"us": sparse}}},
    }  # fmt: skip


def test_the_least_bound_counts_but_no_less_than_where_dense_has_won():
    # A win by four at 32k bounds it by 8k, one by two at 8k by 4k.
    assert measured.crossovers([{"cells": [cell(32768, 25), cell(8192, 50)]}])[0]["tokens"] == 4096
    assert measured.crossovers([{"cells": [cell(32768, 25), cell(8192, 101)]}])[0]["tokens"] == 8192
    assert measured.crossovers([{"cells": [cell(32768, 10), cell(8192, 101)]}])[0]["tokens"] == 8192
    assert measured.crossovers([{"cells": [cell(8192, 101), cell(4096, 300)]}])[0]["tokens"] == 16384
    both = measured.crossovers([{"cells": [cell(8192, 50), cell(8192, 20, batch=64)]}])
    assert [(row["kv_rows"], row["group"]) for row in both] == [(64, 4), (512, 4)]


def test_results_of_several_files_make_one_table():
    both = measured.crossovers([{"cells": [cell(32768, 25)]}, {"cells": [cell(8192, 101), cell(8192, 20, batch=64)]}])
    assert [row["tokens"] for row in both] == [8192, 1639]


def test_the_table_is_made_from_the_results_that_it_names():
    kept = json.loads(crossover.FILE.read_text())
    results = [json.loads((ROOT / source["file"]).read_text()) for source in kept["sources"]]
    assert kept["rows"] == measured.crossovers(results)
    for source, result in zip(kept["sources"], results, strict=True):
        assert (source["gpu"], source["raw_kernels"]) == (result["gpu"], result["raw_kernels"])
