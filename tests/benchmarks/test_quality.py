"""Quality of pruning rules: the tables of the documentation are those of the results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from twilight.benchmarks import quality

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("results", "mark"), [("pruning-tiny-8k.json", "quality"), ("pruning-larger-8k.json", "quality larger")]
)
def test_the_document_holds_what_the_results_say(results, mark, tmp_path):
    document = Path(shutil.copy(ROOT / "docs" / "pruning.md", tmp_path))
    data = json.loads((ROOT / "docs" / "results" / results).read_text())
    quality.update(document, quality.table(data), mark)
    assert document.read_text() == (ROOT / "docs" / "pruning.md").read_text()


def test_each_mark_has_its_own_table(tmp_path):
    document = tmp_path / "x.md"
    document.write_text(
        "<!-- quality -->\na\n<!-- /quality -->\n<!-- quality larger -->\nb\n<!-- /quality larger -->\n"
    )
    quality.update(document, "new\n", "quality larger")
    assert document.read_text() == (
        "<!-- quality -->\na\n<!-- /quality -->\n<!-- quality larger -->\nnew\n<!-- /quality larger -->\n"
    )
    with pytest.raises(ValueError, match="no line <!-- other -->"):
        quality.update(document, "new\n", "other")
