"""The plugins that are installed, and the selectors that they bring.

A plugin is an entry point in the group ``twilight.plugins``. It names either a `Selector` subclass, which is then
registered, or a module (or any object) with implementations of the hooks in `twilight.hookspecs`. The built-in
selectors come through the same door.

Environment variables, each a list separated by commas. An item is the name of an entry point, of a distribution, or
``distribution:entry_point``:

- ``TWILIGHT_PLUGINS``: load these plugins of other distributions and no more (empty: none). Built-ins stay.
- ``TWILIGHT_DISABLE_PLUGINS``: do not load these, built-ins included.
- ``TWILIGHT_STRICT=1``: a plugin with a problem raises `PluginError` instead of a warning.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import keyword
import os
import re
import threading
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pluggy

from twilight import hookspecs, parameters
from twilight.errors import PluginError, UnknownNameError, did_you_mean, unknown_name
from twilight.selector import Selector

GROUP = "twilight.plugins"
DISTRIBUTION = "twilight-attn"
NOT_INSTALLED = f"{DISTRIBUTION} is not installed in this environment, so its own selectors are not: pip install -e ."

_FAILURES = (Exception, SystemExit)
"""What a plugin may throw at us: SystemExit too, or a script named as an entry point would end the process."""


class PluginWarning(UserWarning):
    """A plugin could not be loaded, or not all of it."""


@dataclass
class PluginRecord:
    """What became of one plugin.

    Attributes:
        name: of the entry point.
        distribution: that it came with; empty for a class registered by hand.
        version: of the distribution.
        value: what the entry point names, ``module:attribute``.
        builtin: whether it is twilight's own.
        disabled: whether the environment said not to load it.
        selectors: names that it registered.
        hooks: hooks that it implements.
        problems: what is wrong with it, one line each.
        traceback: of the first problem that was an exception.
    """

    name: str
    distribution: str
    version: str
    value: str
    builtin: bool = False
    disabled: bool = False
    selectors: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    traceback: str = ""

    @property
    def status(self) -> Literal["loaded", "partial", "failed", "disabled"]:
        """``"partial"`` if some of it works in spite of its problems."""
        if self.disabled:
            return "disabled"
        if not self.problems:
            return "loaded"
        return "partial" if self.selectors else "failed"

    @property
    def label(self) -> str:
        """How messages call it: distribution and version, and the entry point where that has another name."""
        if not self.distribution:
            return f"{self.value} (registered by hand)"
        entry = "" if self.name == self.distribution else f", entry point '{self.name}'"
        return f"{self.distribution} {self.version}{entry}"

    def complaint(self) -> str:
        """Return one line that says what is wrong."""
        how = "failed to load" if self.status == "failed" else "is loaded in part"
        return f"plugin '{self.label}' {how}: {'; '.join(self.problems)}"

    def fail(self, problem: str | BaseException) -> bool:
        """Note a problem. Return whether it was not known yet."""
        if isinstance(problem, BaseException):
            text = str(problem).strip().partition("\n")[0]
            self.traceback = self.traceback or "".join(traceback.format_exception(problem))
            problem = f"{type(problem).__name__}: {text}" if text else type(problem).__name__
        if problem in self.problems:
            return False
        self.problems.append(problem)
        return True

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "value": self.value,
            "builtin": self.builtin,
            "status": self.status,
            "selectors": self.selectors,
            "hooks": self.hooks,
            "problems": self.problems,
        }


def check_selector_class(cls: Any) -> None:
    """Check what a class must have to be registered.

    Raises:
        TypeError: says what it lacks.
    """
    if not (isinstance(cls, type) and issubclass(cls, Selector)):
        what = f"the class {cls.__name__}" if isinstance(cls, type) else f"a {type(cls).__name__}"
        raise TypeError(f"expected a subclass of twilight.Selector, got {what}")
    name = cls.name
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise TypeError(f"{cls.__name__}.name: expected an identifier such as 'my_selector', got {name!r}")
    if cls.select is Selector.select:
        raise TypeError(f"{cls.__name__}: does not define 'select'")
    parameters.check_fields(cls)


class Registry:
    """Plugins and selectors of this process. They are looked for when first asked for."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._forget()

    def _forget(self) -> None:
        self._state: Literal["new", "loading", "loaded"] = "new"
        self._records: list[PluginRecord] = []
        self._selectors: dict[str, tuple[type[Selector], PluginRecord]] = {}
        self._managers: list[tuple[PluginRecord, pluggy.PluginManager]] = []

    def load(self) -> None:
        """Load the plugins, unless that has been done.

        Raises:
            PluginError: with ``TWILIGHT_STRICT=1``, if a plugin has a problem.
        """
        with self._lock:
            # A plugin that asks for selectors while it is imported sees those that are there by then.
            if self._state != "new":
                return
            self._state = "loading"
            try:
                for entry_point in _entry_points():
                    self._load(entry_point)
                complaints = self.complaints() + _unmatched(self._records)
                if _flag("TWILIGHT_STRICT"):
                    _complain(complaints)
            except BaseException:
                self._forget()
                raise
            # Before the warnings, which a filter may turn into exceptions: the plugins are loaded all the same.
            self._state = "loaded"
        _complain(complaints)

    def selectors(self) -> dict[str, type[Selector]]:
        """Return the selectors by name."""
        self.load()
        return {name: self._selectors[name][0] for name in sorted(self._selectors)}

    def get_selector(self, name: str) -> type[Selector]:
        """Return the class of that name.

        Raises:
            UnknownNameError: nobody registered it.
        """
        self.load()
        if name not in self._selectors:
            raise self.unknown_selector(name)
        return self._selectors[name][0]

    def create_selector(self, name: str, **params: Any) -> Selector:
        """Return a new selector.

        Raises:
            UnknownNameError: no such selector, or it has no such parameter.
            TypeError: a parameter of the wrong type.
        """
        cls = self.get_selector(name)
        return parameters.create(cls, f"selector '{name}'", params, see=f"twilight plugins info {name}")

    def unknown_selector(self, name: str) -> UnknownNameError:
        """Build the error for a name that nobody registered."""
        error = unknown_name("selector", name, list(self.selectors()), see="twilight plugins list")
        lines = [str(error), *(f"  {complaint}  (twilight doctor)" for complaint in self.complaints())]
        disabled = [
            record for record in self._records if record.disabled and name in (record.name, record.distribution)
        ]
        lines += [f"  plugin '{record.label}' is disabled by the environment" for record in disabled]
        return UnknownNameError("\n".join(lines))

    def complaints(self) -> list[str]:
        """Return a line for each plugin with a problem. Our own, if they are not installed, share one."""
        lines = [] if self.is_installed() else [NOT_INSTALLED]
        return lines + [record.complaint() for record in self._records if record.problems not in ([], [NOT_INSTALLED])]

    def is_installed(self) -> bool:
        """Return whether this distribution is installed, as opposed to lying on the path."""
        self.load()
        own = [record for record in self._records if record.builtin]
        return bool(own) and not any(NOT_INSTALLED in record.problems for record in own)

    def plugins(self) -> list[PluginRecord]:
        """Return what became of each plugin, built-ins first."""
        self.load()
        return list(self._records)

    def origin(self, name: str) -> PluginRecord:
        """Return the plugin that registered a selector."""
        self.get_selector(name)
        return self._selectors[name][1]

    def register(self, cls: type[Selector]) -> type[Selector]:
        """Register a selector by hand, as in a notebook or a test. May be used as a decorator.

        Registering a name again replaces the class, unless an installed plugin brought it.

        Raises:
            TypeError: the class lacks something.
            ValueError: an installed plugin has that name.
        """
        check_selector_class(cls)
        self.load()
        with self._lock:
            if cls.name in self._selectors:
                owner = self._selectors[cls.name][1]
                if owner.distribution:
                    raise ValueError(f"selector '{cls.name}' is registered already, by {owner.label}")
                self.unregister(cls.name)
            record = PluginRecord(cls.name, "", "", f"{cls.__module__}:{cls.__qualname__}")
            self._records.append(record)
            self._add(cls, record)
        return cls

    def unregister(self, name: str) -> None:
        """Forget a selector.

        Raises:
            UnknownNameError: nobody registered it.
        """
        self.get_selector(name)
        with self._lock:
            _, record = self._selectors.pop(name)
            record.selectors.remove(name)
            if not record.distribution:
                self._records.remove(record)

    def register_configs(self, config_store: Any) -> None:
        """Let the plugins add their config nodes to Hydra's `config_store`."""
        self.load()
        for record, manager in self._managers:
            with self._guard(record):
                manager.hook.twilight_register_configs(config_store=_GuardedStore(config_store, record))

    def config_searchpath(self) -> list[str]:
        """Return the places of the plugins' YAML configs."""
        self.load()
        found: list[str] = []
        for record, manager in self._managers:
            with self._guard(record):
                for places in manager.hook.twilight_config_searchpath():
                    found += _check_places(places)
        return found

    @contextlib.contextmanager
    def _guard(self, record: PluginRecord) -> Iterator[None]:
        """Note what a plugin raises in its record and go on. What comes after loading is complained of at once."""
        try:
            yield
        except _FAILURES as error:
            if record.fail(error) and self._state == "loaded":
                _complain([record.complaint()])

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> None:
        distribution, version = _distribution(entry_point)
        record = PluginRecord(
            entry_point.name, distribution, version, entry_point.value, builtin=distribution == DISTRIBUTION
        )
        self._records.append(record)
        if _is_disabled(record):
            record.disabled = True
            return
        try:
            loaded = entry_point.load()
            if isinstance(loaded, type):
                self._add(loaded, record)
            else:
                self._add_hooks(loaded, record)
        except _FAILURES as error:
            absent = record.builtin and isinstance(error, ModuleNotFoundError) and error.name == "twilight_selectors"
            record.fail(NOT_INSTALLED if absent else error)

    def _add(self, cls: type[Selector], record: PluginRecord) -> None:
        check_selector_class(cls)
        if cls.name in self._selectors:
            owner = self._selectors[cls.name][1]
            record.fail(f"selector '{cls.name}' is taken by {owner.label}, which keeps it")
            return
        self._selectors[cls.name] = (cls, record)
        record.selectors.append(cls.name)

    def _add_hooks(self, plugin: object, record: PluginRecord) -> None:
        # A manager of its own for each plugin: a hook that raises, or that pluggy refuses, is then its plugin's alone.
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        known = set(vars(manager.hook))
        manager.register(plugin)
        implemented = manager.get_hookcallers(plugin) or []
        record.hooks = sorted(hook.name for hook in implemented if hook.name in known)
        for hook in implemented:
            if hook.name not in known and not all(impl.optionalhook for impl in hook.get_hookimpls()):
                record.fail(f"there is no hook '{hook.name}'.{did_you_mean(hook.name, known)}")
        if not record.hooks and not record.problems:
            what = f"module '{plugin.__name__}'" if isinstance(plugin, types.ModuleType) else repr(plugin)
            record.fail(f"{what} is no Selector subclass and has no function marked @twilight.hookimpl")
        self._managers.append((record, manager))

        def register(cls: type[Selector]) -> None:
            # One class at a time, so that the plugin's others are registered when one is refused.
            with self._guard(record):
                self._add(cls, record)

        manager.hook.twilight_register_selectors(register=register)


