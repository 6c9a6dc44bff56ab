"""``twilight plugins check``: the conformance suite on the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape

from twilight.errors import unknown_name
from twilight.testing.cases import CASES
from twilight.testing.suite import Outcome, run_suite

_STYLE = {"passed": "green", "failed": "red", "skipped": "dim"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument("target", metavar="NAME|MODULE[:CLASS]", help="what is installed, or a module that has one")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="the selector's own, such as recent=4")
    parser.add_argument("--case", nargs="+", default=[], metavar="CASE", help=f"only these of {', '.join(CASES)}")
    parser.add_argument("--kv-heads", type=int, default=2, help="of the caches it is tried on (default 2)")
    parser.add_argument("--head-dim", type=int, default=64, help="(default 64)")
    parser.add_argument("--layers", type=int, default=2, help="(default 2)")
    parser.add_argument("--page-size", type=int, default=16, help="(default 16)")
    parser.add_argument("--json", action="store_true", help="as data")


def main(args: argparse.Namespace) -> int:
    """Run the suite, print what became of each case, and return the exit status: 1 if one failed."""
    for case in args.case:
        if case not in CASES:
            raise unknown_name("case", case, list(CASES), see="twilight plugins check --help")
    # Last, as `python -m` would have it first: a module beside the user must not hide a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    geometry = {
        "num_kv_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "num_layers": args.layers,
        "page_size": args.page_size,
    }
    console = Console(soft_wrap=True, highlight=False)

    def tell(outcome: Outcome) -> None:
        style = _STYLE[outcome.status]
        console.print(f"[{style}]{outcome.status:<7}[/]  [bold]{outcome.case:<8}[/]  {escape(outcome.about)}")
        for line in outcome.detail.splitlines():
            console.print(f"                   [{style}]{escape(line)}[/]")

    report = run_suite(
        args.target, geometry=geometry, options=_options(args.options), cases=args.case,
        tell=(lambda outcome: None) if args.json else tell,
    )  # fmt: skip
    if args.json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        count = {status: sum(each.status == status for each in report.outcomes) for status in _STYLE}
        console.print(f"selector '{report.name}': " + ", ".join(f"{n} {status}" for status, n in count.items() if n))
    return 1 if report.failures else 0


def _options(words: list[str]) -> Mapping[str, Any]:
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word}: expected OPTION=VALUE, such as recent=4")
    values = OmegaConf.to_container(OmegaConf.from_dotlist(words))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
