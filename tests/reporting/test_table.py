"""One table: dense beside sparse, flags, columns that not all rows have, and files that hold the same."""

from __future__ import annotations

import builtins
import csv
import importlib.util
import json
import math

import pytest

from twilight.reporting.collect import collect
from twilight.reporting.metrics import Metric, wilson, wilson_interval
from twilight.reporting.settings import labels
from twilight.reporting.table import compare, merge, save


def merged(folder):
    return merge(collect([folder]))


def test_dense_is_kept_once_and_belongs_to_no_selector(tmp_path, fake):
    for selector in ("quest", "full"):
        fake.perplexity(tmp_path, selector, 0.9)
    table = merged(tmp_path)
    dense = [row for row in table.rows if row.is_dense]
    assert len(dense) == 1 and len(table.rows) == 3 and not table.dense_spread
    assert dense[0].values["selector"] is None and dense[0].values["p"] is None
    assert "dense_bits_per_byte" not in dense[0].values
    assert [row.values["dense_bits_per_byte"] for row in table.rows if not row.is_dense] == [1.04, 1.04]


def test_dense_values_that_differ_between_runs_are_said(tmp_path, fake):
    same = {"text": "a", "context": 64, "method": "dense"}
    for p, bits, day in ((0.8, 1.0, 2), (0.9, 1.1, 3), (0.7, 1.05, 1)):
        of, started = fake.config("perplexity", "quest", p), f"2026-03-0{day}T00:00:00+00:00"
        fake.write(tmp_path, of, [{**same, "bits_per_byte": bits}], started=started)
    table = merged(tmp_path)
    assert [row.values["bits_per_byte"] for row in table.rows] == [1.1]
    (said,) = table.dense_spread
    assert "from 1 to 1.1 in 3 runs" in said and "context=64" in said


def test_dense_of_another_text_model_or_version_is_not_compared_with(tmp_path, fake):
    row = {"context": 64, "bits_per_byte": 1.0, "delta_stderr": 0.01}
    fake.write(tmp_path, fake.config("perplexity", "quest", 0.9), [{**row, "text": "a"}])
    fake.write(tmp_path, fake.config("perplexity", "quest", 0.8), [{**row, "method": "dense", "text": "b"}])
    fake.write(tmp_path, fake.config("perplexity", "quest", 0.7), [{**row, "method": "dense", "text": "a"}],
               versions={"torch": "2.1"})  # fmt: skip
    fake.write(tmp_path, fake.config("perplexity", "quest", 0.6, model="hf"), [{**row, "method": "dense", "text": "a"}])
    sparse = [row for row in merged(tmp_path).rows if not row.is_dense]
    assert len(sparse) == 1 and "dense_bits_per_byte" not in sparse[0].values


@pytest.mark.parametrize(
    ("bits", "stderr", "flagged"),
    [(0.97, 0.01, True), (0.985, 0.01, False), (1.2, 0.01, False), (0.97, None, True), (1.0, None, False)],
)
def test_bits_below_dense_by_more_than_the_paired_error_are_flagged(tmp_path, fake, bits, stderr, flagged):
    same = {"text": "a", "context": 64}
    rows = [{**same, "method": "dense", "bits_per_byte": 1.0}, {**same, "bits_per_byte": bits, "delta_stderr": stderr}]
    fake.write(tmp_path, fake.config("perplexity", "quest", 0.9), rows)
    flags = [row.values["flag"] for row in merged(tmp_path).rows if not row.is_dense]
    if flagged:
        bar = "error bar 0.02" if stderr else "no error bar"
        assert "bits_per_byte beats dense by 0.03" in flags[0] and bar in flags[0]
    else:
        assert flags == [None]


@pytest.mark.parametrize(
    ("sparse", "dense", "flagged"), [(90, 60, True), (70, 60, False), (60, 90, False), (100, 100, False)]
)
def test_accuracy_above_dense_by_more_than_both_errors_is_flagged(tmp_path, fake, sparse, dense, flagged):
    rows = [
        {
            "method": method,
            "kind": "needle",
            "context": 64,
            "depth": 0.5,
            "asked": 100,
            "correct": n,
            "accuracy": n / 100,
        }
        for method, n in (("dense", dense), ("twilight", sparse))
    ]
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    table = merged(tmp_path)
    assert bool(table.flagged) is flagged


