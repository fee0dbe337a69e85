"""Flags made from a tree mean what the same line in a file means, and the help lists every key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from potstill.common.config import ConfigError, StrictModel
from potstill.common.options import add_config_options, list_keys, read_config, type_word


class Fixed(StrictModel):
    kind: Literal["fixed"] = Field("fixed", description="Constant.")
    value: float = Field(description="The value.")


class Item(StrictModel):
    alpha: float | Fixed = Field(1.0, description="Weight.")
    steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Length.")


class Inner(StrictModel):
    rate: float = Field(0.5, ge=0, le=1, description="A rate of 50% is common.")


class Tree(StrictModel):
    input: list[str] = Field(description="Files.")
    output: Path = Field(description="Folder.")
    row_length: int = Field(512, ge=2, description="Tokens per row.")
    field: str = Field("text", description="Name of the field.")
    mode: Literal["a", "b"] = Field("a", description="Way.")
    deep: bool = Field(False, description="More.")
    temperatures: tuple[float, ...] = Field((), description="Besides 1.")
    inner: Inner = Field(default_factory=Inner, description="A group.")
    stages: tuple[Item, ...] = Field((Item(),), description="Stages.")
    named: dict[str, Path] = Field(default_factory=dict, description="Stores by name.")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_options(made, Tree, flags={"--rate": "inner.rate"})
    return made


def read(*words: str) -> Tree:
    return read_config(Tree, parser().parse_args(words))


def test_flags_become_the_tree() -> None:
    tree = read(
        "--input", "a: b", "c.txt", "--output", "o", "--row-length", "64", "--rate", "0.25", "--deep", "--mode", "b"
    )
    assert tree == Tree(
        input=["a: b", "c.txt"], output=Path("o"), row_length=64, inner=Inner(rate=0.25), deep=True, mode="b"
    )


@pytest.mark.parametrize("word", ["null", "yes", "1e3", "{a: b}", "- x", "'q", "# no", "ü\\n", "7"])
def test_text_is_never_read_as_yaml(word: str) -> None:
    assert read(f"--input={word}", "--output", "o", f"--field={word}").field == word
    assert read(f"--input={word}", "--output", "o").input == [word]


def test_order_of_the_command_line_decides() -> None:
    base = ("--input", "a", "--output", "o")
    assert read(*base, "--row-length", "4", "--set", "row_length=8").row_length == 8
    assert read(*base, "--set", "row_length=8", "--row-length", "4").row_length == 4
    assert read(*base, "--deep", "--no-deep").deep is False


def test_flags_come_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("input: [x]\noutput: y\nrow_length: 16\n")
    tree = read("--config", str(tmp_path / "c.yaml"), "--row-length", "32", "--set", "stages=[{alpha: 0}]", "named.a=b")
    assert (tree.input, tree.row_length, tree.stages[0].alpha, tree.named) == (["x"], 32, 0.0, {"a": Path("b")})


def test_lists_of_numbers() -> None:
    assert read("--input", "a", "--output", "o", "--temperatures", "2", "4").temperatures == (2.0, 4.0)


def test_a_list_flag_that_comes_again_adds_to_the_list() -> None:
    assert read("--input", "a", "--output", "o", "--input", "b", "null", "--input=c: d").input == [
        "a",
        "b",
        "null",
        "c: d",
    ]
    assert read("--input=a", "--output", "o", "--temperatures", "2", "--temperatures", "4").temperatures == (2.0, 4.0)
    # What the line gives of a key adds up whoever gives it; --set replaces, and one that cannot be read is refused.
    assert read("--output", "o", "--set", "input=[a]", "--input", "b").input == ["a", "b"]
    assert read("--output", "o", "--input", "b", "--set", "input=[a]").input == ["a"]
    with pytest.raises(ConfigError, match="override input is not valid YAML"):
        read("--output", "o", "--set", "input=[a", "--input", "b")


def test_a_list_flag_replaces_the_list_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("input: [x]\noutput: y\n")
    assert read("--config", str(tmp_path / "c.yaml"), "--input", "a", "--input", "b").input == ["a", "b"]


def test_wrong_type_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--input", "a", "--output", "o", "--row-length", "many")
    assert caught.value.code == 2
    assert "--row-length" in capsys.readouterr().err


def test_bounds_are_checked_by_the_tree() -> None:
    with pytest.raises(ConfigError, match="row_length: Input should be greater than or equal to 2"):
        read("--input", "a", "--output", "o", "--row-length", "1")


def test_help_lists_every_key_with_type_default_and_text() -> None:
    text = parser().format_help()
    for key in list_keys(Tree):
        assert key.path in text
    assert "row_length (int, default 512)" in text
    assert "output (path, needed)" in text
    assert "mode (a|b, default a)" in text
    assert "stages.N.alpha" in text
    assert "A rate of 50% is common." in text


def test_keys_inside_lists_unions_and_groups() -> None:
    paths = [key.path for key in list_keys(Tree)]
    assert {"inner.rate", "stages.N.steps", "stages.N.alpha", "named"} <= set(paths)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "int"),
        (str | None, "text or null"),
        (Literal["auto", "never"] | Path, "auto|never or path"),
        (tuple[float, ...], "list of number"),
        (dict[str, int], "mapping"),
        (float | Fixed, "number or {kind: fixed, value}"),
        (Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0)], "int or number"),
    ],
)
def test_type_words(annotation: object, words: str) -> None:
    assert type_word(annotation) == words
