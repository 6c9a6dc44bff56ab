"""Tables: numbers of the results and no others, and documents that hold what the results say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from twilight.benchmarks import main, tables
from twilight.benchmarks.results import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "decode-nvidia-h200.json"
DOCUMENTS = [ROOT / "README.md", ROOT / "docs" / "kernels.md"]


def times(us: float) -> dict[str, float]:
    return {"us": us, "p10": us, "p90": us}


def made(batch: int = 8, length: int = 32768, kv_heads: int = 8, **more: object) -> dict[str, object]:
    """A cell with numbers that are easy to follow: at 4 TB/s, 4000 bytes are 0.001 us."""
    row = {
        "select": times(20.0), "estimate": times(10.0), "prune": times(5.0), "attend": times(8.0), "total": times(40.0),
        "bytes": {"select": 40e6, "estimate": 20e6, "attend": 8e6}, "gbps": 1700.0, "floor_fraction": 0.425,
        "speedup": 2.5,
    }  # fmt: skip
    top_k = {name: row[name] for name in ("select", "attend", "gbps", "floor_fraction", "speedup")}
    top_k |= {"total": times(123.4), "bytes": {"select": 0.0, "estimate": 0.0, "attend": 8e6}}
    dense = {"cudnn": times(100.0), "flash": times(250.04)}
    return {
        "batch": batch, "length": length, "q_heads": 32, "kv_heads": kv_heads, "bandwidth": 4.0, "dense": dense,
        "best_dense": "cudnn", "methods": {"quest + top-p": row, "quest top-k, N/8": top_k}, **more,
    }  # fmt: skip


def rows(text: str) -> list[list[str]]:
    return [[word.strip() for word in line.strip("|").split(" | ")] for line in text.splitlines()]


def test_speed():
    head, line, row = rows(tables.speed({}, [made()]))
    assert head == ["b", "N", "best dense", "Quest + top-p", "ratio", "of the floor", "Quest top-k, N/8"]
    assert set(line) == {"---"}
    assert row == ["8", "32k", "100 (cudnn)", "40.0", "2.50×", "42 %", "123"]


def test_speed_says_the_heads_if_they_differ_and_leaves_gaps():
    lonely = made(1, 1000, 32)
    del lonely["methods"]["quest top-k, N/8"]
    head, _, first, second = rows(tables.speed({}, [made(), lonely]))
    assert head[0] == "heads"
    assert first[0] == "32/8"
    assert second == ["32/32", "1", "1000", "100 (cudnn)", "40.0", "2.50×", "42 %", "–"]


def test_stages_say_their_share_of_the_floor():
    head, _, quest, top_k = rows(tables.stages({}, [made()]))
    assert head == ["b", "N", "", "select", "estimate", "prune", "attend", "total", "GB/s", "of the floor",
                    "ratio to dense"]  # fmt: skip
    # 40 MB in 20 us are 2 TB/s, half of 4.
    assert quest[3:8] == ["20.0 (50 %)", "10.0 (50 %)", "5.0", "8.0 (25 %)", "40.0"]
    assert quest[8:] == ["1700", "42 %", "2.50×"]
    assert top_k[2:8] == ["Quest top-k, N/8", "20.0", "–", "–", "8.0 (25 %)", "123"]
    head, _, *both = rows(tables.stages({}, [made(), made(kv_heads=32)]))
    assert head[:3] == ["heads", "b", "N"] and [row[0] for row in both] == ["32/8", "32/8", "32/32", "32/32"]


def test_dense_and_model():
    assert rows(tables.dense({}, [made()]))[2] == ["32/8", "8", "32k", "100", "250"]
    ways = {
        "quest + top-p": {"ms": 5.126, "ratio": 3.0, "attention_share": 0.205},
        "dense: cudnn": {"ms": 15.4, "ratio": 1.0, "attention_share": 0.74},
    }
    cell = {"batch": 16, "length": 32768, "ways": ways, "best_dense": "dense: cudnn"}
    _, _, first, second = rows(tables.model({}, [cell]))
    assert first == ["16", "32k", "quest + top-p", "5.13", "3.00×", "20 %"]
    assert second == ["16", "32k", "dense: cudnn (best dense)", "15.40", "1.00×", "74 %"]


def test_words_choose_cells():
    data = {"cells": [made(1), made(8), made(8, 8192)]}
    assert tables.chosen(data, []) == data["cells"]
    assert tables.chosen(data, ["8:8k", "1:32768"]) == [data["cells"][2], data["cells"][0]]
    with pytest.raises(ValueError, match=r"have no '64:32k' \(there is: 1:32k, 8:32k, 8:8k\)"):
        tables.chosen(data, ["64:32k"])


def test_numbers_are_rounded_once():
    assert [tables.number(us) for us in (3.14159, 99.94, 99.96, 1891.7)] == ["3.1", "99.9", "100", "1892"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_hold_what_the_results_say(document, tmp_path):
    """`twilight bench report --update README.md docs/kernels.md` would change nothing."""
    copy = tmp_path / document.relative_to(ROOT)
    copy.parent.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    shutil.copy(document, copy)
    assert not tables.update(copy)


def test_a_block_is_written_anew_and_the_rest_is_left(tmp_path, capsys):
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copy(RESULTS, tmp_path / "r.json")
    document = folder / "x.md"
    mark = "<!-- bench:speed ../r.json 64:8k 1:128k -->"
    document.write_text(f"before\n\n{mark}\n| old |\n<!-- /bench -->\n\nafter <!-- a comment -->\n")
    assert main(["report", "--update", str(document)]) == 0
    assert capsys.readouterr().out == f"{document}: changed\n"
    text = document.read_text()
    table = tables.render("speed", load(RESULTS), ["64:8k", "1:128k"])
    assert text == f"before\n\n{mark}\n{table}<!-- /bench -->\n\nafter <!-- a comment -->\n"
    assert len(table.splitlines()) == 4
    assert main(["report", "--update", str(document)]) == 0
    assert capsys.readouterr().out == f"{document}: as it was\n"


def test_wrong_blocks_are_named(tmp_path):
    document = tmp_path / "x.md"
    document.write_text("no block")
    with pytest.raises(ValueError, match="has no block"):
        tables.update(document)
    document.write_text(f"<!-- bench:sped {RESULTS} -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="no table 'sped'. Did you mean 'speed'?"):
        tables.update(document)
    document.write_text("<!-- bench:speed nowhere.json -->\n<!-- /bench -->\n")
    with pytest.raises(FileNotFoundError):
        tables.update(document)


def test_report_prints_a_table_with_what_it_is_of(capsys):
    assert main(["report", str(RESULTS), "--table", "stages", "--cells", "64:8k"]) == 0
    said = capsys.readouterr().out
    result = json.loads(RESULTS.read_text())
    assert said.startswith(f"{RESULTS}: NVIDIA H200, twilight ")
    assert f"torch {result['versions']['torch']}, " in said and f"kernels {result['raw_kernels']}" in said
    cell = next(cell for cell in result["cells"] if (cell["batch"], cell["length"]) == (64, 8192))
    assert said.count("\n| 64 | 8k |") == len(cell["methods"])
