"""JSON files that carry their own checksum: canonical text whose last field is the crc32 of all before it."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

from potstill.storage.errors import CorruptError, StoreError, TornError
from potstill.storage.files.folder import StoreFolder

READ_ATTEMPTS = 3
TAIL_BYTES = len(b',"crc32":"00000000"}\n')
_TAIL = re.compile(rb',"crc32":"[0-9a-f]{8}"\}\n')


def canonical(value: Mapping[str, Any]) -> str:
    """Sorted keys, no spaces, ASCII, no NaN: equal values give equal text on every machine."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"value cannot be written as JSON: {error}; use finite numbers, text, lists, maps") from None


def dump_checked(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON of a non-empty map with `crc32` (hex, of every byte before `,"crc32"`) as its last field."""
    if not value or "crc32" in value:
        raise StoreError("a checked JSON file needs fields, none of them named crc32")
    body = canonical(value)[:-1].encode("ascii")
    return body + b',"crc32":"%08x"}\n' % zlib.crc32(body)


def is_torn(data: bytes) -> bool:
    """Whether a checked file was never finished: it has no checksum at its end, right or wrong."""
    return _TAIL.fullmatch(data[-TAIL_BYTES:]) is None


def fits_checksum(data: bytes) -> bool:
    """Whether a checked file was finished and its checksum is that of its bytes."""
    return not is_torn(data) and data[-TAIL_BYTES:] == b',"crc32":"%08x"}\n' % zlib.crc32(data[:-TAIL_BYTES])


def load_checked(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse and check; CorruptError names `where`, TornError a file that was never finished."""
    if is_torn(data):
        raise TornError(
            f"{where}: no checksum at the end of its {len(data)} bytes (torn or truncated file); run the command that "
            "writes it again, or restore the file from a copy"
        )
    if not fits_checksum(data):
        raise CorruptError(
            f"{where}: checksum at the end does not fit its {len(data)} bytes (damaged file); "
            "restore the file from a copy"
        )
    try:
        value = json.loads(data[:-TAIL_BYTES] + b"}")
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{where}: checksum fits but the text is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_checked(folder: StoreFolder, name: str, *, max_bytes: int) -> dict[str, Any] | None:
    """Read and check one file, or None when there is none; a bad checksum is read again, as transport errors exist."""
    for attempt in range(1, READ_ATTEMPTS + 1):
        data = folder.read(name, max_bytes=max_bytes)
        if data is None:
            return None
        try:
            return load_checked(data, where=f"{folder.url}/{name}")
        except CorruptError:
            if attempt == READ_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def get_int(value: Mapping[str, Any], key: str, *, where: str, low: int = 0, high: int = 1 << 62) -> int:
    """An integer field inside [low, high], else CorruptError."""
    found = value.get(key)
    if type(found) is not int or not low <= found <= high:
        raise CorruptError(f"{where}: field {key!r} is {found!r}, expected an integer in [{low}, {high}]")
    return found


def get_text(value: Mapping[str, Any], key: str, *, where: str) -> str:
    """A text field, else CorruptError."""
    found = value.get(key)
    if not isinstance(found, str):
        raise CorruptError(f"{where}: field {key!r} is {found!r}, expected text")
    return found


def get_list(value: Mapping[str, Any], key: str, *, where: str) -> list[Any]:
    """A list field, else CorruptError."""
    found = value.get(key)
    if not isinstance(found, list):
        raise CorruptError(f"{where}: field {key!r} is {type(found).__name__}, expected a list")
    return found
