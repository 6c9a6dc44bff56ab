"""The split of Python source: by name, the same everywhere, and nothing of one side in the other."""

from __future__ import annotations

import pytest

from twilight.evaluation import corpus


def test_the_split_is_by_name_and_about_a_twentieth() -> None:
    names = [f"package/module_{number}.py" for number in range(4000)]
    held = sum(map(corpus.is_heldout, names))
    assert 150 < held < 250
    # Fixed names: a change of the rule would put trained text into the held-out side.
    assert all(map(corpus.is_heldout, ("copyreg.py", "concurrent/futures/process.py", "email/__init__.py")))
    assert not any(map(corpus.is_heldout, ("asyncio/events.py", "json/decoder.py", "ast.py", "typing.py")))


def test_files_of_both_sides_are_all_there_once(tmp_path) -> None:
    body = "x = 1\n" * 100
    for name in ("a.py", "sub/b.py", "sub/c.txt", "site-packages/d.py", "__pycache__/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    (tmp_path / "small.py").write_text("x")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9" * 200)
    found = [corpus.source_files(split, [tmp_path]) for split in ("train", "heldout")]
    assert sorted(file.name for side in found for file in side) == ["a.py", "sub/b.py"]
    assert all(corpus.is_heldout(file.name) for file in found[1])
    with pytest.raises(ValueError, match="split: expected 'train' or 'heldout', got 'test'"):
        corpus.source_files("test")  # type: ignore[arg-type]


def test_heldout_text_is_exact_repeatable_and_held_out() -> None:
    text = corpus.heldout_text(30_000, seed=3)
    assert len(text) == 30_000 and text == corpus.heldout_text(30_000, seed=3) != corpus.heldout_text(30_000, seed=4)
    headers = [line.removeprefix("# file: ") for line in text.decode().split("\n") if line.startswith("# file: ")]
    assert headers and all(map(corpus.is_heldout, headers))
    with pytest.raises(ValueError, match="num_bytes: expected at least 1, got 0"):
        corpus.heldout_text(0)
    with pytest.raises(ValueError, match="held-out files hold"):
        corpus.heldout_text(10**12)


def test_a_character_cut_in_two_becomes_spaces() -> None:
    assert corpus.cut("aé".encode(), 2) == b"a "
    assert corpus.cut("aé".encode(), 3) == "aé".encode()
