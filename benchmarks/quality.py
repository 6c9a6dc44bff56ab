"""What a pruning rule costs in quality, and what it reads: rules of every kind on the small model, one table.

    python -m benchmarks.quality --json docs/results/pruning-tiny-8k.json --update docs/pruning.md

Runs anywhere, in torch's reference on a CPU. Rules that the file has already are not run again; `--help` has the sizes.
For every selector a context is read densely once. Then each rule decodes on from there, token by token, through
`TwilightAttention` as it is: 4-bit estimates, the selector's own candidates, the tail from the cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from twilight import BoundedTopP, NoPruning, Pruner, Threshold, TopP
from twilight.evaluation.asking import ask
from twilight.evaluation.corpus import heldout_text
from twilight.evaluation.likelihood import next_token_nll
from twilight.evaluation.session import Session
from twilight.loading import LoadedModel, load_model
from twilight.prompts import Prompt, prompt_with_facts
from twilight.report import versions
from twilight.stats import Record

DENSE, UNPRUNED = "dense", "every candidate"
TAILED = BoundedTopP()
"""What the caches are made for: every rule finds the metadata that it needs, and those without a tail read none."""


def rules() -> Iterator[tuple[str, Pruner | None]]:
    """Yield names and pruners; None for dense attention."""
    yield DENSE, None
    yield UNPRUNED, NoPruning()
    for p in (0.7, 0.85, 0.95, 0.99):
        yield f"top-p {p}", TopP(p)
    for k in (32, 64, 128, 256):
        yield f"top-k {k}", BoundedTopP(0.5, k, k, tail="none")
    for share in (0.01, 0.001):
        yield f"threshold {share} of the largest", Threshold(share)
    for p, least, most in ((0.95, 1, 256), (0.85, 32, None), (0.7, 32, 128), (0.85, 32, 256), (0.95, 32, 256)):
        bounds = (
            f"at least {least}" * (least > 1) + ", " * (least > 1 and most is not None) + f"at most {most}" * bool(most)
        )
        yield f"top-p {p}, {bounds}", BoundedTopP(p, least, most, tail="none")
    for k in (16, 32, 64, 128):
        yield f"top-k {k} + page tail", BoundedTopP(0.5, k, k)
    yield "top-p 0.7 + page tail", BoundedTopP(0.7, 1, None)
    yield "top-p 0.85, at least 16, at most 128 + page tail", BoundedTopP(0.85)
    yield "top-p 0.95, at least 16, at most 128 + page tail", BoundedTopP(0.95)
    yield "top-k 32 + mean tail", BoundedTopP(0.5, 32, 32, tail="mean")
    yield "top-p 0.85, at least 32, at most 256 + mean tail", BoundedTopP(0.85, 32, 256, tail="mean")


@dataclass
class Task:
    """One context, read: how to decode on from it, and where the cache stands.

    Attributes:
        cache: of the handle; its rows hold the context and nothing else between two rules.
        texts: `[windows, context + positions + 1]` tokens, or None for facts.
        prompt: planted facts, or None for text.
    """

    cache: Any
    texts: torch.Tensor | None = None
    prompt: Prompt | None = None


class Bench:
    """A model with one selector attached, and the contexts read.

    Args:
        loaded: the model.
        selector: its name.
        args: sizes; see `main`.
    """

    def __init__(self, loaded: LoadedModel, selector: str, args: argparse.Namespace) -> None:
        from twilight.integrations.transformers import attach

        self.args, self.loaded = args, loaded
        self.handle = attach(loaded.model, selector, pruner=TAILED, budget=args.budget, stats=True)
        self.session = Session(loaded, self.handle)
        self.tasks = [self._text(), *(self._facts(seed) for seed in args.seeds)]

    def _text(self) -> Task:
        a = self.args
        length = a.context + a.positions + 1
        ids = self.loaded.tokenizer(heldout_text(a.windows * length * 8, a.seeds[0]).decode())["input_ids"]
        texts = torch.tensor(ids[: a.windows * length]).view(a.windows, length)
        return Task(self.session.read(texts[:, : a.context]), texts=texts)

    def _facts(self, seed: int) -> Task:
        prompt = prompt_with_facts(self.args.context, self.args.facts, seed, self.loaded.tokenizer)
        return Task(self.session.read(torch.tensor([prompt.context])), prompt=prompt)

    def run(self, pruner: Pruner | None) -> dict[str, Any]:
        """Decode every task by one rule, and return what it cost and read."""
        attention = self.handle.attention
        attention.min_context = 1 << 30 if pruner is None else 0
        attention.pruner = TAILED if pruner is None else pruner
        started = time.perf_counter()
        text, *facts = self.tasks
        with self.handle.stats().aside() as records:
            assert text.texts is not None
            bits = next_token_nll(self.session, text.texts, self.args.context, text.cache) / math.log(2)
        row = summary(records, bits.numel())
        row["bits"] = [round(value, 4) for value in bits.flatten().tolist()]
        with self.handle.stats().aside():
            row["facts"] = sum(self._answers(task) for task in facts)
        row["seconds"] = round(time.perf_counter() - started, 1)
        return row

    def _answers(self, task: Task) -> int:
        """Ask for every fact, and return how many answers are right."""
        prompt = task.prompt
        assert prompt is not None
        said = ask(self.session, task.cache, prompt.questions, prompt.new_tokens)
        texts = [self.loaded.tokenizer.decode(tokens) for tokens in said]
        return sum(text.startswith(answer) for text, answer in zip(texts, prompt.answers, strict=True))


def summary(records: Sequence[Record], tokens: int) -> dict[str, Any]:
    """Return means over the sparse layers: tokens kept and read, and bytes a decoded token, as with a bf16 cache."""

    def mean(name: str) -> float:
        return round(float(torch.cat([getattr(r, name).flatten() for r in records]).double().mean()), 2)

    half = [dataclasses.replace(r, geometry=dataclasses.replace(r.geometry, dtype=torch.bfloat16)) for r in records]
    return {
        "candidates": mean("b0"), "kept": mean("b1_query"), "read": mean("b1_group"), "tail_pages": mean("tail_pages"),
        "mass": mean("mass"), "bytes": round(sum(r.kv_bytes() for r in half) / tokens),
        "dense_bytes": round(sum(r.dense_bytes() for r in half) / tokens),
    }  # fmt: skip


def table(data: dict[str, Any]) -> str:
    """Return the table as markdown: a section a selector, a line a rule."""
    asked = data["settings"]["facts"] * len(data["settings"]["seeds"])
    lines = []
    for selector, rows in data["rows"].items():
        lines += [
            f"| selector `{selector}`, rule | bits per byte | against no pruning | facts of {asked} "
            "| kept | read | tail | KV bytes |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        unpruned = torch.tensor(rows[UNPRUNED]["bits"], dtype=torch.float64)
        for name, row in rows.items():
            bits = torch.tensor(row["bits"], dtype=torch.float64)
            more = bits - unpruned
            error = float(more.std() / len(more) ** 0.5)
            against = "" if name == UNPRUNED else f"{float(more.mean()):+.4f} ± {error:.4f}"
            lines.append(
                f"| {name} | {float(bits.mean()):.4f} | {against} | {row['facts']} "
                f"| {row['kept']:.0f} | {row['read']:.0f} | {row['tail_pages']:.0f} "
                f"| {row['bytes'] / row['dense_bytes']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def save(path: Path, data: dict[str, Any]) -> None:
    """Write results, a rule a line."""
    head = json.dumps({key: value for key, value in data.items() if key != "rows"}, indent=1)[:-2]
    sections = []
    for selector, rows in data["rows"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        sections.append(f"  {json.dumps(selector)}: {{\n{lines}\n  }}")
    path.write_text(f'{head},\n "rows": {{\n' + ",\n".join(sections) + "\n }\n}\n")


def update(path: Path, text: str, mark: str = "quality") -> None:
    """Put the table between the marks of a document."""
    old = path.read_text()
    name = re.escape(mark)
    new, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m: m[1] + text + m[2], old, flags=re.S)
    if not found:
        raise ValueError(f"{path}: no line <!-- {mark} -->, which the table would follow")
    path.write_text(new)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, write it down after every rule, and print the table."""
    parser = argparse.ArgumentParser("quality", description="Pruning rules: quality against bytes read.")
    parser.add_argument("--json", type=Path, required=True, help="results; rules that it has are not run again")
    parser.add_argument("--update", type=Path, help="a document with the marks <!-- MARK --> and <!-- /MARK -->")
    parser.add_argument("--mark", default="quality", help="of the table in that document (default: quality)")
    parser.add_argument("--model", default=None, help="folder or hub name (default: examples/tiny)")
    parser.add_argument("--selectors", nargs="+", default=["quest", "full"])
    parser.add_argument("--rules", default="", help="only rules whose name matches this expression")
    parser.add_argument("--context", type=int, default=8192, help="tokens that are read densely")
    parser.add_argument("--windows", type=int, default=4, help="texts")
    parser.add_argument("--positions", type=int, default=128, help="tokens decoded of each text")
    parser.add_argument("--facts", type=int, default=8, help="planted in a context, and asked for")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="a context with facts for each; the first orders the text"
    )
    parser.add_argument("--budget", type=float, default=0.25, help="candidates, as a share of the length")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # tensors of a step are small: threads wait for each other, and for whoever else runs
    loaded = load_model("tiny" if args.model is None else "hf", args.model)
    settings = {
        key: value for key, value in vars(args).items() if key not in ("json", "update", "mark", "selectors", "rules")
    }
    head = {
        "settings": settings,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }
    data: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {**head, "rows": {}}
    if data["settings"] != settings:
        print(f"error: {args.json} holds results of other settings: {data['settings']}", file=sys.stderr)
        return 1
    for selector in args.selectors:
        rows = data["rows"].setdefault(selector, {})
        missing = [(name, rule) for name, rule in rules() if name not in rows and re.search(args.rules, name)]
        if not missing:
            continue
        bench = Bench(loaded, selector, args)
        for name, rule in missing:
            rows[name] = bench.run(rule)
            print(f"{selector}, {name}: {rows[name]['seconds']} s", file=sys.stderr, flush=True)
            save(args.json, data)
        bench.handle.detach()
    text = table(data)
    print(text)
    if args.update:
        update(args.update, text, args.mark)
    return 0


if __name__ == "__main__":
    sys.exit(main())
