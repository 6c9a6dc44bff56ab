"""Calibration files: both formats, and everything that can be wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from twilight import Geometry
from twilight.calibration import default_calibration, load_channels, save_channels
from twilight.errors import CalibrationError

GEOMETRY = Geometry(2, 4, 2, 6, 2, layer_ids=(2, 5))
ORDERS = {2: [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], 5: [[1, 0, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]]}


def _load(path: Path, data: object) -> dict[int, torch.Tensor]:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_channels(str(path), GEOMETRY)


def test_what_is_saved_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_channels(path, {layer: torch.tensor(rows) for layer, rows in ORDERS.items()}, statistic="qk", tokens=7)
    loaded = load_channels(str(path), GEOMETRY)
    assert {layer: rows.tolist() for layer, rows in loaded.items()} == ORDERS
    assert all(rows.dtype == torch.int64 for rows in loaded.values())
    data = json.loads(path.read_text())
    assert data["statistic"] == "qk" and data["tokens"] == 7 and data["method"] == "double_sparsity"
    assert "[5, 4, 3, 2, 1, 0]" in path.read_text()  # an order is one line


def test_official_files_load_and_prefer_the_row_a_kv_head(tmp_path: Path) -> None:
    data: dict[str, object] = {"model.layers.7.mlp": [], "model.layers.2.self_attn.v_proj": [[0]]}
    for layer, rows in ORDERS.items():
        data[f"model.layers.{layer}.self_attn.q_proj"] = [list(range(6))] * 4
        data[f"model.layers.{layer}.self_attn.k_proj"] = rows
        data[f"model.layers.{layer}.self_attn.qk_proj"] = [list(range(6))] * 4
    assert {layer: rows.tolist() for layer, rows in _load(tmp_path / "c.json", data).items()} == ORDERS
    # Without grouped queries every statistic has a row a kv head.
    only = {f"model.layers.{layer}.self_attn.qk_proj": rows for layer, rows in ORDERS.items()}
    assert {layer: rows.tolist() for layer, rows in _load(tmp_path / "c.json", only).items()} == ORDERS


GOOD = {str(layer): rows for layer, rows in ORDERS.items()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("not json", "is not JSON"),
        ("", "is not JSON"),
        ([1, 2], "holds no channel orders"),
        ({}, "holds no channel orders"),
        ({"layers": [1]}, "holds no channel orders"),
        ({"layers": {"2": ORDERS[2]}}, "has nothing for layer 5"),
        ({"layers": {**GOOD, "two": [], "\u00b2": []}}, None),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4, 5]]}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4, 4]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4, 6]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4, "5"]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[0, 1, 2, 3, 4, None]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": [[False, True, 2, 3, 4, 5]] * 2}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({"layers": {**GOOD, "5": "x"}}, "layer 5 of .* is not 2 orders of 6 channels"),
        ({f"model.layers.{i}.self_attn.q_proj": [list(range(6))] * 4 for i in (2, 5)}, "is not 2 orders of 6"),
    ],
)
def test_malformed_and_foreign_files(tmp_path: Path, data: object, message: str | None) -> None:
    path = tmp_path / "c.json"
    if message is None:
        assert set(_load(path, data)) == {2, 5}
        return
    with pytest.raises(CalibrationError, match=message) as error:
        _load(path, data)
    assert "c.json" in str(error.value) and "twilight calibrate double_sparsity" in str(error.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(CalibrationError, match="is not JSON"):
        load_channels(str(tmp_path / "c.json"), GEOMETRY)


def test_a_models_folder_brings_its_own(tmp_path: Path) -> None:
    assert default_calibration(None, "double_sparsity") is None
    assert default_calibration(str(tmp_path), "double_sparsity") is None
    (tmp_path / "double_sparsity.json").write_text("{}")
    assert default_calibration(str(tmp_path), "double_sparsity") == str(tmp_path / "double_sparsity.json")
