"""Parameters of selectors and pruners: dataclass fields, checked by type and turned into typed config nodes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from twilight.errors import UnknownNameError, did_you_mean

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its type and its default (`MISSING` if it has none)."""

    name: str
    hint: Any
    default: Any

    @property
    def type_name(self) -> str:
        """The type as a user would write it."""
        if isinstance(self.hint, type) and not typing.get_args(self.hint):
            return self.hint.__name__
        return str(self.hint).replace("typing.", "").replace("NoneType", "None")


def parameters(cls: type) -> list[Parameter]:
    """Return the parameters of a class; none if it is not a dataclass."""
    if not dataclasses.is_dataclass(cls):
        return []
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        if field.init:
            default: Any = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            elif default is dataclasses.MISSING:
                default = MISSING
            found.append(Parameter(field.name, hints[field.name], default))
    return found


def parameter_docs(cls: type) -> dict[str, str]:
    """Return what the docstring of a class says of its fields, under ``Attributes:`` or ``Args:``, a line each."""
    found: dict[str, str] = {}
    name, inside = "", False
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if not line.startswith(" "):
            inside = line in ("Attributes:", "Args:")
        elif inside and (start := re.match(r"    (\w+(?:, \w+)*): (.*)", line)):
            name = start[1]
            found |= dict.fromkeys(name.split(", "), start[2])
        elif inside and name:
            found |= {each: f"{found[each]} {line.strip()}" for each in name.split(", ")}
    return found


def check_fields(cls: type) -> None:
    """Check that the parameters of `cls` can be typed options on the command line.

    Raises:
        TypeError: names the field, and what to do about it.
    """
    own = [name for name, hint in vars(cls).get("__annotations__", {}).items() if not _is_class_var(hint)]
    if own and "__dataclass_fields__" not in vars(cls):
        raise TypeError(f"{cls.__name__}: annotates '{own[0]}' but is not a dataclass; decorate it with @dataclass")
    try:
        found = parameters(cls)
    except NameError as error:
        raise TypeError(f"{cls.__name__}: a field's type cannot be resolved: {error}") from error
    for parameter in found:
        if parameter.name == "name":
            raise TypeError(f"{cls.__name__}: 'name' is a field; write it without an annotation, or as a ClassVar")
        try:
            OmegaConf.structured(dataclasses.make_dataclass("Field", [_config_field(parameter)]))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise TypeError(
                f"{cls.__name__}.{parameter.name}: type {parameter.type_name} is not one that Hydra's structured "
                f"configs know ({reason})"
            ) from error


def config_node(cls: type, name: str, interpolate: Mapping[str, str] | None = None) -> type:
    """Make a structured config of the parameters of `cls`, with its `name` in front.

    Args:
        cls: a class that `check_fields` accepts.
        name: what the node's ``name`` says.
        interpolate: defaults to write instead, such as ``{"p": "${p}"}``.
    """
    fields: list[Any] = [("name", str, dataclasses.field(default=name))]
    for parameter in parameters(cls):
        if interpolate and parameter.name in interpolate:
            parameter = dataclasses.replace(parameter, default=interpolate[parameter.name])
        fields.append(_config_field(parameter))
    return dataclasses.make_dataclass(f"{cls.__name__}Config", fields)


def create(cls: type[T], label: str, values: Mapping[str, Any], *, see: str) -> T:
    """Make an instance of `cls`.

    Args:
        cls: a dataclass, or a class without parameters.
        label: what to call it in messages, such as ``"selector 'quest'"``.
        values: its parameters.
        see: the command that lists them.

    Raises:
        UnknownNameError: a parameter that it does not have.
        TypeError: a value of the wrong type, or a parameter that is needed and was not given.
        ValueError: a value that is not among those that there are.
    """
    known = {parameter.name: parameter for parameter in parameters(cls)}
    for name in values:
        if name not in known:
            there = ", ".join(known) or "none"
            raise UnknownNameError(
                f"{label} has no parameter '{name}'.{did_you_mean(name, known)}\n  parameters: {there}  ({see})"
            )
    missing = [name for name, parameter in known.items() if parameter.default is MISSING and name not in values]
    if missing:
        raise TypeError(f"{label}: needs a value of '{missing[0]}' ({known[missing[0]].type_name})")
    for name, value in values.items():
        _check(f"{label}: {name}", value, known[name])
    return cls(**values)


def from_config(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values`, read from a config, with lists made tuples where the class wants tuples."""
    hints = {parameter.name: parameter.hint for parameter in parameters(cls)}
    return {name: _to_tuple(value, hints.get(name, Any)) for name, value in values.items()}


def _check(label: str, value: Any, parameter: Parameter) -> None:
    if _accepts(value, parameter.hint):
        return
    choices = _choices(parameter.hint)
    if choices and any(isinstance(value, type(choice)) for choice in choices):
        wanted = ", ".join(repr(choice) for choice in choices)
        near = did_you_mean(value, map(str, choices)) if isinstance(value, str) else ""
        raise ValueError(f"{label}: expected one of {wanted}, got {value!r}.{near}")
    raise TypeError(f"{label}: expected {parameter.type_name}, got {type(value).__name__} {value!r}")


def _accepts(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, UnionType):
        return any(_accepts(value, arg) for arg in args)
    if origin is Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is not None:
        return isinstance(value, origin) and _accepts_items(value, origin, args)
    if hint is None or hint is NoneType:
        return value is None
    if hint is Any:  # a class, since Python 3.11, that isinstance refuses
        return True
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    # A type that isinstance cannot judge was let in by OmegaConf, whose word it then is.
    return isinstance(value, hint) if isinstance(hint, type) else True


def _accepts_items(value: Any, origin: Any, args: Sequence[Any]) -> bool:
    if issubclass(origin, dict):
        return all(_accepts(key, args[0]) and _accepts(item, args[1]) for key, item in value.items())
    if issubclass(origin, tuple) and Ellipsis not in args:
        return len(value) == len(args) and all(map(_accepts, value, args))
    return all(_accepts(item, args[0]) for item in value)


def _choices(hint: Any) -> list[Any]:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(args)
    return [choice for arg in args for choice in _choices(arg)]


def _config_field(parameter: Parameter) -> Any:
    default: Any = parameter.default
    if isinstance(default, (list, dict, set)) or dataclasses.is_dataclass(default):
        return parameter.name, _config_hint(parameter.hint), dataclasses.field(default_factory=lambda: default)
    return parameter.name, _config_hint(parameter.hint), dataclasses.field(default=default)


def _config_hint(hint: Any) -> Any:
    """Return `hint` in OmegaConf's terms: it knows no Literal, so that becomes the type of its values."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _union(type(arg) for arg in args)
    if origin in (Union, UnionType):
        return _union(_config_hint(arg) for arg in args)
    if origin in (list, dict, tuple):
        return origin[tuple(_config_hint(arg) for arg in args)]
    return hint


def _union(hints: Iterable[Any]) -> Any:
    return functools.reduce(operator.or_, dict.fromkeys(hints))


def _to_tuple(value: Any, hint: Any) -> Any:
    wants = [hint, *typing.get_args(hint)] if typing.get_origin(hint) in (Union, UnionType) else [hint]
    tuples = [want for want in wants if want is tuple or typing.get_origin(want) is tuple]
    return tuple(value) if isinstance(value, list) and tuples else value


def _is_class_var(hint: Any) -> bool:
    # Under `from __future__ import annotations` the hint is its source text.
    text = hint.partition("[")[0] if isinstance(hint, str) else ""
    return typing.get_origin(hint) is ClassVar or hint is ClassVar or text.rpartition(".")[2] == "ClassVar"
