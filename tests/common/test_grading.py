"""Graders: known grades, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from potstill.common.errors import UserError
from potstill.common.grading import GRADERS, GraderConfig, common_subsequence, rouge_l


def grade(answer: str, reference: str, /, **settings: object) -> float:
    return GraderConfig.model_validate(settings).make()(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("the cat sat", "the cat sat", 1.0),
        # Lin 2004: "police killed the gunman" against "police kill the gunman": 3 of 4 words in order.
        ("police kill the gunman", "police killed the gunman", 0.75),
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("The CAT, sat!", "the cat sat", 1.0),
        ("a b c d", "a c", 2 * 2 / (4 + 2)),
        ("", "a", 0.0),
        ("", "", 0.0),
        ("...", "a", 0.0),
        ("a_b", "a b", 1.0),
        ("酒 é", "é 酒", 0.5),
    ],
)
def test_rouge_l(answer: str, reference: str, wanted: float) -> None:
    assert rouge_l(answer, reference) == pytest.approx(wanted)
    assert grade(answer, reference, kind="rouge_l") == pytest.approx(wanted)


words = st.lists(st.sampled_from("abcd"), max_size=70)


@given(one=words, other=words)
@settings(max_examples=150, deadline=None)
def test_the_longest_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    """Against the plain dynamic programme; more than 64 words need more than one word of the machine."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = lengths.copy()
        for number, mine in enumerate(other, start=1):
            lengths[number] = before[number - 1] + 1 if word == mine else max(before[number], lengths[number - 1])
    assert common_subsequence(one, other) == lengths[-1]


def test_exact_and_regex() -> None:
    assert grade(" 42\n", "42") == 1.0 and grade("42", "43") == 0.0 and grade("4 2", "42") == 0.0
    pattern = r"#### (-?\d+)"
    assert grade("so 6 * 7\n#### 41, no: #### 42", "it is #### 42", kind="regex", pattern=pattern) == 1.0
    assert grade("#### 42", "42 ", kind="regex", pattern=pattern, reference="whole") == 1.0
    assert grade("42", "#### 42", kind="regex", pattern=pattern) == 0.0
    assert grade("x7 y8", "z8", kind="regex", pattern=r"\d") == 1.0  # without a group the whole match counts
    with pytest.raises(UserError, match=r"grader.pattern '.*' finds nothing in the reference 'it is 42'.*=whole"):
        grade("#### 42", "it is 42", kind="regex", pattern=pattern)


def test_a_pattern_that_matches_nothing_at_all_has_not_found_it() -> None:
    """`[0-9]*` matches the empty end of any text: it must not make every answer right."""
    for pattern in (r"([0-9]*)", r"[0-9]*", r"x?\s*"):
        assert grade("it is x 5", "it is x 5", kind="regex", pattern=pattern) == 1.0
    assert grade("it is 5", "it is 7", kind="regex", pattern=r"([0-9]*)") == 0.0
    assert grade("none", "7", kind="regex", pattern=r"([0-9]*)") == 0.0
    # A group that took no part says nothing of either text.
    assert grade("b=3", "a=4", kind="regex", pattern=r"a=(\d)|b=(\d)") == 0.0
    with pytest.raises(UserError, match="finds nothing in the reference"):
        grade("b=3", "b=4", kind="regex", pattern=r"a=(\d)|b=(\d)")
    assert grade("#### ", "#### ", kind="regex", pattern=r"####\s*(\d*)") == 1.0


def half(answer: str, reference: str) -> float:
    return 0.5


def equal(answer: str, reference: str) -> bool:
    return answer == reference


def two(answer: str, reference: str) -> int:
    return 2


def fails(answer: str, reference: str) -> float:
    raise KeyError("field")


def several(answer: str, reference: str) -> np.ndarray:
    return np.ones(2)


HERE = "tests.common.test_grading"


def test_a_function_of_the_user() -> None:
    assert grade("a", "b", kind="function", function=f"{HERE}:half") == 0.5
    assert grade("a", "a", kind="function", function=f"{HERE}:equal") == 1.0
    for name, message in (
        ("two", r"test_grading:two\('a', 'b'\) gave 2; expected True, False or a number in \[0, 1\]"),
        ("several", r"test_grading:several\('a', 'b'\) gave array\(\[1., 1.\]\); expected True, False or a number"),
        ("fails", r"test_grading:fails\('a', 'b'\) raised KeyError: 'field'"),
        ("HERE", r"test_grading.py\) has no function HERE"),
        ("nobody", "has no function nobody"),
    ):
        with pytest.raises(UserError, match=message):
            grade("a", "b", kind="function", function=f"{HERE}:{name}")
    with pytest.raises(UserError, match="module no_such_module cannot be imported"):
        grade("a", "b", kind="function", function="no_such_module:grade")


def test_a_module_that_does_not_parse_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unfinished_grader.py").write_text("def grade(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"module unfinished_grader cannot be imported .*invalid syntax"):
        grade("a", "b", kind="function", function="unfinished_grader:grade")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bleu"}, "Input should be 'exact', 'regex', 'rouge_l' or 'function'"),
        ({"kind": "regex"}, "grader regex needs pattern"),
        ({"kind": "regex", "pattern": "("}, "is no regular expression"),
        ({"kind": "function", "function": "grade"}, "expected module:function"),
        ({"pattern": "a"}, "pattern is not of grader exact; leave it out, or take grader.kind=regex"),
        ({"reference": "whole"}, "reference is not of grader exact"),
        ({"threshold": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GraderConfig.model_validate(settings)


def test_each_grader_has_a_threshold() -> None:
    assert {name: GRADERS[name].threshold for name in GRADERS} == {
        "exact": 1.0,
        "regex": 1.0,
        "rouge_l": 0.5,
        "function": 1.0,
    }
    assert GraderConfig(kind="rouge_l").passing == 0.5 and GraderConfig(kind="rouge_l", threshold=0.2).passing == 0.2
