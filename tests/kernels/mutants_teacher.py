"""Faults of the teacher's kernels, for mutants.py."""

from __future__ import annotations

from tests.kernels.mutant import Mutant

TEACHER = "teacher_[ks]*.py"

OF_THE_TEACHER = [
    Mutant(
        "teacher: a row's offset has 32 bits in the selection",
        TEACHER,
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        seen_by="teacher: rows far apart",
    ),
    Mutant(
        "teacher: a row's offset has 32 bits",
        TEACHER,
        "row = (program // parts).to(tl.int64)",
        "row = program // parts",
        seen_by="teacher: rows far apart",
    ),
    Mutant(
        "teacher: equal ids from the highest down",
        TEACHER,
        "(j[None, :] < i[:, None])",
        "(j[None, :] > i[:, None])",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: -0.0 below 0.0",
        TEACHER,
        "bits = tl.where(z == 0.0, 0, bits)",
        "bits = bits + 0",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: no excluded mass",
        TEACHER,
        "for start in range(V, head, BX):",
        "for start in range(V, V, BX):",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: excluded mass from one id too low",
        TEACHER,
        "for start in range(V, head, BX):",
        "for start in range(V - 1, head, BX):",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: the moment is not shifted",
        TEACHER,
        "mask=inside, other=0.0) + gap * sums",
        "mask=inside, other=0.0)",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: a temperature of the one before",
        TEACHER,
        "factor = tl.load(inv_ptr + number) * _LOG2E",
        "factor = tl.load(inv_ptr + number - 1) * _LOG2E",
        seen_by="teacher: ids and figures",
    ),
    Mutant(
        "teacher: the label is not counted in its own tile",
        TEACHER,
        "tl.where(valid, above + ties, 255)",
        "tl.where(valid, above, 255)",
        seen_by="teacher: ids and figures",
    ),
]
