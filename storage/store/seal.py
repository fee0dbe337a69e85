"""Seal: all units present, their bytes read back -> index.arrow, then manifest.json. Readers refuse unsealed stores."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.storage.errors import CorruptError, NotAStoreError, StoreError, TornError, UnsealedError
from potstill.storage.files.checked_json import dump_checked, get_int, get_list, get_text, read_checked
from potstill.storage.files.commit import CommitRecord, committed_records, list_records, read_record
from potstill.storage.files.folder import StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.index import ROWS_PER_BLOCK, IndexBlock, RowIndex, build_columns, encode_index
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.unit_bytes import UnitEntry, check_bytes, check_sizes, damaged_text, noted_units
from potstill.storage.store.who_may_write import warn_of_writers
from potstill.storage.store.writer import load_spec

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"
INDEX_NAME = "index.arrow"
MAX_MANIFEST_BYTES = 1 << 30
_UNIT_FILE = re.compile(r"u\d{7,12}-[0-9a-f]{12}\.arrow")
INDEX_FILE = re.compile(r"index(-[0-9a-f]{12})?\.arrow")
STAGES = {"tokens": "prepare", "targets": "dump", "scores": "score"}  # the command that writes each kind
TOTALS = ("num_rows", "num_tokens", "num_entries", "num_targets", "num_bytes")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed store holds. `store_digest` pins the content: fingerprint and all unit bytes in order.

    `bytes_checked`: whether the seal read every unit back and held it against its sha256 (False: --fast; None: sealed
    before this was noted). The digest does not depend on it.
    """

    fingerprint: str
    store_digest: str
    num_rows: int
    num_tokens: int
    num_entries: int
    num_targets: int
    num_bytes: int
    units: tuple[UnitEntry, ...]
    index_file: str
    index_bytes: int
    index_sha256: str
    index_blocks: tuple[IndexBlock, ...]
    rows_per_block: int = ROWS_PER_BLOCK
    bytes_checked: bool | None = None

    def to_bytes(self) -> bytes:
        """Checked JSON as written to manifest.json."""
        value: dict[str, Any] = {name: getattr(self, name) for name in TOTALS}
        value |= {
            "fingerprint": self.fingerprint,
            "store_digest": self.store_digest,
            "units": [[u.file, u.num_bytes, u.sha256] for u in self.units],
            "index": {
                "file": self.index_file,
                "bytes": self.index_bytes,
                "sha256": self.index_sha256,
                "rows_per_block": self.rows_per_block,
                "blocks": [[b.offset, b.length, b.crc32] for b in self.index_blocks],
            },
        }
        if self.bytes_checked is not None:
            value["bytes_checked"] = self.bytes_checked
        return dump_checked(value)


def store_digest(fingerprint: str, unit_digests: Sequence[str]) -> str:
    """sha256 over the run's fingerprint and the sha256 of every unit file, in unit order."""
    return hashlib.sha256((fingerprint + "".join(unit_digests)).encode()).hexdigest()


