"""Python source as text: it is on every machine that runs Python, and hashing splits it without a list."""

from __future__ import annotations

import hashlib
import os
import random
import site
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

MIN_FILE_BYTES = 512
MAX_FILE_BYTES = 256 * 1024
HELDOUT_SHARE = 0.05

_INSTALL_DIRS = {"site-packages", "dist-packages"}
_OWN_DIRS = {"twilight", "twilight_selectors"}


class SourceFile(NamedTuple):
    """One file of the corpus: `name` is its posix path relative to its root, `path` where it is."""

    name: str
    path: Path


def stdlib_root() -> Path:
    """Return the standard library folder of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"]).resolve()


def source_roots() -> list[Path]:
    """Return the standard library folder, then the site-packages folders, of the running interpreter."""
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()]
    roots = [Path(folder).resolve() for folder in folders]
    return [root for root in dict.fromkeys(roots) if root.is_dir()]


def is_heldout(name: str) -> bool:
    """Say whether the file called `name` is held out of training, by sha256 of the name; about 5 % are.

    Args:
        name: posix path relative to the root, so that a module is in one split under every Python version.
    """
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELDOUT_SHARE * 2**64


def source_files(split: Literal["train", "heldout"], roots: Iterable[Path] | None = None) -> list[SourceFile]:
    """List the UTF-8 Python files of 512 B to 256 KB of one split, sorted by name.

    Args:
        split: "train" or "heldout".
        roots: folders to walk; by default `source_roots()`.

    Raises:
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: expected 'train' or 'heldout', got {split!r}")
    found = [
        file
        for root in (source_roots() if roots is None else roots)
        for file in _walk(Path(root))
        if is_heldout(file.name) == (split == "heldout") and _is_text(file.path)
    ]
    return sorted(found)


def heldout_text(num_bytes: int, seed: int = 0, roots: Iterable[Path] | None = None) -> bytes:
    """Return exactly `num_bytes` bytes of held-out source, files shuffled by `seed`.

    Each file follows a line such as ``# file: asyncio/events.py``. The result is valid UTF-8.

    Args:
        num_bytes: at least 1.
        seed: order of the files.
        roots: folders to walk; by default the standard library alone, since every machine has it.

    Raises:
        ValueError: `num_bytes` is below 1, or the held-out files hold less text than that.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes: expected at least 1, got {num_bytes}")
    files = source_files("heldout", [stdlib_root()] if roots is None else roots)
    random.Random(seed).shuffle(files)
    parts, total = [], 0
    for file in files:
        parts.append(document(file))
        total += len(parts[-1])
        if total >= num_bytes:
            return cut(b"".join(parts), num_bytes)
    raise ValueError(f"num_bytes: {num_bytes} asked for, the {len(files)} held-out files hold {total}")


def document(file: SourceFile) -> bytes:
    """Return a file as it stands in every text of this package: a header line, its bytes, a final newline."""
    body = file.path.read_bytes()
    return f"# file: {file.name}\n".encode() + body + (b"" if body.endswith(b"\n") else b"\n")


def cut(text: bytes, num_bytes: int) -> bytes:
    """Return the first `num_bytes` bytes of `text`; a character cut in two becomes spaces."""
    end = num_bytes
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end].ljust(num_bytes)


def _walk(root: Path) -> Iterator[SourceFile]:
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        skipped = _INSTALL_DIRS | {"__pycache__"} | (_OWN_DIRS if here == root else set())
        subfolders[:] = [sub for sub in subfolders if sub not in skipped]
        for name in names:
            if name.endswith(".py"):
                yield SourceFile((here / name).relative_to(root).as_posix(), here / name)


def _is_text(path: Path) -> bool:
    try:
        if not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return False
        path.read_bytes().decode()
    except (OSError, UnicodeDecodeError):
        return False
    return True
