"""What the README tells a reader to write, run as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_five_lines_with_generate(monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra 'hf'")
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    source = next(block for block in blocks("python") if "attach" in block)
    exec(compile(source, "README.md", "exec"), scope)
    try:
        assert scope["out"].shape[1] == scope["prompt"]["input_ids"].shape[1] + 32
        rows = scope["handle"].stats().summary()
        assert [row["layer"] for row in rows] == [2, 3, 4, 5, 6]
        assert all(row["b1_query"]["mean"] < row["b0"]["mean"] < row["seq_len"] for row in rows)
    finally:
        scope["handle"].detach()


def test_the_selector_proposes_what_its_docstring_says():
    from twilight import Budget, Geometry, PagedKVCache

    scope: dict = {}
    source = next(block for block in blocks("python") if "class Newest" in block)
    exec(compile(source, "README.md", "exec", dont_inherit=True), scope)
    cache = PagedKVCache(Geometry(1, 2, 1, 8, dtype=torch.float32), num_rows=2, num_pages=8)
    layer = cache.layers[0]
    keys = torch.randn(2, 40, 1, 8)
    layer.append(keys, keys, [40, 7])
    budget = Budget(torch.tensor([[10], [7]], dtype=torch.int32), capacity=10)
    chosen = scope["Newest"](skip=2).select(torch.randn(2, 2, 8), layer, budget)
    rows = [row[:n].tolist() for row, n in zip(chosen.indices[:, 0], chosen.lengths[:, 0].tolist(), strict=True)]
    assert rows == [list(range(28, 38)), list(range(0, 5))]


def test_files_that_the_readme_points_to_exist():
    targets = re.findall(r"\]\((?!https?://)([^)#]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_the_committed_report_is_what_its_readme_says():
    folder = ROOT / "docs" / "sweep-tiny"
    text = (folder / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (twilight report .*)$", text, flags=re.M)
    assert f"<pre>{command}</pre>" in (folder / "index.html").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\((\S+\.png)\)", text))
    assert shown == {path.name for path in folder.glob("*.png")}
