"""``twilight plugins list|info|new|check``: what is installed, where it comes from, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twilight import parameters, scaffold
from twilight.errors import unknown_name
from twilight.registry import PluginRecord, registry
from twilight.testing import verb

STATUS_STYLE = {"loaded": "green", "partial": "yellow", "failed": "red", "disabled": "dim"}


def main(words: Sequence[str]) -> int:
    """Run the verb and return the exit status."""
    parser = argparse.ArgumentParser("twilight plugins", description="What is installed, and what is wrong with it.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|info|new|check")
    actions.add_parser("list", help="all plugins").add_argument("--json", action="store_true", help="as data")
    info = actions.add_parser("info", help="one plugin or selector: where it is from, its parameters")
    info.add_argument("name")
    info.add_argument("--json", action="store_true", help="as data")
    made = actions.add_parser("new", help="write a package with a selector of your own")
    made.add_argument("name", help="such as my-selector")
    made.add_argument("--dir", default=".", help="the folder to write it into (default: here)")
    verb.add_arguments(actions.add_parser("check", help="does a selector do what every selector must?"))
    args = parser.parse_args(words)
    if args.action == "new":
        return _new(args.name, args.dir)
    if args.action == "check":
        return verb.main(args)
    if args.action == "list":
        records = registry().plugins()
        found = [record.as_dict() for record in records]
    else:
        found = describe(args.name)
    if args.json:
        print(json.dumps(found, indent=2))
    elif args.action == "list":
        _print_list(records)
    else:
        for each in found:
            _print_info(each)
    return 0


def _new(name: str, parent: str) -> int:
    folder = scaffold.new(name, parent)
    module = folder.name.replace("-", "_")
    print(f"wrote {folder}: the selector is {folder / module / 'selector.py'}")
    print(f"  pip install -e '{folder}[test]'")
    print(f"  twilight plugins check {module}")
    print(f"  twilight decode selector={module} p=0.9")
    print("it ranks pages by their mean key, which is blind to a lone fact: that it misses those is yours to change")
    return 0


def describe(name: str) -> list[dict[str, Any]]:
    """Return what there is to know about the plugins of that name, or that brought a selector of that name.

    Raises:
        UnknownNameError: there is none.
    """
    records = registry().plugins()
    found = [record for record in records if name in (record.name, record.distribution, *record.selectors)]
    if not found:
        names = {each for record in records for each in (record.name, *record.selectors)}
        raise unknown_name("plugin or selector", name, sorted(names), see="twilight plugins list")
    return [
        {
            **record.as_dict(),
            "selectors": [_describe_selector(each) for each in record.selectors],
            "traceback": record.traceback,
        }
        for record in found
    ]


def _describe_selector(name: str) -> dict[str, Any]:
    cls = registry().get_selector(name)
    docs = parameters.parameter_docs(cls)
    return {
        "name": name,
        "paper": cls.paper,
        "about": (cls.__doc__ or "").strip().partition("\n")[0],
        "parameters": [
            {
                "name": each.name,
                "type": each.type_name,
                "default": _plain(each.default),
                "about": docs.get(each.name, ""),
            }
            for each in parameters.parameters(cls)
        ],
    }


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


def _print_list(records: list[PluginRecord]) -> None:
    table = Table("plugin", "distribution", "status", "selectors", box=None, pad_edge=False)
    for record in records:
        origin = f"{record.distribution} {record.version}".strip() or "registered by hand"
        style = STATUS_STYLE[record.status]
        table.add_row(record.name, origin, f"[{style}]{record.status}[/]", ", ".join(record.selectors))
    console = Console()
    console.print(table)
    for complaint in registry().complaints():
        console.print(f"[red]{escape(complaint)}[/]", soft_wrap=True)


def _print_info(plugin: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    console.print(f"[bold]{escape(plugin['name'])}[/]  {escape(plugin['value'])}")
    origin = f"{plugin['distribution']} {plugin['version']}".strip() or "registered by hand"
    console.print(f"  from       {escape(origin)}{' (built in)' if plugin['builtin'] else ''}")
    style = STATUS_STYLE[plugin["status"]]
    console.print(f"  status     [{style}]{plugin['status']}[/]")
    for problem in plugin["problems"]:
        console.print(f"  problem    {escape(problem)}")
    if plugin["hooks"]:
        console.print(f"  hooks      {', '.join(plugin['hooks'])}")
    for selector in plugin["selectors"]:
        console.print(f"  selector   selector={selector['name']}  {escape(selector['about'])}")
        if selector["paper"]:
            console.print(f"  paper      {escape(selector['paper'])}")
        for each in selector["parameters"]:
            shown = f"{each['name']}: {each['type']} = {each['default']!r}"
            console.print(f"  parameter  selector.{escape(shown)}", highlight=False)
            if each["about"]:
                console.print(f"             {escape(each['about'])}", style="dim", highlight=False)
    if plugin["traceback"]:
        console.print(escape(plugin["traceback"]), highlight=False)
