"""Pictures show the numbers of the results."""

from __future__ import annotations

from pathlib import Path

import pytest

from twilight.benchmarks import main, plot
from twilight.benchmarks.results import load

pytest.importorskip("matplotlib", reason="needs the extra 'plots'")

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "decode-nvidia-h200.json"


@pytest.fixture
def data():
    """The cells of one shape of heads, in the order in which they are drawn."""
    found = load(RESULTS)
    cells = [cell for cell in found["cells"] if cell["kv_heads"] == 8]
    return {**found, "cells": sorted(cells, key=lambda cell: (cell["batch"], cell["length"]))}


def by_size(data, name):
    return {(cell["batch"], cell["length"]): cell[name] for cell in data["cells"]}


def test_a_line_for_each_batch_goes_through_its_ratios(data):
    (panel,) = plot.speedup(data).axes
    drawn = {}
    for line in panel.get_lines():
        label = str(line.get_label())
        if label.startswith("batch "):
            for x, y in zip(*line.get_data(), strict=True):
                drawn[int(label.removeprefix("batch ")), x] = y
    assert drawn == {size: rows["quest + top-p"]["speedup"] for size, rows in by_size(data, "methods").items()}
    styles = [(line.get_color(), line.get_marker()) for line in panel.get_lines() if "batch" in str(line.get_label())]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == len(styles)


@pytest.mark.parametrize("draw", [plot.speedup, plot.stages])
def test_both_shapes_of_heads_get_a_panel(data, draw):
    data["cells"].append({**data["cells"][0], "kv_heads": 32})
    assert [panel.get_title() for panel in draw(data).axes] == ["32/8 heads", "32/32 heads"]


def test_bars_are_the_stages_against_the_step(data):
    (panel,) = plot.stages(data).axes
    last = [(cell["batch"], cell["length"]) for cell in data["cells"]].index((32, 131072))
    row = data["cells"][last]["methods"]["quest + top-p"]
    bars = [bar for bar in panel.patches if abs(bar.get_y() + bar.get_height() / 2 - last) < 0.1]
    widths = [bar.get_width() / 100 * row["total"]["us"] for bar in bars]
    assert widths == pytest.approx([row[stage]["us"] for stage in ("select", "estimate", "prune", "attend")])
    starts = [bar.get_x() / 100 * row["total"]["us"] for bar in bars]
    assert starts == pytest.approx([sum(widths[:n]) for n in range(4)])
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in bars}) == 4
    assert panel.get_yticklabels()[last].get_text() == "b=32, 128k"
    assert [text.get_text() for text in panel.texts][last] == f"  {row['total']['us']:.0f} µs, {row['speedup']:.1f}×"


def test_a_report_draws_files(tmp_path, capsys):
    folder = tmp_path / "new"
    assert main(["report", str(RESULTS), "--plot", str(folder)]) == 0
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == ["decode-nvidia-h200-speedup.png", "decode-nvidia-h200-stages.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in files)
    assert str(files[0]) in capsys.readouterr().out


def test_nothing_to_draw_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="draws cells of 'decode', got 0 of 'decode'"):
        plot.save_plots({**data, "cells": []}, tmp_path, "x")
    with pytest.raises(ValueError, match="of 'model'"):
        plot.save_plots({**data, "benchmark": "model"}, tmp_path, "x")
