"""What is found under folders: runs once each, failures, and what is neither, with a reason."""

from __future__ import annotations

import json

import pytest

from twilight.reporting.collect import collect


def test_runs_and_failures_are_found_at_any_depth(tmp_path, fake):
    fake.facts(tmp_path / "a" / "b", "quest", 0.9)
    fake.perplexity(tmp_path, "quest", 0.9)
    fake.write_error(tmp_path / "c", fake.config("facts", "nsa", 0.9), "CalibrationError: no file", not_applicable=True)
    found = collect([tmp_path])
    assert sorted(run.config["task"]["name"] for run in found.runs) == ["facts", "perplexity"]
    (failure,) = found.failures
    assert failure.not_applicable and not failure.finished_since and failure.error == "CalibrationError: no file"
    assert failure.command == "twilight run task=facts selector=nsa p=0.9 budget=0.25"


def test_a_run_in_a_folder_given_twice_counts_once(tmp_path, fake):
    path = fake.facts(tmp_path, "quest", 0.9)
    found = collect([tmp_path, path.parent, path])
    assert len(found.runs) == 1 and not found.replaced


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_newest_of_one_configuration_is_taken_however_they_are_found(tmp_path, fake, order):
    # The same moment in another zone is older than it looks.
    times = ["2026-03-01T10:00:00+00:00", "2026-03-01T11:00:00+02:00", "2026-03-01T10:30:00Z"]
    for place, which in enumerate(order):
        fake.facts(tmp_path / str(place), "quest", 0.9, started=times[which])
    found = collect([tmp_path])
    assert [run.provenance["started"] for run in found.runs] == [times[2]]
    assert len(found.replaced) == 2
    assert all(new is found.runs[0] and old is not new for old, new in found.replaced)


def test_a_failure_whose_configuration_finished_elsewhere_says_so(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9)
    of = json.loads(next(tmp_path.rglob("result.json")).read_text())["config"]
    fake.write_error(tmp_path / "first", of)
    fake.write_error(tmp_path / "second", fake.config("facts", "nsa", 0.9))
    assert sorted(each.finished_since for each in collect([tmp_path]).failures) == [False, True]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ('{"questions": []}', "no run of twilight run"),
        ('{"schema": 7, "config": {}, "config_hash": "x", "rows": []}', "schema 7"),
        ('{"schema": 1, "config": {}, "config_hash": "x", "rows": [1]}', "'rows'"),
        ('{"schema": 1, "config": {}, "config_hash": "x"}', "'rows'"),
    ],
)
def test_other_files_are_skipped_with_a_reason(tmp_path, fake, text, why):
    fake.facts(tmp_path, "quest", 0.9)
    (tmp_path / "result.json").write_text(text)
    found = collect([tmp_path])
    assert len(found.runs) == 1
    ((path, reason),) = found.skipped
    assert path == tmp_path / "result.json" and why in reason


def test_result_files_of_bench_are_told_from_other_json(tmp_path):
    (tmp_path / "decode-h200.json").write_text(
        json.dumps({"benchmark": "decode", "gpu": "H200", "cells": []}, indent=1)
    )
    (tmp_path / "notes.json").write_text(json.dumps({"about": "a benchmark"}))
    found = collect([tmp_path])
    assert [path.name for path, _ in found.benchmarks] == ["decode-h200.json"] and not found.skipped


def test_a_place_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="twilight sweep"):
        collect([tmp_path / "nowhere"])
