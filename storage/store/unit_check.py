"""check_unit: all that can be wrong with one unit, its record, its file and its rows, told as one finding."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.ipc as ipc

from potstill.storage.errors import NO_ANSWER, CorruptError, StoreError
from potstill.storage.files.checked_json import READ_ATTEMPTS, read_checked
from potstill.storage.files.commit import CommitRecord, max_record_bytes, parse_record, record_name
from potstill.storage.files.folder import StoreFolder
from potstill.storage.files.ipc_layout import parse_footer
from potstill.storage.files.unit_file import DecodedBatch, arrow_schema
from potstill.storage.rows.id_map import IdMap
from potstill.storage.rows.only_rows import check_held_row
from potstill.storage.rows.row_checks import check_tokens_columns
from potstill.storage.rows.row_types import Row, TargetsRow, TokensRow
from potstill.storage.rows.target_checks import check_kept_normaliser
from potstill.storage.rows.validation import validate
from potstill.storage.store.finding import Finding, kind_of, spans, told
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.unit_bytes import UnitEntry


@dataclass(frozen=True)
class UnitCheck:
    """What was found of a unit: its record where one can be read, and what is wrong where something is.

    `record_names`: the records that stand there up to the one that counts, or all of them where none can be read.
    """

    unit: int
    record: CommitRecord | None
    record_names: tuple[str, ...]
    finding: Finding | None


@dataclass(frozen=True, kw_only=True)
class UnitChecker:
    """Checks units of one store. `id_map`: None also where it is damaged, then rows that need it are not decoded."""

    folder: StoreFolder
    spec: RunSpec
    id_map: IdMap | None
    deep: bool

    def check(self, unit: int, *, generations: int, entry: UnitEntry | None) -> UnitCheck | None:
        """Check a unit of which `generations` records are listed; `entry`: what the manifest says of it, if any.

        None where the unit has no record and no manifest asks for one: it is still to be done.
        """
        record, names, errors = self._record(unit, max(1, generations))
        if record is None:
            if not names and entry is None:
                return None
            state = "is sealed but has no readable record" if entry is not None else "counts as not committed"
            reason = "; ".join(map(str, errors)) or f"{self.folder.url}/units/{record_name(unit)} is missing"
            kinds = {kind_of(error) for error in errors}
            kind = "refused" if "refused" in kinds else "record"
            text = f"{self.folder.url}: unit {unit} {state}: {reason}"
            return UnitCheck(unit, None, names, self._finding(unit, record_name(unit), kind, text))
        found = (record.file, record.num_bytes, record.sha256)
        if entry is not None and found != tuple(entry):
            text = f"{self.folder.url}/manifest.json: unit {unit} names {entry.file}, its record {record.file}"
            return UnitCheck(unit, record, names, self._finding(unit, entry.file, "record", text))
        try:
            return UnitCheck(unit, record, names, self._file(record))
        except NO_ANSWER:
            raise
        except StoreError as error:
            finding = self._finding(unit, record.file, kind_of(error), str(error))
            return UnitCheck(unit, record, names, finding)

    def _record(self, unit: int, generations: int) -> tuple[CommitRecord | None, tuple[str, ...], list[StoreError]]:
        """The first readable record, the names of those that stand there up to it, and why those before it fail."""
        names: list[str] = []
        errors: list[StoreError] = []
        for generation in range(generations):
            name = f"units/{record_name(unit, generation)}"
            try:
                value = read_checked(self.folder, name, max_bytes=max_record_bytes(self.spec))
                if value is not None:
                    names.append(name)
                    record = parse_record(value, unit=unit, spec=self.spec, where=f"{self.folder.url}/{name}")
                    return record, tuple(names), errors
            except NO_ANSWER:
                raise
            except StoreError as error:
                errors.append(error)
                if name not in names:
                    names.append(name)
        return None, tuple(names), errors

    def _finding(self, unit: int, file: str, kind: str, text: str, rows: tuple[tuple[int, int], ...] = ()) -> Finding:
        return Finding(part="unit", kind=kind, text=text, unit=unit, file=f"units/{file}", rows=rows)

    def _file(self, record: CommitRecord) -> Finding | None:
        name = f"units/{record.file}"
        where = f"{self.folder.url}/{name}"
        found = self.folder.size(name)
        if found is None:
            text = f"{where}: the file of unit {record.unit} is missing, its record says {record.num_bytes} bytes"
            return self._finding(record.unit, record.file, "missing", text, spans(record.rows))
        if found != record.num_bytes:
            text = f"{where}: {found} bytes, its record says {record.num_bytes}"
            return self._finding(record.unit, record.file, "size", text)
        return self._content(record, where) if self.deep else None

    def _content(self, record: CommitRecord, where: str) -> Finding | None:
        data = self._read(record)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            lost = spans(row for row, _ in self._lost_rows(record, data))
            text = f"{where}: content of unit {record.unit} does not fit its sha256; "
            text += f"rows {told(lost)} are lost" if lost else "every row of it can still be read"
            return self._finding(record.unit, record.file, "bytes", text, lost)
        layout = self._layout_problem(record, data, where)
        if layout is not None:
            return self._finding(record.unit, record.file, "layout", layout)
        bad = list(self._bad_rows(record, data, where))
        if not bad:
            return None
        rows = spans(row for row, _ in bad)
        text = f"{bad[0][1]}; {len(bad)} of {len(record.rows)} rows of unit {record.unit} are bad: {told(rows)}"
        return self._finding(record.unit, record.file, "rows", text, rows)

    def _read(self, record: CommitRecord) -> bytes:
        """The file; transport errors exist, so bytes that do not fit are read again before they count."""
        data = b""
        for _ in range(READ_ATTEMPTS):
            data = self.folder.read(f"units/{record.file}", max_bytes=record.num_bytes) or b""
            if hashlib.sha256(data).hexdigest() == record.sha256:
                break
        return data

    def _lost_rows(self, record: CommitRecord, data: bytes) -> Iterator[tuple[int, str]]:
        """Rows of the record batches whose bytes do not fit their crc32."""
        row = record.first_row
        for batch in record.batches:
            if zlib.crc32(data[batch.offset : batch.offset + batch.length]) != batch.crc32:
                yield from ((lost, "") for lost in range(row, row + batch.num_rows))
            row += batch.num_rows

    def _layout_problem(self, record: CommitRecord, data: bytes, where: str) -> str | None:
        try:
            blocks = parse_footer(data, where=where)
        except CorruptError as error:
            return str(error)
        listed = [(b.offset, b.length, b.crc32) for b in record.batches]
        if listed != [(o, n, zlib.crc32(data[o : o + n])) for o, n in blocks]:
            return f"{where}: batches in the footer are not those of the record"
        try:
            schema = ipc.open_file(pa.py_buffer(data)).schema
        except (pa.ArrowException, OSError, ValueError) as error:  # what Arrow raises on a forged footer
            return f"{where}: not an Arrow file ({error})"
        if not schema.equals(arrow_schema(self.spec, record.unit), check_metadata=True):
            return f"{where}: schema or fingerprint belongs to another run"
        return None

    def _bad_rows(self, record: CommitRecord, data: bytes, where: str) -> Iterator[tuple[int, str]]:
        """Decode every row; of each that cannot be decoded or breaks a rule its number and the reason."""
        if self.spec.id_map_sha256 is not None and self.id_map is None:
            return  # a finding of its own; without the table no row can be judged
        row = record.first_row
        for batch in record.batches:
            try:
                message = memoryview(data)[batch.offset : batch.offset + batch.length]
                decoded: DecodedBatch | StoreError = DecodedBatch(message, spec=self.spec, where=where)
            except StoreError as error:
                decoded = error
            for position in range(batch.num_rows):
                try:
                    if isinstance(decoded, StoreError):
                        raise decoded
                    self._check_row(record, decoded, position, row)
                except StoreError as error:
                    yield row, f"{where}, row {row}: {str(error).removeprefix(f'{where}: ')}"
                row += 1

    def _check_row(self, record: CommitRecord, batch: DecodedBatch, position: int, row: int) -> None:
        """Decode a row and hold it against its record and the rules of its kind. Raises StoreError."""
        place = row - record.first_row
        stats = {name: values[place] for name, values in record.stats.items()}
        found = batch.decode(position, row=row, stats=stats, id_map=self.id_map)
        sizes = (int(batch.num_tokens[position]), int(batch.num_entries[position]))
        if sizes != (record.num_tokens[place], record.num_entries[place]):
            raise CorruptError(f"batch says {sizes} tokens and entries, the record says otherwise")
        check_content(found, self.spec)


def check_content(row: Row, spec: RunSpec) -> None:
    """The rules that a decoded row keeps besides those of the decoder. Raises StoreError."""
    if isinstance(row, TokensRow):
        check_tokens_columns(row, spec)
    if isinstance(row, TargetsRow):
        validate(row.targets, vocab_size=spec.vocab_size, strict=False)
        if spec.normaliser == "kept":
            check_kept_normaliser(row.targets, strict=False)
        if spec.only_rows is not None:
            check_held_row(row.stats, row.targets.num_entries)
