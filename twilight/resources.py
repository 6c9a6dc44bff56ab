"""Where what lies beside the package in a checkout is found: CUDA sources, Hydra configs, benchmarks."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def checkout() -> Path | None:
    """Return the repository's folder if the package runs from one (a checkout or an editable install), else None."""
    parent = _package().parent
    return parent if (parent / "pyproject.toml").is_file() else None


def folder(name: str) -> Path:
    """Return the folder `name`, ``"conf"``, ``"raw_kernels"`` or ``"benchmarks"``.

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


def subpackage(name: str) -> ModuleType:
    """Import ``twilight.<name>``, which a plain checkout has beside the package and Python does not find by itself.

    Raises:
        FileNotFoundError: it is not there.
    """
    full = f"{__package__}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    try:
        return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
    place = folder(name)
    spec = importlib.util.spec_from_file_location(full, place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[full] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _package() -> Path:
    files = importlib.resources.files("twilight")
    if not isinstance(files, Path):
        # A zip, which neither NVRTC's include path nor Hydra's file source can read.
        raise FileNotFoundError(f"twilight must be installed as plain files, not as {files}")
    return files
