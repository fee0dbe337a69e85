"""Arrays that the processes of a node share: worked out by one of them, mapped by all, each byte checked before.

They lie in a private folder (`NodeFolder`), where no file is changed in place: a new one takes the name of an old one,
and who has the old one mapped keeps it. Files of stores are never mapped.

A file holds the arrays one after another, each at a multiple of 64 bytes, then a JSON map of key, note and arrays
(name, dtype, shape, offset, crc32), and at its end the length and crc32 of that JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.storage.errors import CorruptError, GaveUpError, ReadFailedError, WriteFailedError
from potstill.storage.files.checked_json import canonical
from potstill.storage.files.node_folder import NodeFolder
from potstill.storage.files.regular import open_regular
from potstill.storage.files.waiting import Wait, waiting_for

logger = logging.getLogger(__name__)

MAGIC = b"POTSHARE"
SUFFIX = ".arrays"
_END = struct.Struct("<QI8s")  # length and crc32 of the JSON, magic
_ALIGNMENT = 64
_PIECE_BYTES = 8 << 20
# Less than this is as soon worked out as it is shared.
SHARED_FROM_BYTES = 4 << 20

Add = Callable[[str, NDArray[Any]], None]
# Hands its arrays to `add`, one by one so that they need not be in memory together, and returns a note (JSON).
Build = Callable[[Add], Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class SharedArrays:
    """Read-only arrays by name, and the note that stands with them."""

    arrays: Mapping[str, NDArray[Any]]
    note: Mapping[str, Any]


def shared_arrays(node: NodeFolder | None, key: Mapping[str, Any], build: Build) -> SharedArrays:
    """What `build` makes, by one process of the node for all; by each for itself where there is no `node`.

    It must be a pure function of `key`, which names contents by their digests. Raises what `build` raises. Where the
    folder does not take the file, that is said, and this process holds its own arrays.
    """
    if node is None:
        return _own(build)
    text = canonical(key)
    name = hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX
    try:
        return node.once(name, partial(_write, build=build, key=text), partial(_load, key=text))
    except WriteFailedError as error:
        logger.warning("%s; this process works it out for itself", error)
        return _own(build)


def shared_note(node: NodeFolder | None, key: Mapping[str, Any], build: Callable[[], Mapping[str, Any]]) -> Any:
    """The note (JSON) that `build` makes, by one process of the node for all; for a check that costs reads."""
    return shared_arrays(node, key, lambda add: build()).note


def shared_from(node: NodeFolder | None, num_bytes: int) -> NodeFolder | None:
    """`node`, if sharing arrays of so many bytes is worth the while."""
    return node if num_bytes >= SHARED_FROM_BYTES else None


def _own(build: Build) -> SharedArrays:
    found: dict[str, NDArray[Any]] = {}
    note = build(found.__setitem__)
    for array in found.values():
        array.flags.writeable = False
    return SharedArrays(found, note)


def _write(path: Path, *, build: Build, key: str) -> None:
    entries: list[dict[str, Any]] = []
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:

        def add(name: str, array: NDArray[Any]) -> None:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            flat = np.ascontiguousarray(array)
            data = flat.reshape(-1).view(np.uint8).data
            place = {"name": name, "dtype": flat.dtype.str, "shape": list(flat.shape), "offset": file.tell()}
            entries.append({**place, "crc32": zlib.crc32(data)})
            file.write(data)
            file.flush()  # who waits sees by the size that this gets on

        note = build(add)
        body = canonical({"key": key, "note": dict(note), "arrays": entries}).encode()
        file.write(body + _END.pack(len(body), zlib.crc32(body), MAGIC))


def _load(path: Path, *, key: str) -> SharedArrays | None:
    """The arrays of a file that passes its checks; None where there is none, or a damaged one (that is said)."""
    where = str(path)
    try:
        return waiting_for(where, partial(_read, path, key))
    except FileNotFoundError:
        return None
    except GaveUpError:
        raise
    except (CorruptError, ReadFailedError) as error:
        logger.warning("%s; it is made again", error)
    except OSError as error:
        logger.warning("%s: cannot be read (%s); it is made again", where, error.strerror)
    return None


def _read(path: Path, key: str, wait: Wait) -> SharedArrays:
    fd = open_regular(path, where=str(path))
    try:
        size = os.fstat(fd).st_size
        value = _contents(fd, size, path)
        if value["key"] != key:
            raise CorruptError(f"{path}: it was made for something else")
        for entry in value["arrays"]:
            _check(fd, entry, path, wait)
        mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ) if value["arrays"] else None
    finally:
        os.close(fd)
    arrays = {entry["name"]: _view(mapped, entry) for entry in value["arrays"]}
    return SharedArrays(arrays, value["note"])


def _contents(fd: int, size: int, path: Path) -> dict[str, Any]:
    end = os.pread(fd, _END.size, max(0, size - _END.size))
    length, crc, magic = _END.unpack(end) if len(end) == _END.size else (0, 0, b"")
    if magic != MAGIC or length > size - _END.size:
        raise CorruptError(f"{path}: its {size} bytes do not end as they were written (cut or damaged)")
    body = os.pread(fd, length, size - _END.size - length)
    if len(body) != length or zlib.crc32(body) != crc:
        raise CorruptError(f"{path}: its list of contents does not fit its crc32")
    value: dict[str, Any] = json.loads(body)
    return value


def _check(fd: int, entry: Mapping[str, Any], path: Path, wait: Wait) -> None:
    left = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
    place, crc = int(entry["offset"]), 0
    while left:
        data = os.pread(fd, min(left, _PIECE_BYTES), place)
        if not data:
            break
        crc, place, left = zlib.crc32(data, crc), place + len(data), left - len(data)
        wait.moved()
    if left or crc != entry["crc32"]:
        raise CorruptError(f"{path}: array {entry['name']} does not fit its crc32")


def _view(mapped: mmap.mmap | None, entry: Mapping[str, Any]) -> NDArray[Any]:
    shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
    count = int(np.prod(shape, dtype=np.int64))
    if mapped is None or not count:
        return np.zeros(shape, dtype)
    found: NDArray[Any] = np.frombuffer(mapped, dtype, count, int(entry["offset"])).reshape(shape)
    return found
