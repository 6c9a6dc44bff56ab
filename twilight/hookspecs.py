"""The hooks that a plugin may implement."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from twilight.selector import Selector

PROJECT = "twilight"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as an implementation of the hook of that name."""


@hookspec
def twilight_register_selectors(register: Callable[[type[Selector]], None]) -> None:
    """Register selectors: call ``register(cls)`` once for each class."""


@hookspec
def twilight_register_configs(config_store: Any) -> None:
    """Add typed config nodes: ``config_store.store(group="selector", name="mine_fast", node=MineFast)``.

    A selector's own node is made from its dataclass fields and need not be stored here. This is for presets and for
    groups of the plugin's own. What another package has stored already cannot be replaced.
    """


@hookspec
def twilight_config_searchpath() -> list[str]:  # type: ignore[empty-body]
    """Return places of YAML configs, such as ``["pkg://my_package.conf"]``, laid out like twilight's own ``conf``."""