def seal_store(path: StorePath, *, fast: bool = False, again: bool = False) -> Manifest:
    """Seal a complete store, or return the manifest it has.

    The bytes of every unit are read back and held against their sha256 first; `fast` looks at sizes only, and the
    manifest says so. A store that is sealed already has the sizes of its files looked at; `again` reads its bytes, too.
    Raises UnsealedError that names the units that are missing, CorruptError that names those that are damaged.
    """
    folder = open_folder(path)
    spec = load_spec(folder)
    try:
        manifest = load_manifest(folder, spec)
    except TornError as error:
        logger.warning("%s; the store is sealed again", error)
        manifest = None
    if manifest is not None:
        warn_of_writers(folder, [unit.file for unit in manifest.units], index=manifest.index_file)
        _check_sealed(folder, manifest)
        if again:
            _check_records(folder, spec, manifest)
        if again and not fast:
            check_bytes(folder, manifest.units)
            _check_index_bytes(folder, manifest)
        return manifest
    records = committed_records(folder, spec)
    ordered = _complete(records, spec, folder)
    units = tuple(UnitEntry(r.file, r.num_bytes, r.sha256) for r in ordered)
    warn_of_writers(folder, [unit.file for unit in units])
    check_sizes(folder, units)
    if not fast:
        check_bytes(folder, units)
    data, blocks = encode_index(build_columns(ordered, spec.stats), spec.fingerprint)
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = Manifest(
        fingerprint=spec.fingerprint,
        store_digest=store_digest(spec.fingerprint, [r.sha256 for r in ordered]),
        num_rows=sum(len(r.num_tokens) for r in ordered),
        num_tokens=sum(sum(r.num_tokens) for r in ordered),
        num_entries=sum(sum(r.num_entries) for r in ordered),
        num_targets=sum(r.num_targets for r in ordered),
        num_bytes=sum(r.num_bytes for r in ordered),
        units=units,
        index_file=_publish_index(folder, data, sha256),
        index_bytes=len(data),
        index_sha256=sha256,
        index_blocks=tuple(blocks),
        bytes_checked=not fast,
    )
    if folder.create(MANIFEST_NAME, manifest.to_bytes()) or folder.replace_torn(MANIFEST_NAME, manifest.to_bytes()):
        logger.info("sealed %s: %d rows, %d tokens", folder.url, manifest.num_rows, manifest.num_tokens)
    found_manifest = load_manifest(folder, spec)
    if found_manifest is None:
        raise CorruptError(
            f"{folder.url}/{MANIFEST_NAME} was deleted by somebody else while the store was sealed; seal it again"
        )
    # Once more, now that it stands there: a repair that began beside this has taken units out, and the seal is no good.
    _check_sealed(folder, found_manifest)
    return found_manifest


def check_sealed(path: StorePath) -> bool:
    """Whether a sealed store stands at `path`; False also where there is none at all.

    Raises CorruptError, which names the command that repairs, where its manifest is damaged or files are missing or of
    other sizes: what a worker must hear before it says that nothing is to be done. Costs a listing, and no bytes.
    """
    folder = open_folder(path)
    try:
        spec = load_spec(folder)
    except NotAStoreError:
        return False
    try:
        manifest = load_manifest(folder, spec)
    except TornError:
        return False  # a seal that was killed: the next one replaces it
    except CorruptError as error:
        raise CorruptError(f"{error}; or run `potstill repair {folder.url}`, which unseals the store") from error
    if manifest is None:
        return False
    _check_sealed(folder, manifest)
    listed = list_records(folder)
    lost = [f"unit {unit} is sealed and has no record" for unit in range(len(manifest.units)) if unit not in listed]
    if lost:
        raise CorruptError(damaged_text(folder, lost, len(manifest.units)))
    return True


def _check_sealed(folder: StoreFolder, manifest: Manifest) -> None:
    """Raise CorruptError where files of a sealed store are missing or of other sizes than the manifest says."""
    found = folder.size(manifest.index_file)
    if found != manifest.index_bytes:
        state = "missing" if found is None else f"{found} bytes"
        raise CorruptError(
            f"{folder.url}/{manifest.index_file}: {state}, the manifest says {manifest.index_bytes} bytes; run "
            f"`potstill repair {folder.url}`, which takes it out, and seal again"
        )
    check_sizes(folder, manifest.units)


def _check_records(folder: StoreFolder, spec: RunSpec, manifest: Manifest) -> None:
    """Raise CorruptError where the records of a sealed store are not those that the manifest was made of."""
    records = committed_records(folder, spec)
    problems = []
    for unit, entry in enumerate(manifest.units):
        record = records.get(unit)
        if record is None:
            problems.append(f"unit {unit} is sealed and has no readable record")
        elif (record.file, record.num_bytes, record.sha256) != tuple(entry):
            problems.append(f"the record of unit {unit} names {record.file}, the manifest {entry.file}")
    if problems:
        raise CorruptError(damaged_text(folder, problems, len(manifest.units)))


