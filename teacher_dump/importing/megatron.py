"""Megatron's indexed data sets: ids in `.bin`, an index in `.idx` (megatron-core, indexed_dataset.py; datatrove).

The index, little-endian: 9 bytes `MMIDIDX\\0\\0`, uint64 version 1, uint8 code of the type of the ids, uint64 number N
of sequences, uint64 number D of document bounds (documents + 1), int32 [N] tokens of each sequence, int64 [N] byte
offset of each in the .bin, int64 [D] bounds in sequences, and, in sets for several kinds of input only, int8 [N] modes.
Its arrays are memory-mapped, and each piece is checked before it is used: sequences must lie one after the other and
fill the .bin, so that every token is read once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.bounds import check_growing, choose_bounds
from potstill.teacher_dump.importing.token_file import (
    FlatArray,
    FlatFile,
    Ids,
    Reading,
    Segment,
    TokenFile,
    file_size,
    read_bytes,
)

_MAGIC, _OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_FLOATS = {6: "float64", 7: "float32"}
_BLOCK_DOCUMENTS, _BLOCK_SEQUENCES = 1 << 13, 1 << 20


@dataclass(frozen=True)
class SequenceBounds:
    """Documents as ranges of sequences: lengths int32 [N], byte offsets int64 [N], bounds int64 [D], modes int8 [N]."""

    lengths: FlatArray
    offsets: FlatArray
    bounds: FlatArray
    modes: FlatArray | None

    def segments(self, ids: Ids, skip: int) -> Iterator[Segment]:
        bounds = self.bounds.open()
        for first in range(skip, len(bounds) - 1, _BLOCK_DOCUMENTS):
            block = bounds[first : first + _BLOCK_DOCUMENTS + 1]
            check_growing(
                block, start=0, last=self.lengths.count, first=first, path=self.bounds.path, what="document bound"
            )
            places = self._places(int(block[0]), int(block[-1]), ids)
            yield Segment(first, int(places[0]), places[block[1:] - block[0]])

    def _places(self, begin: int, end: int, ids: Ids) -> Ids:
        """Where sequences begin..end begin, in tokens [end - begin + 1] int64. Raises UserError where one is wrong."""
        itemsize, total = ids.dtype.itemsize, len(ids)
        offsets = self.offsets.open()
        start = int(offsets[begin]) if begin < len(offsets) else total * itemsize
        places = np.empty(end - begin + 1, np.int64)
        places[0] = start // itemsize
        lengths = self.lengths.open()
        for piece in range(begin, end, _BLOCK_SEQUENCES):
            stop = min(piece + _BLOCK_SEQUENCES, end)
            sizes = lengths[piece:stop].astype(np.int64)
            here = start + np.concatenate([[0], np.cumsum(sizes * itemsize)])
            wrong = (sizes < 0) | (offsets[piece:stop] != here[:-1])
            if here[-1] > total * itemsize and not wrong.any():
                wrong[-1] = True
            if wrong.any():
                self._refuse(piece + int(np.argmax(wrong)), total * itemsize)
            if self.modes is not None and (modes := self.modes.open()[piece:stop]).any():
                number = piece + int(np.flatnonzero(modes)[0])
                raise UserError(
                    f"{self.lengths.path}: sequence {number} has mode {modes[number - piece]}; it is not text, and "
                    "only text can be imported"
                )
            places[piece - begin + 1 : stop - begin + 1] = here[1:] // itemsize
            start = int(here[-1])
        following = int(offsets[end]) if end < len(offsets) else total * itemsize
        if start != following:
            self._refuse(min(end, len(offsets) - 1), total * itemsize)
        return places

    def _refuse(self, number: int, num_bytes: int) -> NoReturn:
        raise UserError(
            f"{self.lengths.path}: sequence {number} has {int(self.lengths.open()[number])} tokens from byte "
            f"{int(self.offsets.open()[number])} on; sequences must lie one after the other and fill the {num_bytes} "
            "bytes of the .bin. One of the two files is damaged, or they do not belong together: write the set again"
        )


def open_file(path: Path, reading: Reading) -> TokenFile:
    """Open the pair that `path` (.idx or .bin) names. Raises UserError when they are not a set of token ids."""
    index, data = path.with_suffix(".idx"), path.with_suffix(".bin")
    code, num_sequences, num_bounds = _header(index)
    dtype = np.dtype(_DTYPES[code])
    lengths = FlatArray(index, np.dtype("<i4"), num_sequences, _HEADER.size)
    offsets = FlatArray(index, np.dtype("<i8"), num_sequences, lengths.offset + 4 * num_sequences)
    bounds = FlatArray(index, np.dtype("<i8"), num_bounds, offsets.offset + 8 * num_sequences)
    end = bounds.offset + 8 * num_bounds
    size = file_size(index)
    has_modes = num_sequences > 0 and size == end + num_sequences
    if size != end and not has_modes:
        raise UserError(
            f"{index} has {size} bytes, expected {end} for {num_sequences} sequences and {num_bounds} document bounds "
            f"(or {end + num_sequences} with modes); it is cut off or damaged: write the set again"
        )
    modes = FlatArray(index, np.dtype("i1"), num_sequences, end) if has_modes else None
    num_bytes = file_size(data)
    if num_bytes % dtype.itemsize:
        raise UserError(
            f"{data} has {num_bytes} bytes, which are no whole number of ids of {dtype.itemsize} bytes as {index.name} "
            "says; it is cut off, or the two do not belong together"
        )
    _check_ends(lengths, offsets, bounds, num_bytes, dtype.itemsize)
    recorded = SequenceBounds(lengths, offsets, bounds, modes) if reading.bounds in ("auto", "recorded") else None
    chosen, name, hints = choose_bounds(data, recorded, reading)
    ids = FlatArray(data, dtype, num_bytes // dtype.itemsize)
    return FlatFile((index, data), ids, chosen, {"dtype": dtype.name, "bounds": name}, hints=hints)


def _header(index: Path) -> tuple[int, int, int]:
    """(code of the type, sequences, document bounds) of an index."""
    file_size(index)
    header = read_bytes(index, _HEADER.size)
    if header[:8] == _OLD_MAGIC:
        raise UserError(
            f"{index} is an index of Megatron's old cached or lazy kind (TNTIDX); convert it to the mmap kind with the "
            "tools of the Megatron that wrote it"
        )
    if len(header) < _HEADER.size or header[:9] != _MAGIC:
        raise UserError(f"{index} begins with {header[:9]!r}, expected the index {_MAGIC!r} of a Megatron data set")
    _, version, code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{index} has version {version}; this reader knows version 1")
    if code in _FLOATS:
        raise UserError(f"{index}: the .bin holds {_FLOATS[code]} (code {code}), which are no token ids")
    if code not in _DTYPES:
        raise UserError(
            f"{index}: code {code} of the type of the ids is none of {sorted(_DTYPES)}; the file is damaged"
        )
    if num_bounds < 1:
        raise UserError(f"{index} counts no document bound, where there are documents + 1; the file is damaged")
    return code, num_sequences, num_bounds


def _check_ends(lengths: FlatArray, offsets: FlatArray, bounds: FlatArray, num_bytes: int, itemsize: int) -> None:
    """What costs nothing to look at before anything is written: the first and the last entry of each array."""
    index = lengths.path
    ends = bounds.open()
    if int(ends[0]) != 0 or int(ends[-1]) != lengths.count:
        raise UserError(
            f"{index}: document bounds go from {int(ends[0])} to {int(ends[-1])}, expected 0 to the {lengths.count} "
            "sequences; the file is damaged: write the set again"
        )
    first, last = 0, 0
    if lengths.count:
        first, length = int(offsets.open()[0]), int(lengths.open()[-1])
        last = int(offsets.open()[-1]) + length * itemsize
    if first != 0 or last != num_bytes:
        raise UserError(
            f"{index}: its sequences take bytes {first} to {last} of the .bin, which has {num_bytes}; a file is cut "
            "off, or they do not belong together: write the set again"
        )
