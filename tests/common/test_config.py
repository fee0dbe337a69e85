"""Configuration trees: what is read is what was written, and a mistake is named with its place and its cure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from potstill.common.config import ConfigError, StrictModel, build_config, dump_config, key_lines, load_config


class Optimizer(StrictModel):
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW.")


class Stage(StrictModel):
    alpha: float = Field(default=0.5, ge=0, le=1, description="Share of the teacher.")
    steps: int | None = Field(default=None, description="Length.")


class Run(StrictModel):
    name: str = Field(description="Name of the run.")
    optimizer: Optimizer = Field(default=Optimizer(), description="Optimizer.")
    stages: list[Stage] = Field(default=[Stage()], description="Curriculum.")
    extra: dict[str, Any] = Field(default={}, description="Free keys.")


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("3E-4", 3e-4), ("1.5e3", 1500.0), (".5e-1", 0.05), ("+1e0", 1.0), ("0.25", 0.25), ("2", 2.0)],
)
def test_floats_without_a_dot_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    run = load_config(Run, write(tmp_path, f"name: a\noptimizer: {{lr: {text}}}\n"))
    assert run.optimizer.lr == value
    assert load_config(Run, None, ["name=a", f"optimizer.lr={text}"]).optimizer.lr == value


def test_words_that_look_like_exponents_stay_words(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "name: e5\n")).name == "e5"
    assert load_config(Run, write(tmp_path, "name: 1e\n")).name == "1e"


def test_unknown_key_names_the_nearest_and_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\noptimizer:\n  betas: [0.9, 0.95]\n  learnrate: 1\n  l: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    message = str(caught.value)
    assert str(path) in message
    assert "line 4: optimizer.learnrate: unknown key" in message
    assert "line 5: optimizer.l: unknown key; did you mean 'lr'?" in message


def test_unknown_key_in_a_list_item(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nstages:\n- alpha: 1\n- alpah: 0\n")
    with pytest.raises(ConfigError, match=r"line 4: stages\.1\.alpah: unknown key; did you mean 'alpha'\?"):
        load_config(Run, path)


def test_unknown_key_with_no_near_one_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known keys: extra, name, optimizer, stages"):
        load_config(Run, write(tmp_path, "name: a\nzzzz: 1\n"))


def test_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\noptimizer:\n  lr: 1\n  lr: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 4: key 'lr' .*first on line 3"):
        load_config(Run, path)


def test_unhashable_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be a key"):
        load_config(Run, write(tmp_path, "? [a, b]\n: 1\n"))


def test_overrides_come_last_and_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\noptimizer: {lr: 1}\nstages: [{alpha: 1}, {alpha: 0.5}]\n")
    run = load_config(Run, path, ["optimizer.lr=2", "optimizer.lr=3e-4", "stages.1.alpha=0", "extra.x=[1,b]"])
    assert run.optimizer.lr == 3e-4
    assert [stage.alpha for stage in run.stages] == [1.0, 0.0]
    assert run.extra == {"x": [1, "b"]}


def test_override_into_an_empty_group(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "name: a\noptimizer:\n"), ["optimizer.lr=2"]).optimizer.lr == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("optimizer..lr=3", "expected key=value"),
        ("name.first=x", "name is 'a', not a group of keys"),
        ("stages.7.alpha=0", "expected an item number below 1, found '7'"),
        ("stages.last.alpha=0", "found 'last'"),
        ("optimizer.lr=[", "override optimizer.lr is not valid YAML"),
    ],
)
def test_bad_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, "name: a\nstages: [{alpha: 1}]\n"), [override])
    assert message in str(caught.value)


def test_line_of_an_overridden_value_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, "name: a\noptimizer: {lr: 1}\n"), ["optimizer.lr=-1"])
    assert "optimizer.lr: Input should be greater than 0 (found -1)" in str(caught.value)
    assert "line 2" not in str(caught.value)


def test_missing_key_and_wrong_type_are_all_listed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, write(tmp_path, "optimizer: {lr: fast}\n"))
    message = str(caught.value)
    assert "2 problem(s)" in message
    assert "name: this key is needed and missing" in message
    assert "line 1: optimizer.lr:" in message
    assert "(found 'fast')" in message


@pytest.mark.parametrize(("text", "message"), [("- a\n", "found list"), ("a: [1\n", "not valid YAML")])
def test_file_that_is_no_tree(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(Run, write(tmp_path, text))


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml cannot be read"):
        load_config(Run, tmp_path / "absent.yaml")


def test_empty_file_is_an_empty_tree(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "# nothing\n"), ["name=b"]).name == "b"


def test_a_written_tree_is_read_back_equal(tmp_path: Path) -> None:
    run = build_config(Run, {"name": "é: [x]", "optimizer": {"lr": 1e-4}, "stages": [{}, {"steps": 3}]}, source="test")
    assert load_config(Run, write(tmp_path, dump_config(run))) == run


def test_trees_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        build_config(Run, {"name": "a"}, source="test").name = "b"


def test_key_lines_of_nested_text() -> None:
    lines = key_lines("a:\n  b: 1\nc:\n- d: 2\n- 3\n")
    assert lines == {("a",): 1, ("a", "b"): 2, ("c",): 3, ("c", 0): 4, ("c", 0, "d"): 4, ("c", 1): 5}