def test_a_lead_just_inside_both_bars_is_not_flagged_and_just_outside_is(tmp_path, fake):
    # 1.96 · hypot(0.01, 0.01) = 0.02772
    for p, value in ((0.8, 0.527), (0.9, 0.528)):
        fake.lm_eval(tmp_path, "quest", p, value, stderr=0.01)
    assert [row.values["p"] for row in merged(tmp_path).flagged] == [0.9]


def test_metrics_where_less_is_better_are_not_flagged_for_more(tmp_path, fake):
    row = {"lm_task": "wikitext", "metric": "word_perplexity,none", "stderr": 0.1}
    rows = [{**row, "method": "dense", "value": 10.0}, {**row, "value": 12.0}]
    fake.write(tmp_path, fake.config("lm_eval", "quest", 0.9), rows)
    rows = [{**row, "method": "dense", "value": 10.0}, {**row, "value": 8.0}]
    fake.write(tmp_path, fake.config("lm_eval", "quest", 0.8), rows)
    table = merged(tmp_path)
    assert [metric.higher_is_better for metric in table.metrics] == [False]
    assert [row.values["p"] for row in table.flagged] == [0.8]


def test_wilsons_error_is_half_of_its_interval():
    # Wilson's interval of 8 of 10 is [0.4902, 0.9433]; of 10 of 10 it is [0.7225, 1].
    assert 2 * 1.96 * wilson(8, 10) == pytest.approx(0.9433 - 0.4902, abs=2e-4)
    assert 2 * 1.96 * wilson(10, 10) == pytest.approx(1 - 0.7225, abs=2e-4)
    for correct, asked, ends in ((8, 10, (0.4902, 0.9433)), (2, 8, (0.0715, 0.5907)), (8, 8, (0.6756, 1))):
        assert wilson_interval(correct, asked) == pytest.approx(ends, abs=2e-4)
    assert wilson_interval(0, 8)[0] == 0 and wilson_interval(8, 8)[1] == 1


def test_ragged_rows_and_values_that_are_none_do_no_harm(tmp_path, fake):
    fake.write(
        tmp_path,
        fake.config("fidelity", "quest", 0.9),
        [{"context": 64, "mass": math.nan}, {"context": 64, "output_error": 0.1}, {}, {"mass": None, "extra": [1, 2]}],
        {"budgets": [{"layer": 1}, {}]},
    )
    table = merged(tmp_path)
    assert [metric.column for metric in table.metrics] == ["output_error"]
    assert "mass" not in table.columns() and {"extra", "output_error"} <= set(table.columns())
    files, _ = save(table, tmp_path)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["output_error"] for row in rows] == ["", "0.1", "", ""] and rows[3]["extra"] == "[1, 2]"


def test_columns_begin_with_those_of_every_run(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9)
    columns = merged(tmp_path).columns()
    assert columns[:3] == ["task", "method", "model"] and columns.index("config_hash") < columns.index("kind")
    assert columns[-1] == "run" and "versions" in columns


def test_csv_and_parquet_hold_the_same(tmp_path, fake):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra 'report'")
    fake.facts(tmp_path / "runs", "quest", 0.9)
    fake.facts(tmp_path / "runs", "full", None)
    fake.fidelity(tmp_path / "runs", "quest", 0.9)
    files, missing = save(merged(tmp_path / "runs"), tmp_path)
    assert not missing and {"rows.csv", "table-budgets.parquet"} <= {path.name for path in files}
    for name in ("rows", "table-budgets", "table-positions"):
        data = parquet.read_table(tmp_path / f"{name}.parquet").to_pylist()
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(data) > 0
        for line, row in zip(lines, data, strict=True):
            assert line.keys() == row.keys()
            for key, value in row.items():
                text = "" if value is None else str(value)
                assert line[key] == text or float(line[key]) == value


