"""Calibration files: what a selector needs to know about a model before it runs. JSON, nothing is unpickled.

A file of channel orders holds, besides where it came from,

    {"method": "double_sparsity", "statistic": "qk", "layers": {"2": [[17, 3, ...], ...], ...}}

with one row of head_dim channel numbers, heaviest first, for each kv head of each layer. The files that the official
Double Sparsity code ships, {"model.layers.0.self_attn.k_proj": [[...], ...], ...}, load too where they hold one row a
kv head.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from twilight.errors import CalibrationError
from twilight.geometry import Geometry

_OFFICIAL_KEY = re.compile(r"model\.layers\.(\d+)\.self_attn\.(q|k|qk)_proj")


def default_calibration(model_path: str | None, selector: str) -> str | None:
    """Return the path of the calibration file that lies in a model's folder, if one does."""
    if not model_path:
        return None
    path = Path(model_path) / f"{selector}.json"
    return str(path) if path.is_file() else None


def load_channels(path: str | None, geometry: Geometry) -> dict[int, torch.Tensor]:
    """Read channel orders for the layers of a cache.

    Args:
        path: the file; None is an error that says how to make one.
        geometry: the layers, heads and channels that it has to cover.

    Returns:
        For each of `geometry.layer_ids`, `[Hkv, d]` int64 on the geometry's device, heaviest channel first.

    Raises:
        CalibrationError: no file, or one that does not fit.
    """
    make = "make one: twilight calibrate double_sparsity --model PATH --text FILE --out double_sparsity.json"
    if path is None:
        raise CalibrationError(
            "double_sparsity: no calibration file was given, and the model's folder holds no double_sparsity.json\n"
            f"  {make}\n  then pass it: selector.calibration=double_sparsity.json"
        )
    file = Path(path)
    if not file.is_file():
        raise CalibrationError(f"calibration: no file '{path}'\n  {make}")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CalibrationError(f"calibration: '{path}' is not JSON ({error})\n  {make}") from error
    rows = _rows(data, path, make)
    return {layer: _order(rows.get(layer), layer, geometry, path, make) for layer in geometry.layer_ids}


def save_channels(path: str | Path, orders: dict[int, torch.Tensor], **source: Any) -> None:
    """Write channel orders, `[Hkv, d]` for each layer, and where they came from."""
    layers = {str(layer): order.tolist() for layer, order in orders.items()}
    data = {"method": "double_sparsity", **source, "layers": layers}
    text = json.dumps(data, indent=1)
    # One row of channels a line: a thousand-line diff of single numbers helps nobody.
    text = re.sub(r"\[\s+((?:\d+,?\s+)+)\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _rows(data: Any, path: str, make: str) -> dict[int, Any]:
    if isinstance(data, dict) and isinstance(data.get("layers"), dict):
        return {int(layer): rows for layer, rows in data["layers"].items() if layer.isdecimal()}
    official = {}
    for key, rows in data.items() if isinstance(data, dict) else ():
        match = _OFFICIAL_KEY.fullmatch(key)
        # Files with several statistics: one row a kv head is what the k projection has under grouped queries.
        if match and (match[2] == "k" or int(match[1]) not in official):
            official[int(match[1])] = rows
    if not official:
        raise CalibrationError(f"calibration: '{path}' holds no channel orders\n  {make}")
    return official


def _order(rows: Any, layer: int, geometry: Geometry, path: str, make: str) -> torch.Tensor:
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    if rows is None:
        raise CalibrationError(f"calibration: '{path}' has nothing for layer {layer}: another model's?\n  {make}")
    fits = isinstance(rows, list) and len(rows) == heads
    if not fits or not all(_is_order(row, dim) for row in rows):
        raise CalibrationError(
            f"calibration: layer {layer} of '{path}' is not {heads} orders of {dim} channels: "
            f"another model's?\n  {make}"
        )
    return torch.tensor(rows, dtype=torch.long, device=geometry.device)


def _is_order(row: Any, dim: int) -> bool:
    return isinstance(row, list) and all(type(channel) is int for channel in row) and sorted(row) == list(range(dim))


def main(argv: Sequence[str]) -> int:
    """Run ``twilight calibrate METHOD ...``; return the exit status."""
    if argv[:1] == ["p"]:
        from twilight import calibrate_p

        return calibrate_p.main(argv[1:])
    parser = argparse.ArgumentParser(
        prog="twilight calibrate",
        description="Make the calibration file of a selector. For p: `twilight calibrate p --help`.",
    )
    parser.add_argument("method", choices=["double_sparsity", "p"], help="the selector to calibrate, or p")
    parser.add_argument("--model", default="tiny", help="local folder or hub name; 'tiny' by default")
    parser.add_argument("--text", help="UTF-8 text file; Python source of the training split by default")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text to run (default 8192)")
    parser.add_argument("--statistic", choices=["qk", "q", "k"], default="qk", help="what channels are ranked by")
    parser.add_argument("--out", help="file to write; METHOD.json in the model's folder by default")
    args = parser.parse_args(argv)

    from twilight.evaluation.corpus import document, source_files
    from twilight.integrations.transformers_calibrate import channel_orders
    from twilight.loading import load_model

    loaded = load_model(args.model, None if args.model == "tiny" else args.model)
    if args.text is not None and not Path(args.text).is_file():
        raise FileNotFoundError(f"--text: no file '{args.text}'")
    if args.text is not None:
        text = Path(args.text).read_text(encoding="utf-8")
    else:
        text = b"".join(document(file) for file in source_files("train")[:64]).decode()
    ids = loaded.tokenizer(text, truncation=True, max_length=min(args.tokens, loaded.max_tokens))["input_ids"]
    if len(ids) < 2:
        raise ValueError("--text: expected at least 2 tokens of text")
    orders = channel_orders(loaded.model, torch.tensor([ids], device=loaded.model.device), args.statistic)
    out = Path(args.out) if args.out else Path(loaded.path) / f"{args.method}.json"
    save_channels(
        out,
        orders,
        statistic=args.statistic,
        model=Path(loaded.path).name,
        tokens=len(ids),
        text="python source" if args.text is None else Path(args.text).name,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    print(f"{out}: channel orders of {len(orders)} layers by mean |{args.statistic}| over {len(ids)} tokens")
    return 0