_REGISTRY = Registry()


def registry() -> Registry:
    """Return the registry of this process."""
    return _REGISTRY


def selectors() -> dict[str, type[Selector]]:
    """Return the selectors by name; see `Registry.selectors`."""
    return _REGISTRY.selectors()


def get_selector(name: str) -> type[Selector]:
    """Return a selector's class; see `Registry.get_selector`."""
    return _REGISTRY.get_selector(name)


def create_selector(name: str, **params: Any) -> Selector:
    """Return a new selector; see `Registry.create_selector`."""
    return _REGISTRY.create_selector(name, **params)


def plugins() -> list[PluginRecord]:
    """Return what became of each plugin; see `Registry.plugins`."""
    return _REGISTRY.plugins()


def register(cls: type[Selector]) -> type[Selector]:
    """Register a selector by hand; see `Registry.register`."""
    return _REGISTRY.register(cls)


def unregister(name: str) -> None:
    """Forget a selector; see `Registry.unregister`."""
    _REGISTRY.unregister(name)


def _complain(complaints: list[str]) -> None:
    if complaints and _flag("TWILIGHT_STRICT"):
        raise PluginError("\n".join(complaints) + "\n  TWILIGHT_STRICT is set; for more: twilight doctor")
    for complaint in complaints:
        warnings.warn(f"{complaint}  (twilight doctor)", PluginWarning, stacklevel=4)


