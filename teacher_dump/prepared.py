"""The stores that `prepare` writes: each begins with its first unit, so that a run that fails before leaves nothing."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from potstill.common.errors import UserError
from potstill.storage import MismatchError, RunSpec, StoreReader, StoreWriter, TokensRow, discard_unused, seal_store
from potstill.teacher_dump.conflict import conflict_text
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.packing.base import (
    JUDGED,
    LOST_TOKENS,
    TOO_LONG,
    TRAINED,
    UNTRAINED,
    Cursor,
    Ids,
    Mask,
    PackedRow,
    Packer,
    PackerStart,
)
from potstill.teacher_dump.packing.table import PACKINGS

MASK_COLUMN = "mask"
_JUDGED_AT_LEAST = 1000  # before a share is believed while a run is under way


@dataclass(frozen=True)
class StoreSummary:
    """What one store holds; `counts` as the packing rule names them (see packing/base.py)."""

    path: Path | str
    documents: int
    rows: int
    tokens: int
    row_length: int
    counts: Mapping[str, int] = field(default_factory=dict)
    judged: str = "rows"

    @property
    def padding(self) -> float:
        """Share of rows of full length that no token fills."""
        return 1.0 - self.tokens / max(1, self.rows * self.row_length)

    def format(self) -> list[str]:
        """Lines for a person."""
        name = str(self.path).rsplit("/", 1)[-1]
        line = f"{name}: {self.documents} documents, {self.tokens} tokens in {self.rows} rows of {self.row_length}"
        lines = [f"{line} -> {self.path}"]
        counts = self.counts
        if TOO_LONG in counts:
            text = f"{name}: {self.padding:.2%} of the rows is padding, which is stored nowhere"
            if counts[TOO_LONG]:
                text += (
                    f"; {counts[TOO_LONG]} documents above {self.row_length} tokens, {counts[LOST_TOKENS]} tokens lost"
                )
            lines.append(text)
        if TRAINED in counts:
            share = counts[TRAINED] / max(1, self.tokens)
            text = f"{name}: {counts[TRAINED]} tokens are trained on ({share:.1%})"
            if counts[UNTRAINED]:
                text += f"; {counts[UNTRAINED]} of {counts[JUDGED]} {self.judged} without one are left out"
            lines.append(text)
        return lines


class Output:
    """One tokens store being written: packs documents, commits whole units, continues where an earlier run ended.

    Nothing is written before the first unit is whole. The tokenizer is placed then, ahead of the store, and nothing of
    either is left if that unit cannot be committed. `force` deletes another store at that moment, not before.

    `packing` is a rule of PACKINGS, with its `window` and `too_long`; `parts` is that of PackerStart. Documents may
    have masks where the spec's columns name `mask`. The order of calls: `add` for what it `wants`, `close`, `finish`,
    `seal`.
    """

    def __init__(
        self,
        path: Path | str,
        spec: RunSpec,
        *,
        force: bool,
        tokenizer: KeptTokenizer | None = None,
        packing: str = "cut",
        window: int = 1024,
        too_long: str = "cut",
        parts: int = 1,
    ) -> None:
        self.path, self.spec = path, spec
        self._force, self._tokenizer = force, tokenizer
        self._writer = None if force else self._resumed()
        records = {} if self._writer is None else self._writer.committed()
        self._unit = next(unit for unit in itertools.count() if unit not in records)
        self.complete = False
        self.start: Cursor | None = None
        self.bad_lines: int | None = None
        first_row = 0
        if self._unit:
            extra = records[self._unit - 1].extra
            self.start = Cursor.from_json(extra["cursor"])
            self.complete = bool(extra["end"])
            self.bad_lines = extra["bad_lines"]
            first_row = int(extra["rows"])
        self.resumed_rows = first_row
        self.rows = first_row
        self._pending: list[PackedRow] = []
        self._last_cursor: Cursor | None = None
        start = PackerStart(
            row_length=spec.row_length,
            masked=MASK_COLUMN in spec.columns,
            window=window,
            too_long=too_long,
            first_row=first_row,
            start=self.start,
            parts=parts,
        )
        self._packer: Packer = import_module(PACKINGS[packing].module).make(start)

    def _resumed(self) -> StoreWriter | None:
        try:
            return StoreWriter.resume(self.path, self.spec)
        except MismatchError as error:
            found = StoreReader(self.path, allow_partial=True).spec
            if found.kind != self.spec.kind:
                raise
            raise MismatchError(conflict_text(f"{self.path}/run.json", found, self.spec)) from error

    @property
    def begun(self) -> bool:
        """Whether the store exists, with a unit of this run."""
        return self._writer is not None

    @property
    def empty(self) -> bool:
        """Whether no row has come so far, and none will; ask after `close`."""
        return self._packer.tokens == 0

    @property
    def judged(self) -> tuple[int, int, str]:
        """How many rows or documents have no token that is trained on, of how many; and which of the two they are."""
        counts = self._packer.counts
        return counts.get(UNTRAINED, 0), counts.get(JUDGED, 0), self._packer.what_is_judged

    def wants(self, place: Place) -> bool:
        return not self.complete and self._packer.wants(place)

    def add(self, place: Place, ids: Ids, mask: Mask | None = None, *, bad_lines: int = 0) -> None:
        """Append the document at `place`: ids int32 [n]; mask bool [n], which of them are trained on (None: all).

        `bad_lines` broken records of the input were counted before it.
        """
        for packed in self._packer.add(place, ids, mask, bad_lines=bad_lines):
            self._append(packed)

    def close(self, end: Place, *, bad_lines: int) -> None:
        """No more documents: pack what is left. `end` is the place after the last one."""
        if not self.complete:
            for packed in self._packer.finish(end, bad_lines=bad_lines):
                self._append(packed)
            self._last_cursor = self._packer.last_cursor(end, bad_lines=bad_lines)

    def finish(self, *, bad_lines: int) -> StoreSummary:
        """Commit what `close` has left; the store must not be empty. `bad_lines` are of the whole input."""
        if self._pending:
            self._commit(bad_lines=bad_lines)
        return StoreSummary(
            self.path,
            self._packer.documents,
            self.rows,
            self._packer.tokens,
            self.spec.row_length,
            dict(self._packer.counts),
            self._packer.what_is_judged,
        )

    def seal(self) -> None:
        """Seal the store. Raises MismatchError when another run has taken its place in the meantime."""
        seal_store(self.path)
        if StoreReader(self.path).spec.fingerprint != self.spec.fingerprint:
            raise MismatchError(
                f"{self.path}: another prepare with other options replaced this store while it was written; run one at "
                "a time, or give each an output of its own"
            )

    def _append(self, packed: PackedRow) -> None:
        # A unit is committed only when a next row shows that it was not the last one, which is marked in its record.
        if len(self._pending) == self.spec.rows_per_unit:
            self._commit()
        self._pending.append(packed)

    def _commit(self, *, bad_lines: int | None = None) -> None:
        """Commit the pending rows; `bad_lines` of the whole input is given with the last unit only."""
        if self._writer is None:
            self._begin(bad_lines)
        else:
            self._commit_to(self._writer, bad_lines)

    def _begin(self, bad_lines: int | None) -> None:
        """Place the tokenizer, create the store and commit its first unit: all or nothing."""
        try:
            if self._tokenizer is not None:
                self._tokenizer.place()
            writer = self._create()
            self._commit_to(writer, bad_lines)
        except BaseException:
            discard_unused(self.path)
            if self._tokenizer is not None:
                self._tokenizer.withdraw()
            raise
        self._writer = writer
        if self._tokenizer is not None:
            self._tokenizer.settle()

    def _create(self) -> StoreWriter:
        try:
            return StoreWriter.create(self.path, self.spec, force=self._force)
        except MismatchError:
            # A run.json of other options without a unit, from a run that was killed: nothing is lost with it.
            StoreWriter.resume(self.path, self.spec)  # raises where another run has units
            return StoreWriter.create(self.path, self.spec, force=True)

    def _commit_to(self, writer: StoreWriter, bad_lines: int | None) -> None:
        rows: list[TokensRow] = [packed.row for packed in self._pending]
        self.rows += len(rows)
        cursor = self._pending[-1].cursor
        if bad_lines is not None and self._last_cursor is not None:
            cursor = self._last_cursor
        extra = {"cursor": cursor.to_json(), "rows": self.rows, "end": bad_lines is not None, "bad_lines": bad_lines}
        writer.commit_unit(self._unit, rows, extra=extra)
        self._unit += 1
        self._pending = []


def check_untrained(outputs: Sequence[Output], *, allowed: float, at_end: bool = False) -> None:
    """Raise UserError where too many rows or documents have no token that is trained on; before the end, of enough."""
    untrained = sum(output.judged[0] for output in outputs)
    judged = sum(output.judged[1] for output in outputs)
    if judged < (1 if at_end else _JUDGED_AT_LEAST) or untrained <= allowed * judged:
        return
    output = outputs[0]
    what = output.judged[2]
    raise UserError(
        f"{untrained} of {judged} {what} have no token that is trained on ({untrained / judged:.1%}), "
        f"{allowed:.1%} are allowed (max_untrained_fraction), at rows of {output.spec.row_length} tokens: "
        "answers may stand beyond the end of the rows or be empty. Raise row_length, use packing=whole, correct the "
        "input, or raise the limit; what is written stays good, and the same command with another limit continues"
    )
