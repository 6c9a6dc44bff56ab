"""Pictures show the numbers of the runs, and leave nothing out in silence."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs the extra 'report'")

from twilight.reporting import maps, quality, speed, style
from twilight.reporting.collect import collect
from twilight.reporting.metrics import Metric
from twilight.reporting.points import choice, pareto, points
from twilight.reporting.settings import labels
from twilight.reporting.table import merge

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
ACCURACY = Metric("facts", "accuracy", "facts answered", True)


def merged(folder):
    return merge(collect([folder]))


def drawn(draw, rows, metric=ACCURACY):
    found = points(rows, metric)
    looks = style.series(choice(row).name for row in rows if not row.is_dense)
    return draw(found, metric, labels(point.setting for point in found), looks), found, looks


def shown(picture):
    return [panel for panel in picture.figure.axes if panel.get_visible()]


def test_a_panel_for_each_context_with_the_line_of_each_selector(tmp_path, fake):
    for selector in ("quest", "full"):
        for p in (0.7, 0.8, 0.9, None):
            fake.facts(tmp_path, selector, p, contexts=(4096, 8192))
    (picture,), found, looks = drawn(quality.against_tokens, merged(tmp_path).rows)
    panels = shown(picture)
    assert [panel.get_title() for panel in panels] == ["context 4k", "context 8k"]
    for panel, context in zip(panels, (4096, 8192), strict=True):
        for name, look in looks.items():
            mine = [each for each in found if each.choice.name == name and dict(each.panel)["context"] == context]
            best = [(each.tokens, each.value) for each in pareto(mine, ACCURACY)]
            lines = [line for line in panel.get_lines() if line.get_color() == look.colour]
            # Of a Pareto line of one point, the points themselves are the same.
            assert best in [
                list(zip(*line.get_data(), strict=True)) for line in lines if line.get_linestyle() != "None"
            ]
            marks = {tuple(at) for line in lines if line.get_marker() == look.marker for at in line.get_xydata()}
            assert marks == {(each.tokens, each.value) for each in mine}


def test_error_bars_are_95_percent_of_the_pooled_counts(tmp_path, fake):
    common = {"kind": "a", "context": 64, "b1_group": 10}
    rows = [{**common, "asked": 8, "correct": 2, "accuracy": 0.25},
            {**common, "asked": 8, "correct": 8, "accuracy": 1.0, "method": "dense"}]  # fmt: skip
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    (picture,), *_ = drawn(quality.against_tokens, merged(tmp_path).rows)
    (bars,) = shown(picture)[0].containers[0].lines[2]
    ((_, low), (_, high)) = bars.get_segments()[0]
    # Wilson's interval is not even about the share, and ends within 0 and 1.
    assert (low, high) == pytest.approx((0.0715, 0.5907), abs=2e-4)
    assert "95 %" in picture.caption and "Wilson" in picture.caption
    (band,) = shown(picture)[0].patches
    ends = band.get_extents().transformed(shown(picture)[0].transData.inverted())
    assert (ends.y0, ends.y1) == pytest.approx((0.6756, 1), abs=2e-4)


def test_settings_get_a_picture_each_and_are_named(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9)
    fake.facts(tmp_path, "quest", 0.8, versions={"torch": "2.1"})
    pictures, *_ = drawn(quality.against_tokens, merged(tmp_path).rows)
    assert [picture.stem for picture in pictures] == ["quality-facts-accuracy-1", "quality-facts-accuracy-2"]
    titles = [picture.figure.get_suptitle() for picture in pictures]
    assert "torch 2.1" in titles[0] + titles[1] and titles[0] != titles[1]


def test_what_beats_dense_is_ringed_and_explained(tmp_path, fake):
    for p, value in ((0.8, 0.5), (0.9, 0.7)):
        fake.lm_eval(tmp_path, "quest", p, value)
    metric = merged(tmp_path).metrics[0]
    (picture,), found, _ = drawn(quality.against_tokens, merged(tmp_path).rows, metric)
    rings = [line for line in shown(picture)[0].get_lines() if line.get_markersize() == 14]
    assert [line.get_ydata()[0] for line in rings] == [0.7]
    assert "beats dense: check" in [text.get_text() for text in picture.figure.legends[0].get_texts()]


def test_more_contexts_than_panels_are_said(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9, contexts=tuple(1024 * n for n in range(1, quality.MOST_PANELS + 3)))
    (picture,), *_ = drawn(quality.against_tokens, merged(tmp_path).rows)
    assert len(shown(picture)) == quality.MOST_PANELS
    assert "2 of 14 contexts not drawn" in " ".join(picture.figure.get_suptitle().split())


def test_p_has_quality_above_and_tokens_below(tmp_path, fake):
    for p in (0.9, 0.7, 0.8, None):
        fake.facts(tmp_path, "quest", p, contexts=(4096,))
    (picture,), found, _ = drawn(quality.against_p, merged(tmp_path).rows)
    above, below = shown(picture)
    expected = sorted((each.choice.p, each.value, each.tokens) for each in found if each.choice.p is not None)
    upper = above.containers[0].lines[0]
    assert list(upper.get_xdata()) == pytest.approx([p for p, *_ in expected])
    assert list(upper.get_ydata()) == [value for _, value, _ in expected]
    assert list(below.get_lines()[0].get_ydata()) == [tokens for *_, tokens in expected]


def crowd(folder, fake, values):
    """Runs of as many selectors as there are values, each with two p: of the lower 0.01 more bits."""
    for index, value in enumerate(values):
        for p, more in ((0.9, 0.0), (0.8, 0.01)):
            row = {"text": "book 12", "context": 4096, "bits_per_byte": value + more, "delta_stderr": 0.002}
            row |= {"b1_group": 100 * p + index}
            fake.write(folder, fake.config("perplexity", f"s{index:02}", p), [row])


BITS = Metric("perplexity", "bits_per_byte", "bits per byte", False)


@pytest.mark.parametrize("draw", [quality.against_tokens, quality.against_p])
def test_few_far_off_do_not_press_the_others_into_a_line(tmp_path, fake, draw):
    crowd(tmp_path, fake, [0.4 + 0.01 * index for index in range(10)] + [0.9, 2.0])
    (picture,), found, looks = drawn(draw, merged(tmp_path).rows, BITS)
    panel = shown(picture)[0]
    low, high = panel.get_ylim()
    assert low < 0.4 and 0.5 < high < 0.7
    # Each that is not seen has an arrow of its colour at the edge, and its values are written.
    beyond = [point for point in found if point.value > high]
    arrows = [line for line in panel.get_lines() if line.get_ydata()[0] == high]
    assert sorted(line.get_color() for line in arrows) == sorted(looks[each.choice.name].colour for each in beyond)
    assert [text.get_text() for text in panel.texts] == ["↑ s10 0.9 to 0.91\n↑ s11 2 to 2.01"]
    assert "Arrows at the edge" in picture.caption
    # All values are drawn still, for whoever looks into the file.
    values = {y for line in panel.get_lines() for y in line.get_ydata()}
    assert {point.value for point in found} <= values


def test_one_far_better_does_not_either(tmp_path, fake):
    metric = Metric("fidelity", "output_error", "error", False)
    for index, value in enumerate([0.001, 0.1, 0.1, 0.1, *(0.1 + 0.01 * index for index in range(11))]):
        row = {"context": 64, "output_error": value, "b1_group": 10 + index}
        fake.write(tmp_path, fake.config("fidelity", f"s{index:02}", 0.9), [row])
    (picture,), *_ = drawn(quality.against_tokens, merged(tmp_path).rows, metric)
    panel = shown(picture)[0]
    low, high = panel.get_ylim()
    assert panel.get_yscale() == "log" and 0.02 < low < 0.1 and 0.2 < high < 0.4
    assert [text.get_text() for text in panel.texts] == ["↓ s00 0.001"]


def test_what_is_spread_or_few_keeps_its_scale(tmp_path, fake):
    crowd(tmp_path / "spread", fake, [0.4 + 0.04 * index for index in range(12)])
    crowd(tmp_path / "few", fake, [0.4, 0.41, 0.42, 0.9])
    for name in ("spread", "few"):
        (picture,), found, _ = drawn(quality.against_tokens, merged(tmp_path / name).rows, BITS)
        low, high = shown(picture)[0].get_ylim()
        assert all(low < point.value < high for point in found)
        assert not shown(picture)[0].texts and "Arrows" not in picture.caption


def test_a_crowd_has_a_bar_a_selector_and_says_so(tmp_path, fake):
    crowd(tmp_path, fake, [0.4 + 0.01 * index for index in range(12)])
    (picture,), found, _ = drawn(quality.against_tokens, merged(tmp_path).rows, BITS)
    bars = [bar for each in shown(picture)[0].containers for bar in each.lines[2][0].get_segments()]
    middles = {round((bar[0][1] + bar[1][1]) / 2, 6) for bar in bars if len(bar)}
    assert middles == {round(point.value, 6) for point in found if point.choice.p == 0.9}
    assert "each has one only where it reads most" in picture.caption
    (picture,), *_ = drawn(quality.against_p, merged(tmp_path).rows, BITS)
    assert "in the picture against tokens read" in picture.caption


def test_budgets_of_one_selector_are_lines_of_their_own(tmp_path, fake):
    for p in (0.7, 0.9):
        for budget in (0.25, 0.5):
            fake.facts(tmp_path, "quest", p, contexts=(4096,), budget=budget)
    (picture,), *_ = drawn(quality.against_p, merged(tmp_path).rows)
    lines = shown(picture)[1].get_lines()
    assert len(lines) == 2 and len({line.get_linestyle() for line in lines}) == 2
    names = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert {"top_p, budget 0.25", "top_p, budget 0.5"} <= set(names)


def test_one_p_is_no_line(tmp_path, fake):
    fake.facts(tmp_path, "quest", 0.9)
    fake.facts(tmp_path, "quest", None)
    assert drawn(quality.against_p, merged(tmp_path).rows)[0] == []


def test_heat_maps_hold_what_heads_keep_at_the_longest_context(tmp_path, fake):
    table = [
        {"context": context, "layer": layer, "head": head, "b1_query": 10 * layer + head + context}
        for context in (64, 128) for layer in (2, 3) for head in range(4)
    ]  # fmt: skip
    fake.write(tmp_path, fake.config("fidelity", "quest", 0.9), [{"context": 128}], {"budgets": table})
    (picture,) = maps.budgets(merged(tmp_path).tables["budgets"])
    grid = shown(picture)[0].get_images()[0].get_array()
    assert grid.mask[:2].all() and not grid.mask[2:].any()
    assert grid[2:].tolist() == [[148, 149, 150, 151], [158, 159, 160, 161]]
    assert "128" in picture.figure.get_suptitle()


def test_needles_by_depth_and_length_beside_dense(tmp_path, fake):
    rows = [
        {
            "method": method,
            "kind": "needle",
            "context": context,
            "depth": depth,
            "asked": 4,
            "correct": n,
            "accuracy": n / 4,
        }
        for context, depth, right in ((64, 0.0, (4, 3)), (128, 0.0, (4, 2)), (64, 1.0, (3, 1)))
        for method, n in zip(("dense", "twilight"), right, strict=True)
    ]
    fake.write(tmp_path, fake.config("facts", "quest", 0.9), rows)
    (picture,) = maps.needles(merged(tmp_path).rows)
    dense, quest = shown(picture)[:2]
    assert dense.get_title().strip() == "dense" and quest.get_title() == "quest\np=0.9, budget 0.25"
    assert dense.get_images()[0].get_array().filled(math.nan).tolist()[0] == [1, 1]
    grid = quest.get_images()[0].get_array()
    assert grid.tolist() == [[0.75, 0.5], [0.25, None]]
    assert [text.get_text() for text in dense.get_yticklabels()] == ["0 %", "100 %"]
    assert quest.get_ylim() == dense.get_ylim()  # one scale, which stands at the first


def test_seventeen_panels_fit_on_a_screen(tmp_path, fake):
    for index in range(16):
        rows = [
            {"kind": "needle", "context": context, "depth": depth / 8, "asked": 1, "correct": 1, "accuracy": 1.0,
             "method": method}
            for context in (64, 128, 256) for depth in range(8) for method in ("dense", "twilight")
        ]  # fmt: skip
        fake.write(tmp_path, fake.config("facts", f"s{index:02}", 0.9), rows)
    (picture,) = maps.needles(merged(tmp_path).rows)
    width, height = picture.figure.get_size_inches()
    assert len(shown(picture)) == 18 and width < 14 and height < 10
    with style.drawing():
        picture.figure.draw_without_rendering()
    bar = picture.figure.axes[-1].get_position()
    assert 2 < bar.height * height < 3.5 and bar.width * width < 0.3


def test_positions_are_densities_over_uniform(tmp_path, fake):
    table = [
        {"kind": kind, "layer": layer, "bin_low": low, "bin_high": high, "share": share}
        for kind, shares in (("top_p", (0.8, 0.2)), ("top_k", (0.4, 0.6)))
        for layer in (0, 1) for (low, high), share in zip(((0.0, 0.25), (0.25, 1.0)), shares, strict=True)
    ]  # fmt: skip
    fake.write(tmp_path, fake.config("fidelity", "quest", 0.9), [{"context": 64}], {"positions": table})
    (picture,) = maps.positions(merged(tmp_path).tables["positions"])
    steps = [patch.get_data().values.tolist() for patch in shown(picture)[0].patches]
    assert steps == [pytest.approx([3.2, 0.2 / 0.75]), pytest.approx([1.6, 0.8])]


def test_stages_and_speed_of_the_task(tmp_path, fake):
    fake.speed(tmp_path, "quest", 0.9)
    fake.speed(tmp_path, "double_sparsity", 0.9, fused=True)
    rows = merged(tmp_path).rows
    timed = speed.timings(rows)
    (picture,) = speed.stages(timed)
    (panel,) = shown(picture)
    assert panel.get_title() == "quest, top_p p=0.9, budget 0.25"  # one launch has no stages
    row = next(row.values for row in rows if row.values["selector"] == "quest" and row.values["batch"] == 16)
    bars = [bar for bar in panel.patches if abs(bar.get_y() + bar.get_height() / 2 - 3) < 0.1]
    widths = [bar.get_width() / 100 * row["dense_us"] for bar in bars]
    assert widths == pytest.approx([row[f"{stage}_us"] for stage in ("select", "estimate", "prune", "attend")])
    (picture,) = speed.against_context(timed)
    panels = shown(picture)
    assert [panel.get_title() for panel in panels] == ["batch 1", "batch 16"]
    ratios = [row.values["ratio"] for row in rows if row.values["selector"] == "quest" and row.values["batch"] == 1]
    lines = [list(line.get_ydata()) for line in panels[0].get_lines()]
    assert pytest.approx(ratios) in lines


def test_results_of_bench_are_drawn_too():
    timed = speed.timings([], collect([RESULTS]).benchmarks)
    layer = [each for each in timed if each.what == "one layer's attention"]
    cells = {(each.batch, each.context) for each in layer}
    assert (1, 8192.0) in cells and (32, 131072.0) in cells
    data = json.loads((RESULTS / "decode-nvidia-h200.json").read_text())
    cells = data["cells"]
    (at,) = [
        each
        for each in layer
        if each.method == "quest + top-p, p=0.9"
        and (each.batch, each.context) == (32, 131072)
        and data["raw_kernels"] in each.group
    ]
    (cell,) = [each for each in cells if (each["batch"], each["length"], each["q_heads"]) == (32, 131072, 32)]
    dense = min(row["us"] for row in cell["dense"].values())
    assert at.ratio == pytest.approx(dense / cell["methods"]["quest + top-p"]["total"]["us"])
    model = [each for each in timed if each.what == "a step of all of llama-3.1-8b"]
    assert model and not any("dense:" in each.method or "no attention" in each.method for each in model)
    # One for each shape of heads and state of the kernels, and the model.
    shapes = {
        (found["raw_kernels"], cell.get("q_heads"), cell.get("kv_heads"), cell.get("model"))
        for _, found in collect([RESULTS]).benchmarks
        for cell in found["cells"]
    }
    stems = [picture.stem for picture in speed.against_context(timed)]
    assert len(shapes) >= 3 and stems == [f"speed-{n + 1}" for n in range(len(shapes))]


def test_sixteen_selectors_look_different():
    looks = style.series(f"s{i}" for i in range(16))
    assert len({(look.colour, look.marker) for look in looks.values()}) == 16
    assert all(len({look.marker for look in list(looks.values())[:n]}) == n for n in range(1, 12))


def test_nothing_of_a_kind_is_no_picture(tmp_path, fake):
    fake.write(
        tmp_path, fake.config("facts", "quest", 0.9), [{"accuracy": math.nan, "context": None}], {"budgets": [{}]}
    )
    table = merged(tmp_path)
    assert maps.budgets(table.tables["budgets"]) == [] and maps.needles(table.rows) == [] and maps.positions([]) == []
    assert speed.timings(table.rows) == [] and speed.stages([]) == [] and speed.against_context([]) == []


def test_selectors_without_a_panel_are_named(tmp_path, fake, monkeypatch):
    for selector in ("full", "quest", "streaming_llm"):
        fake.facts(tmp_path, selector, 0.9)
    monkeypatch.setattr(maps, "MOST_PANELS", 2)
    (picture,) = maps.needles(merged(tmp_path).rows)
    assert [panel.get_title().partition("\n")[0] for panel in shown(picture)][:3] == ["dense", "full", "quest"]
    assert picture.caption.endswith("Left out, for want of room: streaming_llm.")