class _GuardedStore:
    """Hydra's ConfigStore as a plugin sees it: it can add nodes, not replace those of others."""

    def __init__(self, store: Any, record: PluginRecord) -> None:
        self._store = store
        self._record = record

    def store(
        self, name: str, node: Any, group: str | None = None, package: str | None = None, provider: str | None = None
    ) -> None:
        there: Any = self._store.repo
        for part in (group or "").split("/") if group else []:
            there = there.get(part, {})
        owner = getattr(there.get(f"{name.removesuffix('.yaml')}.yaml"), "provider", None)
        mine = provider_name(self._record)
        own_selector = group == "selector" and name in self._record.selectors
        if owner is not None and owner != mine and not own_selector:
            raise ValueError(f"config '{group + '/' if group else ''}{name}' is taken by {owner}, which keeps it")
        self._store.store(name=name, node=node, group=group, package=package, provider=mine)


def provider_name(record: PluginRecord) -> str:
    """Return what a plugin's nodes in the ConfigStore carry as their provider."""
    return f"{DISTRIBUTION}: {record.label}"


def _entry_points() -> Iterator[importlib.metadata.EntryPoint]:
    """Yield the entry points, this distribution's first, in an order that does not depend on the installation's."""

    def order(entry_point: importlib.metadata.EntryPoint) -> tuple[bool, str, str]:
        name = _distribution(entry_point)[0]
        return name != DISTRIBUTION, name, entry_point.name

    yield from sorted(importlib.metadata.entry_points(group=GROUP), key=order)


