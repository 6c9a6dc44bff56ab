"""Where the files that are not Python live: CUDA sources and Hydra configs."""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def checkout() -> Path | None:
    """Return the repository's folder if the package runs from one (a checkout or an editable install), else None."""
    parent = _package().parent
    return parent if (parent / "pyproject.toml").is_file() else None


def folder(name: str) -> Path:
    """Return the folder `name`, ``"conf"`` or ``"raw_kernels"``.

    A wheel has it inside the package. A checkout has it beside the package, and so does an editable install, which
    points into one.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    package, repository = _package(), checkout()
    places = [package / name] + ([repository / name] if repository is not None else [])
    for place in places:
        if place.is_dir():
            return place
    looked = " or ".join(str(place) for place in places)
    raise FileNotFoundError(
        f"no folder '{name}' of twilight: looked for {looked}\n"
        "  the installation is incomplete: pip install --force-reinstall twilight-attn"
    )


def _package() -> Path:
    files = importlib.resources.files("twilight")
    if not isinstance(files, Path):
        # A zip, which neither NVRTC's include path nor Hydra's file source can read.
        raise FileNotFoundError(f"twilight must be installed as plain files, not as {files}")
    return files
