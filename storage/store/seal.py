"""Seal: all units present, their bytes read back -> index.arrow, then manifest.json. Readers refuse unsealed stores."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.storage.errors import CorruptError, NotAStoreError, StoreError, TornError
from potstill.storage.files.checked_json import dump_checked, get_int, get_list, get_text, read_checked
from potstill.storage.files.collecting import without_collection
from potstill.storage.files.commit import list_records
from potstill.storage.files.folder import Listed, StoreFolder, StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.gathering import gathered
from potstill.storage.store.index import ROWS_PER_BLOCK, IndexBlock, RowIndex
from potstill.storage.store.index_file import EncodedIndex
from potstill.storage.store.presence import look_at_records, read_units
from potstill.storage.store.record_block import read_blocks
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.unit_bytes import UnitEntry, check_bytes, check_sizes, damaged_text, entry_cuts, file_sha256
from potstill.storage.store.who_may_write import warn_of_writers
from potstill.storage.store.writer import load_spec

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = f"{MANIFEST_NAME}.sig"
INDEX_NAME = "index.arrow"
MAX_MANIFEST_BYTES = 1 << 30
_UNIT_FILE = re.compile(r"u\d{7,12}-[0-9a-f]{12}\.arrow")
INDEX_FILE = re.compile(r"index(-[0-9a-f]{12})?\.arrow")
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
    manifest = _make_manifest(folder, spec, fast=fast)
    data = manifest.to_bytes()
    if folder.create(MANIFEST_NAME, data) or folder.replace_torn(MANIFEST_NAME, data):
        logger.info("sealed %s: %d rows, %d tokens", folder.url, manifest.num_rows, manifest.num_tokens)
    found_manifest = load_manifest(folder, spec)
    if found_manifest is None:
        raise CorruptError(
            f"{folder.url}/{MANIFEST_NAME} was deleted by somebody else while the store was sealed; seal it again"
        )
    # Once more, now that it stands there: a repair that began beside this has taken units out, and the seal is no good.
    _check_sealed(folder, found_manifest)
    return found_manifest


def check_sealed(path: StorePath, *, spec: RunSpec | None = None) -> bool:
    """Whether a sealed store stands at `path`; False also where there is none at all.

    Raises CorruptError, which names the command that repairs, where its manifest is damaged or files are missing or of
    other sizes: what a worker must hear before it says that nothing is to be done. Costs a listing, and no bytes.
    `spec`: what run.json says, where the caller has read it.
    """
    folder = open_folder(path)
    try:
        spec = load_spec(folder) if spec is None else spec
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
    listing = folder.listing("units", cuts=entry_cuts(manifest.units))
    _check_sealed(folder, manifest, listing)
    records = look_at_records(listing)
    doubtful = {unit: records.generations[unit] for unit in records.suspects if unit < len(manifest.units)}
    unreadable = doubtful.keys() - read_units(folder, spec, doubtful).keys()
    lost = [
        f"unit {unit} is sealed and has no {'readable ' if unit in unreadable else ''}record"
        for unit in range(len(manifest.units))
        if unit not in records.generations or unit in unreadable
    ]
    if lost:
        raise CorruptError(damaged_text(folder, lost, len(manifest.units)))
    return True


def _check_sealed(folder: StoreFolder, manifest: Manifest, listing: Mapping[str, Listed] | None = None) -> None:
    """Raise CorruptError where files of a sealed store are missing or of other sizes than the manifest says."""
    found = folder.size(manifest.index_file)
    if found != manifest.index_bytes:
        state = "missing" if found is None else f"{found} bytes"
        raise CorruptError(
            f"{folder.url}/{manifest.index_file}: {state}, the manifest says {manifest.index_bytes} bytes; run "
            f"`potstill repair {folder.url}`, which takes it out, and seal again"
        )
    check_sizes(folder, manifest.units, listing=listing)


def _check_records(folder: StoreFolder, spec: RunSpec, manifest: Manifest) -> None:
    """Raise CorruptError where the records of a sealed store are not those that the manifest was made of."""
    listed = list_records(folder, spec)
    problems = []
    for block in read_blocks(folder, spec, {unit: listed.get(unit, 1) for unit in range(len(manifest.units))}):
        problems += [f"unit {unit} is sealed and has no readable record" for unit in block.unreadable]
        entries = map(UnitEntry, block.files, block.num_bytes.tolist(), block.digests)
        for unit, found in zip(block.units.tolist(), entries, strict=True):
            if found != manifest.units[unit]:
                problems.append(
                    f"the record of unit {unit} names {found.file}, the manifest {manifest.units[unit].file}"
                )
    if problems:
        raise CorruptError(damaged_text(folder, problems, len(manifest.units)))


def _check_index_bytes(folder: StoreFolder, manifest: Manifest) -> None:
    if file_sha256(folder, manifest.index_file, manifest.index_bytes) != manifest.index_sha256:
        raise CorruptError(
            f"{folder.url}/{manifest.index_file}: content does not fit the sha256 of the manifest; run "
            f"`potstill repair {folder.url}`, which takes it out, and seal again"
        )


def _make_manifest(folder: StoreFolder, spec: RunSpec, *, fast: bool) -> Manifest:
    """Read all records, look at the files of the units, and publish the index."""
    with gathered(folder, spec) as found:
        assert found.index is not None
        warn_of_writers(folder, [unit.file for unit in found.units])
        check_sizes(folder, found.units)
        if not fast:
            check_bytes(folder, found.units)
        return Manifest(
            fingerprint=spec.fingerprint,
            store_digest=store_digest(spec.fingerprint, [unit.sha256 for unit in found.units]),
            num_rows=found.num_rows,
            num_tokens=found.num_tokens,
            num_entries=found.num_entries,
            num_targets=found.num_targets,
            num_bytes=found.num_bytes,
            units=tuple(found.units),
            index_file=_publish_index(folder, found.path, found.index),
            index_bytes=found.index.num_bytes,
            index_sha256=found.index.sha256,
            index_blocks=found.index.blocks,
            bytes_checked=not fast,
        )


def _publish_index(folder: StoreFolder, path: Path, index: EncodedIndex) -> str:
    """Write index.arrow exclusively; a different one left by another sealer is stepped aside from, not replaced.

    Where one request cannot create so large a file, it goes straight to the name that its content gives: whoever else
    writes that one writes the same bytes.
    """
    own_name = f"index-{index.sha256[:12]}.arrow"
    if folder.max_create_bytes is not None and index.num_bytes > folder.max_create_bytes:
        folder.put_file(own_name, path)
        return own_name
    for name in (INDEX_NAME, own_name):
        if folder.create_file(name, path):
            return name
        if folder.size(name) == index.num_bytes and file_sha256(folder, name, index.num_bytes) == index.sha256:
            return name
    raise StoreError(
        f"{folder.url}: two damaged index files stand at the place of the index; run `potstill repair {folder.url}` "
        "and seal again"
    )


@without_collection()
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
