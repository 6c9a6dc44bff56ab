"""A selector for twilight, with a kernel of its own: selector=group_max."""

from group_max.selector import GroupMax

__all__ = ["GroupMax"]
