"""repair_store: take what is damaged out of a store, so that the command that wrote it makes it again.

Nothing is deleted: files go to quarantine/ inside the store, under a name that begins with the time. The order makes a
kill harmless at any moment. First the manifest: without it no reader takes the store for whole. Then the index. Then of
each bad unit the file, and its record last: as long as the record stands, every command that comes by sees a damaged
unit, and repairing again finishes what was begun; without it the unit is one to be done, as any other.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from potstill.storage.errors import NO_ANSWER, CorruptError, ReadFailedError, StoreError
from potstill.storage.files.checked_json import read_checked
from potstill.storage.files.commit import list_records
from potstill.storage.files.durable import CLAIM
from potstill.storage.files.folder import QUARANTINE, StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.rows.id_map import ID_MAP_NAME
from potstill.storage.store.finding import Finding
from potstill.storage.store.notes import noted_units
from potstill.storage.store.seal import INDEX_FILE, INDEX_NAME, MANIFEST_NAME, SIGNATURE_NAME, load_manifest
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.survey import Progress, Survey, survey_store
from potstill.storage.store.unit_bytes import size_problems
from potstill.storage.store.unit_check import UnitChecker
from potstill.storage.store.writer import (
    MAX_RUN_BYTES,
    RUN_NAME,
    StoreWriter,
    fingerprint_of_records,
    load_id_map,
    load_spec,
)

logger = logging.getLogger(__name__)

_ALSO = "is sound, and is made again with that of the store beside"
_NOT_HERE = ("signature", "store")  # parts of which no file can be taken out and made again


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was wrong, what was moved (old name, new name), and how the store stands now.

    In a dry run nothing was moved, and `moved` names what would be. `redo`: units that are to be made again. `missing`:
    units of the store without a readable record, those among them; None where only the writer knows how many there are.
    """

    url: str
    spec: RunSpec
    dry_run: bool
    findings: tuple[Finding, ...]
    moved: tuple[tuple[str, str], ...]
    redo: tuple[int, ...]
    missing: tuple[int, ...] | None
    sealed: bool

    @property
    def whole(self) -> bool:
        """Whether the store was sealed and sound as it was found."""
        return self.sealed and not self.findings

    @property
    def beyond_repair(self) -> tuple[Finding, ...]:
        """Findings that taking files out does not answer."""
        return tuple(finding for finding in self.findings if finding.part in _NOT_HERE)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; the shape is in docs/format.md."""
        return {
            "store": self.url,
            "dry_run": self.dry_run,
            "sealed": self.sealed,
            "findings": [finding.to_json() for finding in self.findings],
            "moved": [list(pair) for pair in self.moved],
            "redo": list(self.redo),
            "missing": None if self.missing is None else list(self.missing),
        }


def repair_store(
    path: StorePath, *, dry_run: bool = False, progress: Progress | None = None, also: Collection[int] = ()
) -> RepairReport:
    """Look at every byte and row of a store, and take out what is damaged; unseals the store if anything is.

    `also`: units that are taken out although they are sound, because those of a store beside must be made with them.
    Any number of these may run at once, beside workers that write: what is taken out is looked at again just before.
    Raises ReadFailedError, with nothing changed, where files cannot be judged because reading them was refused. A
    damaged run.json says nothing of what all other bytes mean: it alone is taken out then, and CorruptError says what
    to run, which writes it anew.
    """
    folder = open_folder(path)
    spec = _load_spec(folder, dry_run=dry_run)
    survey = survey_store(folder, spec, deep=True, progress=progress)
    refused = [finding for finding in survey.findings if finding.kind == "refused"]
    if refused:
        raise ReadFailedError(
            f"{folder.url}: {len(refused)} files could not be read, so nobody knows whether they are damaged, and "
            f"nothing was changed: {refused[0].text}; give this user access, or try again when the storage answers"
        )
    sound = sorted(set(also) & survey.records.keys() - {finding.unit for finding in survey.findings})
    wanted = [
        Finding(part="unit", kind="record", text=f"{folder.url}: unit {unit} {_ALSO}", unit=unit) for unit in sound
    ]
    survey = replace(survey, findings=(*survey.findings, *wanted))
    repair = _Repair(folder, spec, survey, dry_run=dry_run, also=frozenset(sound))
    if any(finding.part not in _NOT_HERE for finding in survey.findings):
        repair.take_out()
    sealed = survey.sealed if not repair.moved or dry_run else folder.size(MANIFEST_NAME) is not None
    return RepairReport(
        url=folder.url,
        spec=spec,
        dry_run=dry_run,
        findings=survey.findings,
        moved=tuple(repair.moved),
        redo=tuple(repair.redo),
        missing=_missing(survey, repair.redo),
        sealed=sealed,
    )


def _load_spec(folder: StoreFolder, *, dry_run: bool) -> RunSpec:
    """The run, where its file is whole; else the file is set aside. Raises CorruptError, also of a dry run."""
    try:
        read_checked(folder, RUN_NAME, max_bytes=MAX_RUN_BYTES)
    except CorruptError as error:
        new_name = f"{_prefix()}.{RUN_NAME}"
        verb = "would be" if dry_run or not folder.move(RUN_NAME, new_name) else "was"
        raise CorruptError(
            f"{error}. It {verb} moved to {new_name}. Run the command that wrote the store, with the same options: it "
            "writes run.json again and leaves all units as they are (other options are refused, because the units name "
            f"their run: {fingerprint_of_records(folder) or 'no unit has a record'}); then run repair again"
        ) from error
    return load_spec(folder)  # what is whole and of another version is nothing to repair


def _prefix() -> str:
    """What the names in the quarantine begin with: when, and a mark that two repairs do not share."""
    return f"{QUARANTINE}/{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}"


def _missing(survey: Survey, redo: list[int]) -> tuple[int, ...] | None:
    spec = survey.spec
    if spec.num_rows is not None:
        num_units = -(-spec.num_rows // spec.rows_per_unit)
    elif survey.manifest is not None:
        num_units = len(survey.manifest.units)
    else:
        return None
    return tuple(unit for unit in range(num_units) if unit not in survey.records or unit in redo)


class _Repair:
    """The moves of one repair. `moved`: (old name, new name); `redo`: units that were taken out."""

    def __init__(
        self, folder: StoreFolder, spec: RunSpec, survey: Survey, *, dry_run: bool, also: frozenset[int]
    ) -> None:
        self._folder, self._spec, self._survey, self._dry_run, self._also = folder, spec, survey, dry_run, also
        self._prefix = _prefix()
        self.moved: list[tuple[str, str]] = []
        self.redo: list[int] = []

    def take_out(self) -> None:
        """Unseal, then move every bad unit; once more unseal where somebody has sealed meanwhile what is no more."""
        self._unseal()
        if any(finding.part == "id_map" for finding in self._survey.findings):
            self._move(ID_MAP_NAME)
        checker = UnitChecker(folder=self._folder, spec=self._spec, id_map=self._id_map(), deep=True)
        noted = noted_units(self._folder)
        for finding in self._survey.findings:
            if finding.unit is not None:
                self._take_unit(finding, checker, noted)
        if not self._dry_run and self._sealed_wrongly():
            self._unseal()

    def _id_map(self) -> Any:
        try:
            return load_id_map(self._folder, self._spec)
        except NO_ANSWER:
            raise
        except StoreError:  # a finding of its own: the units that need it are judged by their bytes
            return None

    def _unseal(self) -> None:
        for name in self._folder.names("tmp"):  # a seal that was killed where there are no hard links
            if name.startswith(f"{CLAIM}{MANIFEST_NAME}/"):
                self._folder.delete(f"tmp/{name}")
        self._move(MANIFEST_NAME)
        self._move(SIGNATURE_NAME)
        for name in self._folder.names(""):
            if INDEX_FILE.fullmatch(name):
                self._move(name)
        # By name, too: a folder or a link in its place is not listed, and a damaged manifest names none.
        manifest = self._survey.manifest
        self._move(INDEX_NAME if manifest is None else manifest.index_file)

    def _take_unit(self, finding: Finding, checker: UnitChecker, noted: set[int]) -> None:
        """Look again, now that no manifest speaks for it: another repair and a worker may have made it good since."""
        assert finding.unit is not None
        unit = finding.unit
        manifest = self._survey.manifest
        check = checker.check(unit, generations=list_records(self._folder, self._spec).get(unit, 0), entry=None)
        if check is not None and check.finding is None and unit not in self._also:
            return
        files = [] if check is None or check.record is None else [check.record.file]
        known = bool(files)
        if manifest is not None and unit < len(manifest.units):
            known = True
            # What the manifest named goes too, unless a record of somebody else names it: gc would delete it.
            files += [manifest.units[unit].file] if manifest.units[unit].file not in files else []
        if self._spec.num_rows is not None:
            known = unit < -(-self._spec.num_rows // self._spec.rows_per_unit)
        if known and unit not in noted and not self._dry_run:
            # The note keeps a store of open length from being sealed without this unit.
            note = f"{finding.text}; taken out by repair as {self._prefix}.*"
            StoreWriter(self._folder, self._spec, None).record_failure(unit, note)
        for file in files:
            self._move(f"units/{file}")
        for name in () if check is None else check.record_names:
            self._move(name)
        if known:
            self.redo.append(unit)

    def _sealed_wrongly(self) -> bool:
        try:
            manifest = load_manifest(self._folder, self._spec)
            return manifest is not None and bool(size_problems(self._folder, manifest.units))
        except NO_ANSWER:
            raise
        except StoreError:
            return True

    def _move(self, name: str) -> None:
        new_name = f"{self._prefix}.{name.rpartition('/')[2]}"
        if self._dry_run:
            moved = (name, new_name) not in self.moved and self._stands(name)
        else:
            moved = self._folder.move(name, new_name)
        if moved:
            logger.info("%s: %s -> %s", self._folder.url, name, new_name)
            self.moved.append((name, new_name))

    def _stands(self, name: str) -> bool:
        try:
            return self._folder.size(name) is not None
        except NO_ANSWER:
            raise
        except StoreError:
            return True