def _distribution(entry_point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    name = version = None
    # A folder that is no whole .dist-info has neither; some Pythons answer None, others raise.
    with contextlib.suppress(Exception):
        metadata: Any = entry_point.dist.metadata if entry_point.dist is not None else {}
        name, version = metadata.get("Name"), metadata.get("Version")
    return _normalised(name or "unknown"), version or ""


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off")


def _names(variable: str) -> list[str] | None:
    value = os.environ.get(variable)
    return None if value is None else [item.strip() for item in value.split(",") if item.strip()]


def _matches(record: PluginRecord, item: str) -> bool:
    distribution, _, entry = item.rpartition(":")
    if distribution:
        return _normalised(distribution) == record.distribution and entry == record.name
    return item == record.name or _normalised(item) == record.distribution


def _is_disabled(record: PluginRecord) -> bool:
    allowed = _names("TWILIGHT_PLUGINS")
    if allowed is not None and not record.builtin and not any(_matches(record, item) for item in allowed):
        return True
    return any(_matches(record, item) for item in _names("TWILIGHT_DISABLE_PLUGINS") or ())


def _unmatched(records: list[PluginRecord]) -> list[str]:
    """Return a complaint for each name in the environment that is no plugin's."""
    known = {name for record in records for name in (record.name, record.distribution)}
    return [
        f"{variable}: no plugin '{item}'.{did_you_mean(item, known)}"
        for variable in ("TWILIGHT_PLUGINS", "TWILIGHT_DISABLE_PLUGINS")
        for item in _names(variable) or ()
        if not any(_matches(record, item) for record in records)
    ]


def _check_places(places: object) -> list[str]:
    if not isinstance(places, (list, tuple)):
        raise TypeError(f"twilight_config_searchpath: expected a list of str, got {type(places).__name__}")
    for place in places:
        if not isinstance(place, str) or not place.startswith(("pkg://", "file://")):
            raise ValueError(f"twilight_config_searchpath: expected 'pkg://…' or 'file://…', got {place!r}")
        package = place.removeprefix("pkg://")
        if place.startswith("pkg://") and importlib.util.find_spec(package.replace("/", ".")) is None:
            raise ValueError(f"twilight_config_searchpath: there is no package '{package}'")
    return list(places)
