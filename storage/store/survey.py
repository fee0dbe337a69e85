"""survey_store: look at every part of a store in one pass, whatever is damaged, and list what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from potstill.storage.errors import NO_ANSWER, StoreError
from potstill.storage.files.commit import CommitRecord, list_records
from potstill.storage.files.folder import StoreFolder
from potstill.storage.rows.id_map import ID_MAP_NAME, IdMap
from potstill.storage.rows.only_rows import HELD, ONLY_ROWS, only_rows_field
from potstill.storage.store.finding import Finding, kind_of
from potstill.storage.store.index_file import build_columns
from potstill.storage.store.seal import MANIFEST_NAME, Manifest, load_manifest, open_index
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.threads import in_threads
from potstill.storage.store.unit_bytes import file_sha256
from potstill.storage.store.unit_check import UnitCheck, UnitChecker
from potstill.storage.store.writer import load_id_map

Progress = Callable[[int], None]
# A unit is held whole while its rows are decoded, so few are open at once.
_DEEP_AT_ONCE, _AT_ONCE = 4, 16


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`sealed`: a manifest stands there, readable or not; `records`: the readable ones by unit; findings in order."""

    spec: RunSpec
    sealed: bool
    manifest: Manifest | None
    records: dict[int, CommitRecord]
    num_rows: int
    num_bytes: int
    findings: tuple[Finding, ...]


def survey_store(folder: StoreFolder, spec: RunSpec, *, deep: bool, progress: Progress | None = None) -> Survey:
    """Check id table, manifest, every unit and the index; `deep` reads all bytes and decodes all rows.

    Damage is reported and never raised, also where the system refuses to read a file: what is wrong with one part says
    nothing of the others. `progress` is called with the number of rows just checked.
    """
    findings: list[Finding] = []
    id_map = _look_at_id_map(folder, spec, findings)
    manifest, sealed = _look_at_manifest(folder, spec, findings)
    checker = UnitChecker(folder=folder, spec=spec, id_map=id_map, deep=deep)
    records: dict[int, CommitRecord] = {}
    num_rows = num_bytes = 0
    for check in _units(checker, manifest, sealed=sealed):
        if check.finding is not None:
            findings.append(check.finding)
        if check.record is not None:
            records[check.unit] = check.record
            num_rows, num_bytes = num_rows + len(check.record.num_tokens), num_bytes + check.record.num_bytes
            if progress is not None:
                progress(len(check.record.num_tokens))
    if manifest is not None:
        findings += _look_at_index(folder, spec, manifest, records, deep=deep)
    if deep:
        findings += _look_at_held_rows(folder, spec, manifest, records)
    return Survey(
        spec=spec,
        sealed=sealed,
        manifest=manifest,
        records=records,
        num_rows=num_rows,
        num_bytes=num_bytes,
        findings=tuple(findings),
    )


def _look_at_id_map(folder: StoreFolder, spec: RunSpec, findings: list[Finding]) -> IdMap | None:
    try:
        return load_id_map(folder, spec)
    except NO_ANSWER:
        raise
    except StoreError as error:
        findings.append(Finding(part="id_map", kind=kind_of(error), text=str(error), file=ID_MAP_NAME))
        return None


def _look_at_manifest(folder: StoreFolder, spec: RunSpec, findings: list[Finding]) -> tuple[Manifest | None, bool]:
    try:
        manifest = load_manifest(folder, spec)
    except NO_ANSWER:
        raise
    except StoreError as error:
        findings.append(Finding(part="manifest", kind=kind_of(error), text=str(error), file=MANIFEST_NAME))
        return None, True
    return manifest, manifest is not None


def _units(checker: UnitChecker, manifest: Manifest | None, *, sealed: bool) -> list[UnitCheck]:
    """Every unit that is listed, that the manifest names, or that a store of known length has."""
    folder, spec = checker.folder, checker.spec
    listed = list_records(folder, spec)
    wanted = set(listed)
    if manifest is not None:
        wanted |= set(range(len(manifest.units)))
    elif spec.num_rows is not None and (sealed or folder.parallel_reads == 1):
        # By name too: a listing leaves out what is no plain file, as a link is in the place of a record. Where each
        # name is a request over a network, only of a store that was complete.
        wanted |= set(range(-(-spec.num_rows // spec.rows_per_unit)))

    def check(unit: int) -> UnitCheck | None:
        named = manifest is not None and unit < len(manifest.units)
        entry = manifest.units[unit] if manifest is not None and named else None
        return checker.check(unit, generations=listed.get(unit, 0), entry=entry)

    checks = in_threads(folder, check, sorted(wanted), most=_DEEP_AT_ONCE if checker.deep else _AT_ONCE)
    return [check for check in checks if check is not None]


def _look_at_index(
    folder: StoreFolder, spec: RunSpec, manifest: Manifest, records: dict[int, CommitRecord], *, deep: bool
) -> list[Finding]:
    """At most one finding: size, bytes, or (deep, where all records are there) columns that are not the records'."""
    name = manifest.index_file
    where = f"{folder.url}/{name}"

    def found(kind: str, text: str) -> list[Finding]:
        return [Finding(part="index", kind=kind, text=text, file=name)]

    try:
        size = folder.size(name)
        if size != manifest.index_bytes:
            kind, state = ("missing", "missing") if size is None else ("size", f"{size} bytes")
            return found(kind, f"{where}: {state}, the manifest says {manifest.index_bytes} bytes")
        if file_sha256(folder, name, manifest.index_bytes) != manifest.index_sha256:
            return found("bytes", f"{where}: content does not fit the sha256 of the manifest")
        units = range(len(manifest.units))
        if not deep or any(unit not in records for unit in units):
            return []
        index = open_index(folder, manifest, spec)
        wanted = build_columns((records[unit] for unit in units), spec.stats)
        wrong = [name for name, values in wanted.items() if not np.array_equal(index.column(name), values)]
    except NO_ANSWER:
        raise
    except StoreError as error:
        return found(kind_of(error), str(error))
    return found("layout", f"{where}: columns {wrong} do not fit the records") if wrong else []


def _look_at_held_rows(
    folder: StoreFolder, spec: RunSpec, manifest: Manifest | None, records: dict[int, CommitRecord]
) -> list[Finding]:
    """Of a sealed store of some rows only: whether the rows that its records hold are those of run.json."""
    if spec.only_rows is None or manifest is None or any(unit not in records for unit in range(len(manifest.units))):
        return []
    mask = np.concatenate([np.asarray(records[unit].stats[HELD]) > 0 for unit in range(len(manifest.units))])
    found = only_rows_field(mask) if mask.any() else None
    if found == dict(spec.only_rows):
        return []
    text = f"{folder.url}: rows held make {found}, {ONLY_ROWS} of run.json is {dict(spec.only_rows)}"
    return [Finding(part="store", kind="layout", text=text)]
