"""Parameter structs and what mirrors them: a swap of two of one type changes no size, and no compiler would notice."""

from __future__ import annotations

import ctypes
import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "raw_kernels"
SOURCES = "\n".join(path.read_text() for path in sorted(FOLDER.glob("*.cu*")))
STEMS = sorted(path.stem for path in FOLDER.glob("*.cu"))
KINDS = {
    "int": ctypes.c_int, "long long": ctypes.c_longlong, "float": ctypes.c_float, "double": ctypes.c_double,
    "*": ctypes.c_void_p,
}  # fmt: skip


def declared(name: str) -> list[tuple[str, str, int]]:
    """Name, kind and length of each member of a struct, those of structs inside it in their place."""
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", SOURCES, re.M | re.S)
    assert body, name
    members: list[tuple[str, str, int]] = []
    for declaration in re.sub(r"//[^\n]*", "", body[1]).split(";"):
        words = re.fullmatch(r"\s*(?:const )?([\w ]+?)\s*(\*?)\s*(\w+)(?:\[(\d+)\])?\s*", declaration)
        if words is None:
            assert not declaration.strip() or "(" in declaration, declaration
            continue
        kind, star, member, length = words.groups()
        if star or kind in KINDS:
            members.append((member, star or kind, int(length or 1)))
        else:
            members += declared(kind)
    return members


def mirrored(struct: type[ctypes.Structure]) -> list[tuple[str, type, int]]:
    members: list[tuple[str, type, int]] = []
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            members += mirrored(kind)
            continue
        array = getattr(kind, "_type_", None) if issubclass(kind, ctypes.Array) else None
        members.append((name, array or kind, kind._length_ if array else 1))
    return members


@pytest.mark.parametrize("stem", STEMS)
def test_members_have_the_order_and_types_of_the_kernel(stem):
    structs = importlib.import_module(f"twilight.ops.{stem}").STRUCTS
    assert structs
    for struct in structs:
        want = [(name, KINDS[kind], length) for name, kind, length in declared(struct.__name__)]
        assert mirrored(struct) == want
