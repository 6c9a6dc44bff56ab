"""Calibration files: their three forms, and everything that can be wrong with one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from twilight import Geometry
from twilight.calibration import default_calibration, load_channels, main, save_channels
from twilight.errors import CalibrationError, MissingExtraError

GEOMETRY = Geometry(2, 4, 2, 6, 2, layer_ids=(2, 5))
ORDERS = {2: [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]], 5: [[1, 0, 2, 3, 4, 5], [2, 0, 1, 3, 4, 5]]}


def _load(path: Path, data: object) -> dict[int, torch.Tensor]:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return load_channels(str(path), GEOMETRY)


GOOD = {str(layer): rows for layer, rows in ORDERS.items()}


def _same(loaded: dict[int, torch.Tensor], rows: dict[int, list[list[int]]] = ORDERS) -> bool:
    return {layer: order.tolist() for layer, order in loaded.items()} == rows


OTHERS = {layer: [row[::-1] for row in rows] for layer, rows in ORDERS.items()}


def _pair(path: Path, **source: object) -> None:
    pytest.importorskip("safetensors")
    orders = {"k": ORDERS, "qk": OTHERS}
    tensors = {name: {layer: torch.tensor(rows) for layer, rows in layers.items()} for name, layers in orders.items()}
    save_channels(path, tensors, **{"statistic": "k", "model": "toy", "tokens": 7, **source})


@pytest.mark.parametrize("name", ["c.json", "c.safetensors", "c-3.1"])
def test_what_is_saved_loads_again(tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    _pair(tmp_path / name)
    about, file = sorted(tmp_path.iterdir())
    assert {about.name, file.name} == {f"{name.removesuffix('.json').removesuffix('.safetensors')}{end}"
                                       for end in (".json", ".safetensors")}  # fmt: skip
    for path in (about, file):
        loaded = load_channels(str(path), GEOMETRY)
        assert _same(loaded) and all(rows.dtype == torch.int64 for rows in loaded.values())
        assert _same(load_channels(str(path), GEOMETRY, "k"))
        assert _same(load_channels(str(path), GEOMETRY, "qk"), OTHERS)
        with pytest.raises(CalibrationError, match="holds k and qk, not q: leave selector.statistic out, or name what"):
            load_channels(str(path), GEOMETRY, "q")
    data = json.loads(about.read_text())
    assert (data["method"], data["statistic"], data["tokens"]) == ("double_sparsity", "k", 7)
    assert data["safetensors"] == file.name
    tensors = load_file(file)
    assert set(tensors) == {"layer.2.k", "layer.5.k", "layer.2.qk", "layer.5.qk"}
    assert all(rows.dtype == torch.int32 and rows.shape == (2, 6) for rows in tensors.values())


def test_the_safetensors_file_is_whole_without_the_other(tmp_path: Path) -> None:
    _pair(tmp_path / "c.json")
    (tmp_path / "c.json").unlink()
    assert _same(load_channels(str(tmp_path / "c.safetensors"), GEOMETRY))


@pytest.mark.parametrize("name", ["c.json", "c.safetensors"])
def test_another_models_pair_is_refused(tmp_path: Path, name: str) -> None:
    _pair(tmp_path / "c.json")
    for geometry, message in (
        (Geometry(2, 4, 1, 6, 2, layer_ids=(2, 5)), "layer 2 of .* is not 1 orders of 6 channels"),
        (Geometry(2, 4, 2, 8, 2, layer_ids=(2, 5)), "layer 2 of .* is not 2 orders of 8 channels"),
        (Geometry(2, 4, 2, 6, 2, layer_ids=(2, 6)), "has nothing for layer 6"),
    ):
        with pytest.raises(CalibrationError, match=f"{message}: it was made with 'toy'"):
            load_channels(str(tmp_path / name), geometry)


def test_half_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pair(tmp_path / "c.json")
    file = tmp_path / "c.safetensors"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(CalibrationError, match=r"c.json' names 'c.safetensors', which is not beside it: copy both"):
        load_channels(str(tmp_path / "c.json"), GEOMETRY)
    _pair(tmp_path / "d.json", tokens=8)
    (tmp_path / "d.safetensors").rename(file)
    with pytest.raises(CalibrationError, match=r"'c.safetensors' is not the file that '.*c.json' was written with"):
        load_channels(str(tmp_path / "c.json"), GEOMETRY)
    file.write_bytes(kept[:-1])
    with pytest.raises(CalibrationError, match="is no safetensors file"):
        load_channels(str(file), GEOMETRY)
    file.write_bytes(kept)
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtraError, match=r"reading '.*c.safetensors' needs 'safetensors': pip install '.*\[hf\]'"
    ):
        load_channels(str(tmp_path / "c.json"), GEOMETRY)
    with pytest.raises(MissingExtraError, match="writing channel orders needs 'safetensors'"):
        save_channels(tmp_path / "e.json", {"k": {2: torch.tensor(ORDERS[2])}})


def test_tensors_of_something_else(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"model.embed": torch.zeros(2)}, tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="holds no channel orders"):
        load_channels(str(tmp_path / "c.safetensors"), GEOMETRY)
    save_file({f"layer.{i}.k": torch.tensor(ORDERS[i]).float() for i in (2, 5)}, tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="is not 2 orders of 6 channels"):
        load_channels(str(tmp_path / "c.safetensors"), GEOMETRY)


def test_the_form_in_one_file(tmp_path: Path) -> None:
    named, unnamed = {"statistic": "q", "layers": GOOD}, {"layers": GOOD}
    assert _same(_load(tmp_path / "c.json", named)) and _same(load_channels(str(tmp_path / "c.json"), GEOMETRY, "q"))
    with pytest.raises(CalibrationError, match="holds q, not k: leave"):
        load_channels(str(tmp_path / "c.json"), GEOMETRY, "k")
    assert _same(_load(tmp_path / "c.json", unnamed))
    with pytest.raises(CalibrationError, match="holds channels that it does not say the statistic of, not k: leave"):
        load_channels(str(tmp_path / "c.json"), GEOMETRY, "k")


def _official(**statistics: dict[int, list[list[int]]]) -> dict[str, object]:
    keys = {f"model.layers.{i}.self_attn.{name}_proj": rows
            for name, layers in statistics.items() for i, rows in layers.items()}  # fmt: skip
    return {"model.layers.7.mlp": [], "model.layers.2.self_attn.v_proj": [[0]], **keys}


def test_official_files_under_grouped_queries(tmp_path: Path) -> None:
    heads = {layer: [list(range(6))] * 4 for layer in ORDERS}
    path = tmp_path / "c.json"
    assert _same(_load(path, _official(q=heads, k=ORDERS, qk=heads)))
    assert _same(load_channels(str(path), GEOMETRY, "k"))
    with pytest.raises(
        CalibrationError,
        match="holds qk of 4 query heads in layer 2, and labels need one row for each of 2 kv heads: "
        "choose selector.statistic=k, or calibrate again\n",
    ):
        load_channels(str(path), GEOMETRY, "qk")
    with pytest.raises(CalibrationError, match="holds q of 4 query heads in layer 2, .* kv heads: calibrate again\n"):
        _load(path, _official(q=heads))


def test_official_files_without_grouped_queries(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    backwards = dict(zip(ORDERS, reversed(ORDERS.values()), strict=True))
    assert _same(_load(path, _official(k=OTHERS, q=backwards, qk=ORDERS)))
    assert _same(load_channels(str(path), GEOMETRY, "k"), OTHERS)
    assert _same(load_channels(str(path), GEOMETRY, "q"), backwards)
    assert _same(_load(path, _official(k=OTHERS, q=ORDERS)))
    assert _same(_load(path, _official(qk=ORDERS)))
    # Of a layer that lacks one statistic another is not taken in silence.
    with pytest.raises(CalibrationError, match="has nothing for layer 5"):
        _load(path, _official(qk={2: ORDERS[2]}, q={5: ORDERS[5]}))


def test_the_verb_writes_where_the_orders_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    import hashlib

    from twilight.loading import model_hash, tiny_path

    text = "def f(x):\n    return x\n" * 9
    (tmp_path / "t.py").write_text(text)
    argv = ["double_sparsity", "--text", str(tmp_path / "t.py"), "--tokens", "90", "--statistic", "q"]
    assert main([*argv, "--out", str(tmp_path / "c.json")]) == 0
    assert "c.json, c.safetensors: channel orders of 7 layers" in capsys.readouterr().out
    data = json.loads((tmp_path / "c.json").read_text())
    assert data["model"] == "tiny" and data["model_revision"] == model_hash(tiny_path())
    assert data["text"] == "t.py" and data["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert (data["statistic"], data["tokens"], data["seed"]) == ("q", 90, 0)
    assert {"python", "torch", "transformers"} <= set(data["versions"])
    geometry = Geometry(7, 6, 2, 64)
    named = {name: load_channels(str(tmp_path / "c.json"), geometry, name) for name in ("qk", "q", "k")}
    assert all(
        torch.equal(rows, named["q"][i]) for i, rows in load_channels(str(tmp_path / "c.json"), geometry).items()
    )
    assert not torch.equal(named["q"][3], named["k"][3])
    assert str(tmp_path) not in (tmp_path / "c.json").read_text()
    assert len(load_channels(f"{tiny_path()}/double_sparsity.json", geometry)) == 7


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
        ({f"model.layers.{i}.self_attn.q_proj": [list(range(6))] * 3 for i in (2, 5)}, "is not 2 orders of 6"),
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
