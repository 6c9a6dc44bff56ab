"""Files of channel orders, as they are: three forms, read into one. Nothing is unpickled.

- Twilight's pair: ``NAME.safetensors`` with `layer.3.qk` `[Hkv, d]` int32 for each layer and statistic, and
  ``NAME.json`` with where they came from. Either path names the pair.
- Twilight's single JSON, {"statistic": "qk", "layers": {"3": [[17, 3, ...], ...], ...}}.
- The official Double Sparsity code's JSON, {"model.layers.3.self_attn.k_proj": [[...], ...], ...}, with q_proj and
  qk_proj beside it: rows of query heads, unlike twilight's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight.errors import CalibrationError, missing_extra

STATISTICS = ("qk", "q", "k")
"""What channels are ranked by, best first: see `twilight.calibration.load_channels`."""

MAKE = "make one: twilight calibrate double_sparsity --model PATH --text FILE --out double_sparsity.json"
_OFFICIAL_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.(q|k|qk)_proj")
_TENSOR = re.compile(r"layer\.(\d+)\.(q|k|qk)")


@dataclass
class ChannelFile:
    """What a file holds, unchecked.

    Attributes:
        rows: for each statistic and layer the rows of channels. A file that does not name its statistic has it as "".
        statistic: the one that the file itself says to use.
        model: the model that it was made with.
    """

    rows: dict[str, dict[int, Any]]
    statistic: str | None = None
    model: str | None = None


def read(path: str) -> ChannelFile:
    """Read a file of any form.

    Raises:
        CalibrationError: there is none, or it is of no form.
        MissingExtraError: a pair, without safetensors.
    """
    file = Path(path)
    if not file.is_file():
        raise CalibrationError(f"calibration: no file '{path}'\n  {MAKE}")
    if file.suffix == ".safetensors":
        # It has the other file's metadata in its header, so that it is whole without that.
        rows, about = _tensors(file, path)
        return _about(rows, about)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CalibrationError(f"calibration: '{path}' is not JSON ({error})\n  {MAKE}") from error
    data = data if isinstance(data, dict) else {}
    if isinstance(data.get("safetensors"), str):
        return _about(_beside(file, path, data), data)
    if isinstance(data.get("layers"), dict):
        found = _about({}, data)
        layers = {int(layer): rows for layer, rows in data["layers"].items() if layer.isdecimal()}
        found.rows = {found.statistic or "": layers}
        return found
    official: dict[str, dict[int, Any]] = {}
    for key, rows in data.items():
        if match := _OFFICIAL_KEY.fullmatch(key):
            official.setdefault(match[2], {})[int(match[1])] = rows
    if not official:
        raise CalibrationError(f"calibration: '{path}' holds no channel orders\n  {MAKE}")
    return ChannelFile(official)


def pair(path: Path) -> tuple[Path, Path]:
    """Return the JSON and the safetensors file of a pair, given either, or the name without an ending."""
    # Not with_suffix alone: in llama-3.1 it would take .1 for an ending.
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")


def write(path: Path, orders: Mapping[str, Mapping[int, torch.Tensor]], about: Mapping[str, Any]) -> None:
    """Write the pair of `path`: orders `[Hkv, d]` for each statistic and layer, and where they came from.

    Raises:
        MissingExtraError: without safetensors.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise missing_extra("safetensors", "hf", "writing channel orders") from error
    tensors = {
        f"layer.{layer}.{statistic}": order.int().cpu().contiguous()
        for statistic, layers in orders.items()
        for layer, order in layers.items()
    }
    about_file, file = pair(path)
    # Not save_file, whose files nobody else can read: a model's folder may be shared.
    file.write_bytes(save(tensors, metadata={key: _text(value) for key, value in about.items()}))
    # The hash tells when only one of the two was copied, or made anew.
    named = {"safetensors": file.name, "safetensors_sha256": _sha256(file)}
    about_file.write_text(json.dumps({**about, **named}, indent=1) + "\n", encoding="utf-8")


def _beside(file: Path, path: str, data: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """Read the tensors that a JSON file names."""
    other = file.with_name(Path(data["safetensors"]).name)
    if not other.is_file():
        raise CalibrationError(
            f"calibration: '{path}' names '{other.name}', which is not beside it: copy both files\n  {MAKE}"
        )
    if data.get("safetensors_sha256") not in (None, _sha256(other)):
        raise CalibrationError(
            f"calibration: '{other.name}' is not the file that '{path}' was written with: copy both files\n  {MAKE}"
        )
    return _tensors(other, str(other))[0]


def _tensors(file: Path, path: str) -> tuple[dict[str, dict[int, Any]], dict[str, Any]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise missing_extra("safetensors", "hf", f"reading '{path}'") from error
    rows: dict[str, dict[int, Any]] = {}
    try:
        with safe_open(file, "pt") as opened:
            about = dict(opened.metadata() or {})
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                if match := _TENSOR.fullmatch(key):
                    rows.setdefault(match[2], {})[int(match[1])] = opened.get_tensor(key).tolist()
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"calibration: '{path}' is no safetensors file ({error})\n  {MAKE}") from error
    if not rows:
        raise CalibrationError(f"calibration: '{path}' holds no channel orders\n  {MAKE}")
    return rows, about


def _about(rows: dict[str, dict[int, Any]], about: Mapping[str, Any]) -> ChannelFile:
    statistic, model = (value if isinstance(value, str) else None for value in map(about.get, ("statistic", "model")))
    return ChannelFile(rows, statistic, model)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
