"""How an answer is graded against its reference, 0 to 1. A new grader is a function that makes it and an entry.

Graders see text: what a rollout decodes, or, where a store has no tokenizer, its ids as words between spaces. The
configuration reads the table, so nothing heavy is imported with it.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from potstill.common.config import StrictModel
from potstill.common.errors import UserError
from potstill.common.named_entries import NameIn

Grader = Callable[[str, str], float]  # (answer, reference) -> grade in [0, 1]
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, kw_only=True)
class GraderEntry:
    """make: the grader of these settings; reads: which of their keys it takes, all of them needed but `reference`.

    threshold: the grade from which on an answer counts as passed, where the settings do not say.
    """

    make: Callable[[GraderConfig], Grader]
    description: str
    reads: tuple[str, ...] = ()
    threshold: float = 1.0


def _exact(config: GraderConfig) -> Grader:
    """1 where both texts are equal, white space at their ends apart."""
    return lambda answer, reference: float(answer.strip() == reference.strip())


def _regex(config: GraderConfig) -> Grader:
    """1 where what the pattern finds last in the answer equals what it finds in the reference (or all of that)."""
    pattern = re.compile(config.pattern or "")
    name = config.pattern

    def last(text: str) -> str | None:
        found = None
        for match in pattern.finditer(text):
            # `[0-9]*` matches the empty end of every text; a group may take no part. Neither has found anything.
            group = match.group(1 if pattern.groups else 0)
            if group is not None and (match.group(0) or group):
                found = group
        return None if found is None else found.strip()

    def grade(answer: str, reference: str) -> float:
        wanted = reference.strip() if config.reference == "whole" else last(reference)
        if wanted is None:
            raise UserError(
                f"grader.pattern {name!r} finds nothing in the reference {_short(reference)}; expected a match in "
                "each: correct the pattern, or set grader.reference=whole where references are the bare results"
            )
        return float(last(answer) == wanted)

    return grade


def _rouge_l(config: GraderConfig) -> Grader:
    """See `rouge_l`."""
    return rouge_l


def _function(config: GraderConfig) -> Grader:
    """What a function of the user says, `module:function(answer, reference) -> float or bool`."""
    name = str(config.function)
    function = load_function(name)

    def grade(answer: str, reference: str) -> float:
        where = f"grader.function {name}({_short(answer)}, {_short(reference)})"
        try:
            value = function(answer, reference)
        except Exception as error:  # the user's own code may raise anything
            raise UserError(f"{where} raised {type(error).__name__}: {error}; expected a grade in [0, 1]") from error
        number = _as_number(value)
        if not 0.0 <= number <= 1.0:
            raise UserError(f"{where} gave {value!r}; expected True, False or a number in [0, 1]")
        return number

    return grade


GRADERS: dict[str, GraderEntry] = {
    "exact": GraderEntry(make=_exact, description="the texts are equal"),
    "regex": GraderEntry(make=_regex, description="what `pattern` finds last is equal", reads=("pattern", "reference")),
    "rouge_l": GraderEntry(make=_rouge_l, description="ROUGE-L, F-measure", threshold=0.5),
    "function": GraderEntry(make=_function, description="a function of yours", reads=("function",)),
}


class GraderConfig(StrictModel):
    """How answers are graded, and from which grade on they count as passed."""

    kind: Annotated[str, NameIn(GRADERS)] = Field(
        default="exact", description="; ".join(f"{name}: {entry.description}" for name, entry in GRADERS.items())
    )
    pattern: str | None = Field(
        default=None, min_length=1, description="regex: Python pattern; its first group counts, if it has one"
    )
    reference: Literal["extract", "whole"] = Field(
        default="extract", description="regex: look for the pattern in the reference as well, or take all of it"
    )
    function: str | None = Field(
        default=None, description="function: module:function, called with (answer, reference), gives 0 to 1"
    )
    threshold: float | None = Field(
        default=None, gt=0, le=1, description="Grade from which on an answer passed; None: 1, and 0.5 for rouge_l"
    )

    @property
    def passing(self) -> float:
        """The grade from which on an answer counts as passed."""
        return GRADERS[self.kind].threshold if self.threshold is None else self.threshold

    def make(self) -> Grader:
        """The grader. Raises UserError where the user's function cannot be found."""
        return GRADERS[self.kind].make(self)

    @model_validator(mode="after")
    def _keys_of_the_kind(self) -> GraderConfig:
        reads = GRADERS[self.kind].reads
        for key in ("pattern", "function"):
            if key in reads and getattr(self, key) is None:
                raise ValueError(f"grader {self.kind} needs {key}; name it")
            if key not in reads and getattr(self, key) is not None:
                raise ValueError(f"{key} is not of grader {self.kind}; leave it out, or take grader.kind={_of(key)}")
        if self.reference != "extract" and "reference" not in reads:
            raise ValueError(f"reference is not of grader {self.kind}; leave it out")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern {self.pattern!r} is no regular expression: {error}") from None
        if self.function is not None and not re.fullmatch(r"[\w.]+:\w+", self.function):
            raise ValueError(f"function is {self.function!r}; expected module:function")
        return self


def _of(key: str) -> str:
    return next(name for name, entry in GRADERS.items() if key in entry.reads)


def _as_number(value: Any) -> float:
    """A grade of NumPy is a number as well, and bool is one in Python; NaN for what is none, as an array of several."""
    try:
        return float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def load_function(name: str) -> Callable[[str, str], Any]:
    """The function `module:function`, from where Python looks for modules. Raises UserError."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's own module may raise anything
        raise UserError(
            f"grader.function {name}: module {module_name} cannot be imported ({type(error).__name__}: {error}); name "
            "one that Python finds from here (PYTHONPATH), as module:function"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        raise UserError(
            f"grader.function {name}: {module_name} ({module.__file__}) has no function {function_name}; correct it"
        )
    return found


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence of words.

    Words are as in Google's rouge_score without stemming: letters and digits in lower case, all else separates them
    (letters of every script count here, not only a to z). 0 where either text has none, as there.
    """
    mine, wanted = (_WORD.findall(text.lower()) for text in (answer, reference))
    if not mine or not wanted:
        return 0.0
    common = common_subsequence(mine, wanted)
    return 2.0 * common / (len(mine) + len(wanted))  # 2pr / (p + r) with p = c / |mine|, r = c / |wanted|


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a word of bits at a time (Hyyrö 2004, after Crochemore et al. 2001)."""
    places: dict[str, int] = {}
    for number, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << number
    whole = (1 << len(one)) - 1
    open_places = whole
    for word in other:
        hits = open_places & places.get(word, 0)
        open_places = ((open_places + hits) | (open_places - hits)) & whole
    return len(one) - open_places.bit_count()


def _short(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[: most - 3] + "...")
