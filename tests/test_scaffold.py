"""`twilight plugins new`: what it writes, and the names that it refuses."""

from __future__ import annotations

import pytest

from twilight import cli, scaffold


@pytest.mark.parametrize(
    ("name", "folder", "module", "cls"),
    [
        ("my-selector", "my-selector", "my_selector", "MySelector"),
        ("MyTopPages", "my-top-pages", "my_top_pages", "MyTopPages"),
        ("top k_2.pages", "top-k-2-pages", "top_k_2_pages", "TopK2Pages"),
    ],
)
def test_names_are_made_of_what_was_written(name, folder, module, cls, tmp_path):
    assert scaffold.new(name, tmp_path) == tmp_path / folder
    assert f"class {cls}(Selector):" in (tmp_path / folder / module / "selector.py").read_text()
    written = {path.relative_to(tmp_path / folder).as_posix() for path in (tmp_path / folder).rglob("*.*")}
    assert f"{module}/conf/selector/{module}_wide.yaml" in written
    assert f"tests/test_{module}.py" in written
    for path in (tmp_path / folder).rglob("*.py"):
        compile(path.read_text(), str(path), "exec")
    # Every name has been put in.
    assert not any("$" in path.read_text() for path in (tmp_path / folder).rglob("*.*"))
    assert f'\n{module} = "{module}.plugin"\n' in (tmp_path / folder / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "expected letters, digits and dashes"),
        ("---", "expected letters, digits and dashes"),
        ("../up", "expected letters, digits and dashes"),
        ('a"b', "expected letters, digits and dashes"),
        ("wähler", "expected letters, digits and dashes"),
        ("3pages", "'3pages' does not begin with a letter.*try my-3pages"),
        ("class", "'class' is a word of Python's.*try my-class"),
        ("quest", "selector 'quest' is installed already, by twilight-attn"),
        ("json", "there is a module 'json'.*try json-selector"),
        ("torch", "there is a module 'torch'"),
        ("selector", "the class would be called Selector, as twilight's own"),
    ],
)
def test_names_that_no_package_can_have_are_refused(name, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        scaffold.new(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    assert cli.main(["plugins", "new", "mine", "--dir", str(tmp_path)]) == 1
    assert "is there already; nothing has been written" in capsys.readouterr().err
    assert list((tmp_path / "mine").iterdir()) == []
    assert cli.main(["plugins", "new", "mine", "--dir", str(tmp_path / "no")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_the_command_says_what_to_run_next(tmp_path, capsys):
    assert cli.main(["plugins", "new", "Mine", "--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"pip install -e '{tmp_path / 'mine'}[test]'" in said
    assert "twilight plugins check mine" in said


def test_the_selector_is_about_fifty_lines(tmp_path):
    folder = scaffold.new("mine", tmp_path)
    assert len((folder / "mine" / "selector.py").read_text().splitlines()) <= 60
