"""``twilight plugins new``: a package with a selector that works, to be made into another."""

from __future__ import annotations

import importlib.resources
import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

import twilight
from twilight.registry import registry

FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "$module/__init__.py": "init.py.in",
    "$module/selector.py": "selector.py.in",
    "$module/plugin.py": "plugin.py.in",
    "$module/conf/__init__.py": None,
    "$module/conf/selector/__init__.py": None,
    "$module/conf/selector/${module}_wide.yaml": "preset.yaml.in",
    "tests/test_$module.py": "test.py.in",
}
"""What a package is made of: its path, and the template in ``twilight/templates/plugin``; None for an empty file."""


def names_for(name: str) -> dict[str, str]:
    """Return what a package, its module and its class are called for what a user wrote.

    Raises:
        ValueError: no name can be made of it, or it is taken.
    """
    words = [word for word in re.split(r"[^A-Za-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name)) if word]
    if not words or not name.isascii() or re.search(r"[^A-Za-z0-9_. -]", name):
        raise ValueError(f"name: expected letters, digits and dashes, such as my-selector, got {name!r}")
    module = "_".join(words).lower()
    if not module.isidentifier() or keyword.iskeyword(module):
        why = "is a word of Python's" if keyword.iskeyword(module) else "does not begin with a letter"
        raise ValueError(
            f"name: '{module}' {why}, so that no module can be called so; try my-{'-'.join(words).lower()}"
        )
    there = registry().selectors()
    if module in there:
        raise ValueError(f"name: selector '{module}' is installed already, by {registry().origin(module).label}")
    if importlib.util.find_spec(module) is not None:
        raise ValueError(
            f"name: there is a module '{module}' in this environment, which would hide the package or be hidden; try "
            f"{'-'.join(words).lower()}-selector"
        )
    cls = "".join(word[0].upper() + word[1:] for word in words)
    if cls in twilight.__all__:
        raise ValueError(f"name: the class would be called {cls}, as twilight's own; try my-{'-'.join(words).lower()}")
    return {"module": module, "cls": cls, "distribution": "twilight-" + module.replace("_", "-")}


def new(name: str, parent: str | Path = ".") -> Path:
    """Write a package called `name` into `parent`, and return its folder.

    Raises:
        ValueError: a name that no package can have, or that is taken.
        FileExistsError: there is something of that name already. Nothing is written.
        FileNotFoundError: `parent` is no folder.
    """
    names = names_for(name)
    place = Path(parent)
    if not place.is_dir():
        raise FileNotFoundError(f"--dir: there is no folder '{place}'\n  mkdir -p '{place}'")
    folder = place / names["module"].replace("_", "-")
    if folder.exists():
        raise FileExistsError(f"'{folder}' is there already; nothing has been written\n  choose another name, or --dir")
    templates = importlib.resources.files("twilight") / "templates" / "plugin"
    for path, template in FILES.items():
        text = "" if template is None else (templates / template).read_text(encoding="utf-8")
        target = folder / Template(path).substitute(names)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(text).substitute(names), encoding="utf-8")
    return folder
