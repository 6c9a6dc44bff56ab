"""The table of selectors: what is taken from which rows, and that the one in the documents is of the rows beside it."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from twilight.benchmarks import selector_table

ROOT = Path(__file__).parents[2]
FIELDS = (
    "task", "method", "selector", "pruner", "p", "context", "mass", "output_error", "delta_bits", "delta_stderr",
    "kv_fraction", "b0", "b1_query", "b1_group", "correct", "asked",
)  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    def row(task, pruner, p="", method="twilight", context="8192", **values):
        return {
            "task": task,
            "method": method,
            "selector": "quest",
            "pruner": pruner,
            "p": p,
            "context": context,
        } | values

    text = {"kv_fraction": 0.128, "b0": 2064, "b1_query": 224.4, "b1_group": 498, "delta_stderr": 0.01}
    found = [
        row("fidelity", "top_p", "0.95", mass=0.928, output_error=0.06),
        row("perplexity", "top_p", "0.95", delta_bits=0.02, **text),
        row("perplexity", "top_p", "0.95", delta_bits=-0.01, **text),  # another seed
        row("perplexity", "top_p", "0.8", delta_bits=9, **text),
        row("perplexity", "top_p", "0.95", delta_bits=9, context="4096", **text),
        row("perplexity", "bounded_top_p", "0.95", delta_bits=9, **text),
        row("facts", "top_p", "0.95", correct=1, asked=1, kv_fraction=9),
        row("facts", "top_p", "0.95", correct=0, asked=1, kv_fraction=9),
        row("facts", "", "", method="dense", correct=1, asked=1),
        row("perplexity", "none", delta_bits=0.001, **(text | {"b1_query": 2064})),
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="")
        writer.writeheader()
        writer.writerows(found)
    return path


def test_means_of_what_belongs_together(rows, capsys):
    assert selector_table.main([str(rows), "--contexts", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8192 tokens:"
    assert lines[4:] == [
        "| `quest` | none | 12.8 % | 2064 | 2064 | 498 |  |  | +0.0010 ± 0.0100 |  |",
        "| `quest` | top_p | 12.8 % | 2064 | 224 | 498 | 0.928 | 0.060 | +0.0050 ± 0.0100 | 1 of 2 |",
    ]


def test_what_cannot_be_made_is_said(rows, tmp_path, capsys):
    assert selector_table.main([str(rows), "--contexts", "512"]) == 2
    document = tmp_path / "x.md"
    document.write_text("# X\n")
    assert selector_table.main([str(rows), "--contexts", "8192", "--update", str(document)]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert document.read_text() == "# X\n"


def test_the_document_shows_the_rows_beside_it(tmp_path):
    right = (ROOT / "docs/selectors.md").read_text(encoding="utf-8")
    document = tmp_path / "selectors.md"
    document.write_text(right.replace("0.9", "0.1"), encoding="utf-8")
    assert selector_table.main([str(ROOT / "docs/sweep-tiny/rows.csv"), "--update", str(document)]) == 0
    tables = [text.partition("<!-- /selectors -->")[0].partition("<!-- selectors -->")[2]
              for text in (right, document.read_text(encoding="utf-8"))]  # fmt: skip
    assert tables[0] == tables[1] and tables[0].count("\n| `") == 64
