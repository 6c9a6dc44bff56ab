"""Models and tokenizers from disk or hub, loaded once a process."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from twilight import resources
from twilight.errors import UnsupportedModelError, missing_extra

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to decode, and its tokenizer."""

    model: Any
    tokenizer: Any
    path: str

    @property
    def max_tokens(self) -> int:
        """Positions that the model has."""
        return int(getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", 0)) or 1 << 30


@lru_cache(maxsize=1)
def load_model(
    name: str,
    path: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a causal language model.

    Args:
        name: ``"tiny"`` for the model in the repository's ``examples/tiny``, anything else goes by `path`.
        path: local folder or hub name.
        dtype: ``"auto"`` (float32 on a CPU, the checkpoint's type on a GPU), float32, float16 or bfloat16.
        device: ``"auto"`` (a GPU if there is one) or a torch device.
        revision: of a hub model.
        trust_remote_code: passed on to transformers.

    Raises:
        ValueError, FileNotFoundError, MissingExtraError: what is missing or wrong, and what to do.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise missing_extra("transformers", "hf", "loading a model") from error
    where = tiny_path() if name == "tiny" and path is None else path
    if where is None:
        raise ValueError(f"model.path: model={name} needs a local folder or hub name, as in model.path=Qwen/Qwen3-0.6B")
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"model.dtype: expected auto, {', '.join(_DTYPES)}, got '{dtype}'")
    try:
        target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"model.device: expected auto, cpu or cuda, got '{device}'") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device: torch sees no GPU here (twilight doctor)")
    if dtype == "auto":
        # Two CPU cores multiply bfloat16 several times slower than float32.
        kind: Any = torch.float32 if target.type == "cpu" else "auto"
    else:
        kind = _DTYPES[dtype]
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if not Path(where).exists() and (Path(where).is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
        raise FileNotFoundError(f"model.path: cannot load '{where}': no such folder")
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise FileNotFoundError(f"model.path: cannot load '{where}': the folder holds no config.json")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=kind, **options).eval().to(target)
    except OSError as error:
        raise FileNotFoundError(f"model.path: cannot load '{where}': {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise UnsupportedModelError(f"model.path: '{where}' is not a causal language model: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    return LoadedModel(model, tokenizer, str(where))


@lru_cache(maxsize=8)
def model_hash(path: str) -> str | None:
    """Return 12 hexadecimal digits that tell a model's folder from another, None if `path` is no folder.

    Of config and weights: each file's name, size, and first and last MiB. Sixteen gigabytes are not read for a number.
    """
    folder, digest = Path(path), hashlib.sha256()
    if not folder.is_dir():
        return None
    # A calibration in the folder, NAME.safetensors beside NAME.json, is no part of the model.
    weights = [file for file in folder.glob("*.safetensors") if not file.with_suffix(".json").exists()]
    for file in sorted([folder / "config.json", *weights, *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as data:
            digest.update(data.read(1 << 20))
            data.seek(max(size - (1 << 20), 0))
            digest.update(data.read())
    return digest.hexdigest()[:12]


def tiny_path() -> str:
    """Return the folder of the small model, which lies in the repository and not in the wheel."""
    checkout = resources.checkout()
    folder = None if checkout is None else Path(checkout) / "examples" / "tiny"
    if folder is None or not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            "model=tiny: the small model lies in examples/tiny of the repository, which is not here\n"
            "  clone the repository, or name another model: model=hf model.path=PATH"
        )
    return str(folder)
