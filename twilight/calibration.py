"""Calibration: what a selector needs to know about a model before it runs, and `twilight calibrate` to find it out.

The files of channel orders and their forms: `twilight.channel_files`.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from twilight import channel_files
from twilight.channel_files import MAKE, STATISTICS, ChannelFile
from twilight.errors import CalibrationError
from twilight.geometry import Geometry


def default_calibration(model_path: str | None, selector: str) -> str | None:
    """Return the path of the calibration file that lies in a model's folder, if one does."""
    if not model_path:
        return None
    path = Path(model_path) / f"{selector}.json"
    return str(path) if path.is_file() else None


def load_channels(path: str | None, geometry: Geometry, statistic: str | None = None) -> dict[int, torch.Tensor]:
    """Read channel orders for the layers of a cache.

    Args:
        path: the file; None is an error that says how to make one.
        geometry: the layers, heads and channels that it has to cover.
        statistic: "qk", "q" or "k", of a file that has several. None is the one that the file was made for; of an
            official file, which does not say, the first of qk, q and k with one row a kv head. qk is the one that is
            measured after rotation there, as labels are, and counts both sides; q is that code's default. Under grouped
            queries its qk and q have a row a query head, which leaves k.

    Returns:
        For each of `geometry.layer_ids`, `[Hkv, d]` int64 on the geometry's device, heaviest channel first.

    Raises:
        CalibrationError: no file, or one that does not fit.
        MissingExtraError: a safetensors file, without safetensors.
    """
    if path is None:
        raise CalibrationError(
            "double_sparsity: no calibration file was given, and the model's folder holds no double_sparsity.json\n"
            f"  {MAKE}\n  then pass it: selector.calibration=double_sparsity.json"
        )
    found = channel_files.read(path)
    chosen = _choose(found, geometry, statistic, path)
    return {layer: _order(found, chosen, layer, geometry, path) for layer in geometry.layer_ids}


def save_channels(path: str | Path, orders: Mapping[str, Mapping[int, torch.Tensor]], **source: Any) -> None:
    """Write channel orders, `[Hkv, d]` for each statistic and layer, and where they came from.

    Two files, whichever of them `path` names: ``NAME.safetensors`` with the orders, ``NAME.json`` with `source`, of
    which `statistic` is the one that is used unless another is asked for.
    """
    channel_files.write(Path(path), orders, {"method": "double_sparsity", **source})


def _choose(found: ChannelFile, geometry: Geometry, statistic: str | None, path: str) -> str:
    if statistic is not None and statistic not in found.rows:
        holds = " and ".join(sorted(filter(None, found.rows))) or "channels that it does not say the statistic of"
        raise CalibrationError(
            f"calibration: '{path}' holds {holds}, not {statistic}: leave selector.statistic out, or name what it "
            f"holds\n  or {MAKE}"
        )
    wanted = statistic or found.statistic
    if wanted in found.rows:
        return str(wanted)
    names = [name for name in (*STATISTICS, "") if name in found.rows]
    return next((name for name in names if _fitting(found.rows[name], geometry)), names[0])


def _fitting(layers: Mapping[int, Any], geometry: Geometry) -> bool:
    return all(_is_orders(layers.get(layer), geometry.num_kv_heads, geometry.head_dim) for layer in geometry.layer_ids)


def _order(found: ChannelFile, statistic: str, layer: int, geometry: Geometry, path: str) -> torch.Tensor:
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    rows = found.rows[statistic].get(layer)
    whose = f"it was made with '{found.model}'" if found.model else "another model's?"
    if rows is None:
        raise CalibrationError(f"calibration: '{path}' has nothing for layer {layer}: {whose}\n  {MAKE}")
    if _is_orders(rows, heads, dim):
        return torch.tensor(rows, dtype=torch.long, device=geometry.device)
    if _is_orders(rows, geometry.num_q_heads, dim):
        others = [name for name, layers in found.rows.items() if _fitting(layers, geometry)]
        instead = f"choose selector.statistic={others[0]}, or calibrate again" if others else "calibrate again"
        raise CalibrationError(
            f"calibration: '{path}' holds {statistic} of {len(rows)} query heads in layer {layer}, and labels need one "
            f"row for each of {heads} kv heads: {instead}\n  {MAKE}"
        )
    raise CalibrationError(
        f"calibration: layer {layer} of '{path}' is not {heads} orders of {dim} channels: {whose}\n  {MAKE}"
    )


def _is_orders(rows: Any, heads: int, dim: int) -> bool:
    return isinstance(rows, list) and len(rows) == heads and all(_is_order(row, dim) for row in rows)


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
    parser.add_argument(
        "--statistic", choices=STATISTICS, default="qk",
        help="what channels are ranked by if selector.statistic does not say; all three are written (default qk)",
    )  # fmt: skip
    parser.add_argument("--out", help="NAME.json, beside it NAME.safetensors; METHOD in the model's folder by default")
    args = parser.parse_args(argv)

    from twilight.evaluation.corpus import document, source_files
    from twilight.integrations.transformers_calibrate import channel_orders
    from twilight.loading import load_model, model_hash
    from twilight.report import versions

    loaded = load_model(args.model, None if args.model == "tiny" else args.model)
    if args.out is None and not Path(loaded.path).is_dir():
        raise ValueError(f"--out: name a file, as '{loaded.path}' is no folder to put one into")
    if args.text is not None and not Path(args.text).is_file():
        raise FileNotFoundError(f"--text: no file '{args.text}'")
    if args.text is not None:
        text = Path(args.text).read_text(encoding="utf-8")
    else:
        text = b"".join(document(file) for file in source_files("train")[:64]).decode()
    ids = loaded.tokenizer(text, truncation=True, max_length=min(args.tokens, loaded.max_tokens))["input_ids"]
    if len(ids) < 2:
        raise ValueError("--text: expected at least 2 tokens of text")
    torch.manual_seed(0)
    orders = channel_orders(loaded.model, torch.tensor([ids], device=loaded.model.device))
    out = Path(args.out) if args.out else Path(loaded.path) / f"{args.method}.json"
    save_channels(
        out,
        orders,
        statistic=args.statistic,
        model=Path(loaded.path).resolve().name if Path(loaded.path).is_dir() else loaded.path,
        # As runs have it: the hub's commit, and of a folder a hash of its config and weights.
        model_revision=getattr(loaded.model.config, "_commit_hash", None) or model_hash(loaded.path),
        tokens=len(ids),
        text="python source" if args.text is None else Path(args.text).name,
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        seed=0,
        seeds="torch, before the model reads the text; the text is its first tokens in order, of which none are drawn",
        versions=versions(),
    )
    about, file = channel_files.pair(out)
    print(
        f"{about}, {file.name}: channel orders of {len(orders['qk'])} layers over {len(ids)} tokens, by mean |qk|, |q| "
        f"and |k|; {args.statistic} is used unless selector.statistic says otherwise"
    )
    return 0
