"""Result files: cells are merged into a file that speaks of the same things, and go beside one that does not."""

from __future__ import annotations

import json

import pytest
import torch

from twilight import kernels
from twilight.benchmarks import results
from twilight.benchmarks.results import Results, header, load

HEAD = {"benchmark": "decode", "gpu": "G", "versions": {"torch": "1"}, "raw_kernels": "0123456789abcdef"}


def cell(batch: int, length: int, us: float = 1.0, **other: object) -> dict[str, object]:
    sizes = {"batch": batch, "length": length, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "page_size": 16}
    return {**sizes, "p": 0.9, "us": us, **other}


def read(path) -> list[tuple[int, int, float]]:
    return [(each["batch"], each["length"], each["us"]) for each in load(path)["cells"]]


def test_calls_build_one_file(tmp_path):
    path = tmp_path / "deep" / "x.json"
    Results(path, HEAD).add(cell(64, 32768))
    again = Results(path, HEAD)
    again.add(cell(1, 8192))
    again.add(cell(64, 32768, us=2.0))  # measured anew
    assert again.path == path
    assert read(path) == [(1, 8192, 1.0), (64, 32768, 2.0)]
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
    assert load(path)["cells"][0]["date"].count("-") == 2


def test_another_p_or_shape_is_another_cell(tmp_path):
    file = Results(tmp_path / "x.json", HEAD)
    for other in ({}, {"p": 0.8}, {"kv_heads": 32}, {"page_size": 32}):
        file.add({**cell(1, 8192), **other})
    assert len(load(file.path)["cells"]) == 4
    sizes = {name: value for name, value in cell(1, 8192).items() if name != "us"}
    assert file.has(sizes)
    assert not file.has({**sizes, "p": 0.7})


@pytest.mark.parametrize(
    "change", [{"gpu": "H"}, {"versions": {"torch": "2"}}, {"raw_kernels": "fedcba98"}, {"benchmark": "model"}]
)
def test_other_things_go_to_a_file_beside_it(tmp_path, change):
    path = tmp_path / "x.json"
    Results(path, HEAD).add(cell(1, 8192))
    other = {**HEAD, **change}
    beside = Results(path, other)
    beside.add(cell(8, 8192))
    assert beside.path == tmp_path / f"x-{other['raw_kernels'][:8]}.json"
    assert read(path) == [(1, 8192, 1.0)]
    assert read(beside.path) == [(8, 8192, 1.0)]
    assert Results(path, other).path == beside.path  # found again
    third = Results(path, {**other, "gpu": "another"})
    assert third.path == tmp_path / f"x-{other['raw_kernels'][:8]}-2.json"


def test_a_file_that_holds_no_results_is_left_alone(tmp_path):
    path = tmp_path / "x.json"
    for text, reason in (
        ("{}", "holds no results"),
        ("not json", "is not JSON"),
        ('{"cells": []}', "holds no results"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            Results(path, HEAD)
        assert path.read_text() == text


def test_a_header_says_what_ran():
    head = header("decode", torch.device("cpu"))
    assert head["benchmark"] == "decode"
    assert head["gpu"] == "cpu"
    assert head["versions"]["torch"] == torch.__version__
    assert head["raw_kernels"] == kernels.source_hash()
    assert set(HEAD) == set(head)
    json.dumps(head)


def test_results_go_to_the_checkout_or_here(monkeypatch, tmp_path):
    head = {**HEAD, "gpu": "NVIDIA H200"}
    monkeypatch.setattr(results.resources, "checkout", lambda: tmp_path)
    assert results.default_path(head) == tmp_path / "benchmarks" / "results" / "decode-nvidia-h200.json"
    monkeypatch.setattr(results.resources, "checkout", lambda: None)
    assert str(results.default_path(head)) == "decode-nvidia-h200.json"
