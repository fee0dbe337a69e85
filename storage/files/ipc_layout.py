"""A small, bounds-checked reader of Arrow IPC framing: footers, record-batch messages and their buffers.

Readers use it instead of a full Arrow parser for two reasons: each declared size is checked before anything is
allocated, and only the buffers that a run needs are decompressed. Files stay standard Arrow.
Format: Arrow columnar specification, "Serialization and Interprocess Communication"; FlatBuffers internals.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass

import zstandard

from potstill.storage.errors import CorruptError

MAGIC = b"ARROW1"
CONTINUATION = 0xFFFFFFFF
HEADER_RECORD_BATCH = 3
CODEC_ZSTD = 1
# A zstd block of 4 bytes can stand for at most 128 KiB, so no honest frame declares more than this ratio.
MAX_EXPANSION = 1 << 16
_local = threading.local()


class _Table:
    """One FlatBuffers table; every access is bounds-checked and raises CorruptError."""

    def __init__(self, data: memoryview, position: int, where: str) -> None:
        self.data, self.position, self.where = data, position, where
        vtable = position - self._unpack("<i", position)
        self.vtable, self.vtable_bytes = vtable, self._unpack("<H", vtable)

    def _unpack(self, code: str, position: int) -> int:
        if position < 0 or position + struct.calcsize(code) > len(self.data):
            raise CorruptError(f"{self.where}: metadata points outside its {len(self.data)} bytes")
        value: int = struct.unpack_from(code, self.data, position)[0]
        return value

    def _slot(self, index: int) -> int:
        entry = 4 + 2 * index
        offset = self._unpack("<H", self.vtable + entry) if entry + 2 <= self.vtable_bytes else 0
        return self.position + offset if offset else 0

    def number(self, index: int, code: str, default: int = 0) -> int:
        slot = self._slot(index)
        return self._unpack(code, slot) if slot else default

    def table(self, index: int) -> _Table | None:
        slot = self._slot(index)
        return _Table(self.data, slot + self._unpack("<I", slot), self.where) if slot else None

    def structs(self, index: int, code: str, *, limit: int) -> list[tuple[int, ...]]:
        """A vector of structs as tuples; `limit` bounds its declared length."""
        slot = self._slot(index)
        if not slot:
            return []
        start = slot + self._unpack("<I", slot)
        count, size = self._unpack("<I", start), struct.calcsize(code)
        if count > limit or start + 4 + count * size > len(self.data):
            raise CorruptError(f"{self.where}: metadata declares a vector of {count} items, which cannot be")
        return [tuple(t) for t in struct.iter_unpack(code, self.data[start + 4 : start + 4 + count * size])]


@dataclass(frozen=True)
class BatchLayout:
    """Where the buffers of one record batch lie inside its encapsulated message."""

    num_rows: int
    buffers: tuple[tuple[int, int], ...]
    compressed: bool
    message: memoryview
    where: str

    def buffer(self, index: int, *, num_bytes: int) -> memoryview:
        """Decoded bytes of buffer `index`, of which exactly the first `num_bytes` are wanted."""
        if index >= len(self.buffers):
            raise CorruptError(f"{self.where}: batch has {len(self.buffers)} buffers, expected more")
        start, length = self.buffers[index]
        raw = self.message[start : start + length]
        if self.compressed and length:
            raw = _decompress(raw, num_bytes, self.where)
        if len(raw) < num_bytes:
            raise CorruptError(f"{self.where}: buffer {index} holds {len(raw)} bytes, expected {num_bytes}")
        return raw[:num_bytes]


def _root(data: memoryview, where: str) -> _Table:
    if len(data) < 8:
        raise CorruptError(f"{where}: metadata of {len(data)} bytes is too short")
    return _Table(data, struct.unpack_from("<I", data, 0)[0], where)


def parse_batch(message: bytes | memoryview, *, where: str, max_rows: int, num_buffers: int) -> BatchLayout:
    """Parse one encapsulated record-batch message (continuation, size, metadata, body)."""
    view = memoryview(message)
    if len(view) < 16:
        raise CorruptError(f"{where}: message of {len(view)} bytes is too short")
    marker, metadata_bytes = struct.unpack_from("<Ii", view, 0)
    body = 8 + metadata_bytes
    if marker != CONTINUATION or metadata_bytes < 8 or body > len(view):
        raise CorruptError(f"{where}: message header is damaged (marker {marker:#x}, metadata {metadata_bytes} bytes)")
    root = _root(view[8:body], where)
    header = root.table(2)
    if root.number(1, "<B") != HEADER_RECORD_BATCH or header is None:
        raise CorruptError(f"{where}: message is not a record batch")
    if root.number(3, "<q") > len(view) - body:
        raise CorruptError(f"{where}: body of {root.number(3, '<q')} bytes declared, {len(view) - body} present")
    num_rows = header.number(0, "<q")
    if not 0 <= num_rows <= max_rows:
        raise CorruptError(f"{where}: batch declares {num_rows} rows, at most {max_rows} expected")
    if any(nulls for _, nulls in header.structs(1, "<qq", limit=num_buffers)):
        raise CorruptError(f"{where}: batch declares null values, the format has none")
    buffers = []
    for offset, length in header.structs(2, "<qq", limit=num_buffers):
        if offset < 0 or length < 0 or body + offset + length > len(view):
            raise CorruptError(f"{where}: buffer at {offset} of {length} bytes lies outside the message")
        buffers.append((body + offset, length))
    compression = header.table(3)
    if compression is not None and compression.number(0, "<b") != CODEC_ZSTD:
        raise CorruptError(f"{where}: batch is compressed with codec {compression.number(0, '<b')}, expected zstd")
    return BatchLayout(num_rows, tuple(buffers), compression is not None, view, where)


def parse_footer(data: bytes | memoryview, *, where: str) -> list[tuple[int, int]]:
    """(offset, length) of each record-batch message of a whole IPC file."""
    view = memoryview(data)
    if len(view) < 24 or bytes(view[:6]) != MAGIC or bytes(view[-6:]) != MAGIC:
        raise CorruptError(f"{where}: {len(view)} bytes without the Arrow file marks (truncated or not an Arrow file)")
    size = struct.unpack_from("<i", view, len(view) - 10)[0]
    if not 8 <= size <= len(view) - 18:
        raise CorruptError(f"{where}: footer of {size} bytes cannot be")
    footer = _root(view[len(view) - 10 - size : len(view) - 10], where)
    blocks = []
    for offset, metadata_bytes, body_bytes in footer.structs(3, "<qi4xq", limit=len(view) // 16):
        if min(offset, metadata_bytes, body_bytes) < 0 or offset + metadata_bytes + body_bytes > len(view):
            raise CorruptError(f"{where}: footer points at {offset}, outside the file")
        blocks.append((offset, metadata_bytes + body_bytes))
    return blocks


def _decompress(raw: memoryview, wanted: int, where: str) -> memoryview:
    if len(raw) < 8:
        raise CorruptError(f"{where}: compressed buffer of {len(raw)} bytes has no size")
    declared = struct.unpack_from("<q", raw, 0)[0]
    body = raw[8:]
    if declared == -1:
        return body
    # Arrow may pad a buffer to 64 bytes; anything larger than that is not ours.
    if not wanted <= declared <= wanted + 64 or declared > len(body) * MAX_EXPANSION:
        raise CorruptError(f"{where}: buffer declares {declared} bytes, expected {wanted}")
    try:
        content = zstandard.get_frame_parameters(body).content_size
        if content not in (declared, zstandard.CONTENTSIZE_UNKNOWN):
            raise CorruptError(f"{where}: compressed frame declares {content} bytes, expected {declared}")
        plain = _decompressor().decompress(body, max_output_size=declared)
    except zstandard.ZstdError as error:
        raise CorruptError(f"{where}: compressed buffer is damaged ({error})") from None
    if len(plain) != declared:
        raise CorruptError(f"{where}: buffer decompressed to {len(plain)} bytes, expected {declared}")
    return memoryview(plain)


def _decompressor() -> zstandard.ZstdDecompressor:
    # A decompressor holds state and must not be shared between threads.
    if not hasattr(_local, "zstd"):
        _local.zstd = zstandard.ZstdDecompressor()
    found: zstandard.ZstdDecompressor = _local.zstd
    return found