def test_without_pyarrow_csv_is_written_and_the_extra_is_named(tmp_path, fake, monkeypatch):
    find, real = importlib.util.find_spec, builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pyarrow" else find(name, *rest)
    )
    monkeypatch.setattr(builtins, "__import__", without)
    fake.facts(tmp_path / "runs", "quest", 0.9)
    files, missing = save(merged(tmp_path / "runs"), tmp_path)
    assert [path.name for path in files] == ["rows.csv"] and "twilight-attn[report]" in missing


def test_a_baseline_stands_beside_rows_of_the_same_configuration_only(tmp_path, fake):
    def run(folder, p, accuracy):
        row = {
            "kind": "needle",
            "context": 64,
            "depth": 0.5,
            "asked": 10,
            "correct": accuracy * 10,
            "accuracy": accuracy,
        }
        fake.write(tmp_path / folder, fake.config("facts", "quest", p), [row])

    for p, old, new in ((0.7, 0.5, 0.4), (0.8, 0.6, 0.6), (0.9, 0.7, 1.0)):
        run("old", p, old)
        run("new", p, new)
    run("new", 0.95, 0.9)
    table = merged(tmp_path / "new")
    changed = compare(table.rows, merged(tmp_path / "old").rows, table.metrics)
    assert [row.values["p"] for row in changed] == [0.9, 0.7]
    changes = {row.values["p"]: row.values.get("change_accuracy") for row in table.rows}
    assert changes == {0.7: pytest.approx(-0.1), 0.8: 0.0, 0.9: pytest.approx(0.3), 0.95: None}


def test_settings_are_named_by_what_differs(tmp_path, fake):
    for device, torch in (("cpu", "2.1"), ("H200", "2.1"), ("H200", "2.2")):
        fake.facts(tmp_path / f"{device}{torch}", "quest", 0.9, device=device, versions={"torch": torch, "python": "3"})
        # The same hash would be the same run: these differ in a seed, which makes no setting.
        path = next((tmp_path / f"{device}{torch}").rglob("result.json"))
        data = json.loads(path.read_text())
        path.write_text(json.dumps(data | {"config_hash": f"{device}{torch}"}))
    names = set(labels(row.setting for row in merged(tmp_path).rows).values())
    assert names == {
        "tiny, float32, cpu, torch 2.1",
        "tiny, float32, H200, torch 2.1",
        "tiny, float32, H200, torch 2.2",
    }


def test_options_that_rows_have_a_column_of_do_not_part_runs(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9, contexts=(4096,))
    fake.facts(tmp_path, "quest", 0.9, contexts=(8192,), seed=3)
    assert len({row.setting for row in merged(tmp_path).rows}) == 1


def test_gain_is_towards_better():
    assert Metric("t", "c", "", True).gain(3.0, 1.0) == 2.0
    assert Metric("t", "c", "", False).gain(3.0, 1.0) == -2.0


def test_texts_of_other_contexts_and_seeds_are_one_setting_and_two_of_the_same_are_not(tmp_path, fake):
    def run(name, text, context, seed=0, p=0.9):
        of = fake.config("perplexity", "quest", p, context=context, seed=seed)
        row = {"text": text, "context": context, "bits_per_byte": 1.0, "delta_bits": 0.0, "b1_group": 9}
        fake.write(tmp_path / name, of, [row])

    run("a", "heldout 0123456789ab", 4096)
    run("b", "heldout 456789abcdef", 8192)
    run("c", "heldout 89abcdef0123", 8192, seed=1)
    (one,) = {row.setting for row in merged(tmp_path).rows}
    assert one.text == "heldout"
    run("d", "heldout fedcba987654", 8192, p=0.8)  # the folder of another machine, say
    assert {row.setting.text for row in merged(tmp_path).rows} == {
        f"heldout {digits}" for digits in ("0123456789ab", "456789abcdef", "89abcdef0123", "fedcba987654")
    }


def test_settings_of_two_tasks_are_named_by_the_task(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9)
    fake.fidelity(tmp_path, "quest", 0.9)
    names = labels(row.setting for row in merged(tmp_path).rows)
    assert sorted(names.values()) == ["tiny, facts, float32, cpu", "tiny, fidelity, float32, cpu"]