def _check_index_bytes(folder: StoreFolder, manifest: Manifest) -> None:
    data = folder.read(manifest.index_file, max_bytes=manifest.index_bytes) or b""
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise CorruptError(
            f"{folder.url}/{manifest.index_file}: content does not fit the sha256 of the manifest; run "
            f"`potstill repair {folder.url}`, which takes it out, and seal again"
        )


def _complete(records: dict[int, CommitRecord], spec: RunSpec, folder: StoreFolder) -> list[CommitRecord]:
    """Records in unit order; UnsealedError unless they cover all rows."""
    num_units = _open_end(records, spec, folder) if spec.num_rows is None else -(-spec.num_rows // spec.rows_per_unit)
    missing = [u for u in range(num_units) if u not in records and not _late(u, records, spec, folder)]
    if missing:
        raise UnsealedError(
            f"{folder.url}: {len(missing)} of {num_units} units are missing (first: {missing[:5]}); "
            f"run the same {_stage(spec)} again to complete them"
        )
    for unit in range(num_units):
        rows = len(records[unit].num_tokens)
        full = spec.rows_per_unit
        if spec.num_rows is not None:
            full = min(full, spec.num_rows - unit * spec.rows_per_unit)
        if rows != full and not (spec.num_rows is None and unit == num_units - 1):
            raise CorruptError(damaged_text(folder, [f"unit {unit} holds {rows} rows, expected {full}"], num_units))
    return [records[u] for u in range(num_units)]


def _stage(spec: RunSpec) -> str:
    """The command that writes such a store."""
    return "rollout" if "rollout" in spec.info else STAGES[spec.kind]


def _open_end(records: dict[int, CommitRecord], spec: RunSpec, folder: StoreFolder) -> int:
    """Number of units of a store whose length is known at the seal only.

    A writer that marks its last unit (`extra.end`) is held to it: without that mark a prepare that was killed in the
    middle would be sealed as a shorter corpus, and nobody would see it.
    """
    # Units that repair has taken out are known to exist, whether they are marked as the end or not.
    num_units = max([*records, *noted_units(folder)], default=-1) + 1
    while _late(num_units, records, spec, folder):
        num_units += 1
    if not num_units:
        raise UnsealedError(f"{folder.url}: no unit is committed, so there is nothing to seal; run prepare again")
    if num_units - 1 in records and records[num_units - 1].extra.get("end") is False:
        raise UnsealedError(
            f"{folder.url}: {num_units} units are committed, but the last one is not marked as the end of the input; "
            "run the same prepare again to complete the store"
        )
    return num_units


def _late(unit: int, records: dict[int, CommitRecord], spec: RunSpec, folder: StoreFolder) -> bool:
    """Ask for a unit by name: the listing of an object store may be older than the record."""
    record = read_record(folder, unit, spec)
    if record is not None:
        records[unit] = record
    return record is not None


def _publish_index(folder: StoreFolder, data: memoryview, sha256: str) -> str:
    """Write index.arrow exclusively; a different one left by another sealer is stepped aside from, not replaced."""
    for name in (INDEX_NAME, f"index-{sha256[:12]}.arrow"):
        if folder.create(name, data):
            return name
        found = folder.read(name, max_bytes=len(data)) if folder.size(name) == len(data) else None
        if found is not None and hashlib.sha256(found).hexdigest() == sha256:
            return name
    raise StoreError(
        f"{folder.url}: two damaged index files stand at the place of the index; run `potstill repair {folder.url}` "
        "and seal again"
    )


def load_manifest(folder: StoreFolder, spec: RunSpec) -> Manifest | None:
    """manifest.json checked against run.json, or None when the store is not sealed."""
    value = read_checked(folder, MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    if value is None:
        return None
    return parse_manifest(value, spec, where=f"{folder.url}/{MANIFEST_NAME}")


def parse_manifest(value: Mapping[str, Any], spec: RunSpec, *, where: str) -> Manifest:
    """Check every field against the run; CorruptError on the first that does not fit."""
    if get_text(value, "fingerprint", where=where) != spec.fingerprint:
        raise CorruptError(f"{where}: it belongs to another run than run.json; restore both files from one copy")
    units = _unit_entries(get_list(value, "units", where=where), where)
    digest = get_text(value, "store_digest", where=where)
    if digest != store_digest(spec.fingerprint, [u.sha256 for u in units]):
        raise CorruptError(f"{where}: store digest does not fit the units it lists")
    index = value.get("index")
    if not isinstance(index, dict) or not INDEX_FILE.fullmatch(get_text(index, "file", where=where)):
        raise CorruptError(f"{where}: field 'index' is damaged")
    index_bytes = get_int(index, "bytes", where=where)
    blocks = _index_blocks(get_list(index, "blocks", where=where), index_bytes, where)
    totals = {name: get_int(value, name, where=where) for name in TOTALS}
    checked = value.get("bytes_checked")
    if checked is not None and not isinstance(checked, bool):
        raise CorruptError(f"{where}: field 'bytes_checked' is {checked!r}, expected true or false")
    rows_per_block = get_int(index, "rows_per_block", where=where, low=1, high=1 << 20)
    if (
        len(blocks) != -(-totals["num_rows"] // rows_per_block)
        or len(units) != -(-totals["num_rows"] // spec.rows_per_unit)
        or (spec.num_rows is not None and totals["num_rows"] != spec.num_rows)
    ):
        raise CorruptError(f"{where}: {totals['num_rows']} rows do not fit its blocks, units or run.json")
    return Manifest(
        fingerprint=spec.fingerprint,
        store_digest=digest,
        units=units,
        index_file=get_text(index, "file", where=where),
        index_bytes=index_bytes,
        index_sha256=get_text(index, "sha256", where=where),
        index_blocks=blocks,
        rows_per_block=rows_per_block,
        bytes_checked=checked,
        **totals,
    )


def open_index(folder: StoreFolder, manifest: Manifest, spec: RunSpec) -> RowIndex:
    """The row index that a manifest names; CorruptError when its size is wrong."""
    return RowIndex(
        folder,
        manifest.index_file,
        num_rows=manifest.num_rows,
        num_bytes=manifest.index_bytes,
        blocks=manifest.index_blocks,
        rows_per_block=manifest.rows_per_block,
        stats=spec.stats,
    )


def _unit_entries(items: list[Any], where: str) -> tuple[UnitEntry, ...]:
    """`[file, bytes, sha256]` of every unit; checked column-wise, as there may be many thousand."""
    shape = set(map(type, items)) <= {list} and set(map(len, items)) <= {3}
    files, sizes, digests = zip(*items, strict=True) if shape and items else ((), (), ())
    if not (
        shape
        and set(map(type, files)) | set(map(type, digests)) <= {str}
        and set(map(type, sizes)) <= {int}
        and min(sizes, default=0) >= 0
        and all(map(_UNIT_FILE.fullmatch, files))
    ):
        raise CorruptError(f"{where}: a unit entry is not [file, bytes, sha256] with the file name of an attempt")
    return tuple(map(UnitEntry._make, items))


def _index_blocks(items: list[Any], index_bytes: int, where: str) -> tuple[IndexBlock, ...]:
    """`[offset, length, crc32]` of every block of the index."""
    shape = set(map(type, items)) <= {list} and set(map(len, items)) <= {3}
    if not shape or not {type(value) for item in items for value in item} <= {int}:
        raise CorruptError(f"{where}: an index block is not [offset, length, crc32]")
    for offset, length, crc in items:
        if min(offset, length, crc) < 0 or offset + length > index_bytes:
            raise CorruptError(f"{where}: index block at {offset} lies outside the {index_bytes} bytes of the index")
    return tuple(map(IndexBlock._make, items))
