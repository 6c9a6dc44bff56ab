"""What a run measures. A task is a module with ``run(cfg) -> TaskResult``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TaskResult:
    """What a task found.

    Attributes:
        rows: flat, of scalars; ``method`` is ``"dense"`` or ``"twilight"``.
        tables: more of them, by name.
    """

    rows: list[dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


TASKS: dict[str, str] = {}
"""Module of each task, imported when it is run. A plugin adds its own."""
