"""Raw arrays of ids: NumPy's `.npy`, and files of nothing but ids (`.npy` of OLMo-core and dolma, `.bin` of nanoGPT).

A file that begins with NumPy's own magic is read by its header. One that begins with a header of llm.c (256 int32;
also modded-nanogpt) is read after it. Any other file is ids from the first byte on, of a type that nothing records.
Documents end as the `.csv.gz` beside a file says (OLMo-core, dolma), else after each end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.errors import UserError
from potstill.teacher_dump.importing.bounds import CsvBounds, choose_bounds
from potstill.teacher_dump.importing.columns import document_lengths
from potstill.teacher_dump.importing.token_file import (
    FlatArray,
    FlatFile,
    Reading,
    TokenFile,
    TokenRecord,
    file_size,
    read_bytes,
)

_NUMPY_MAGIC = b"\x93NUMPY"
# First int32 of a header of llm.c (dev/data/data_common.py, write_datafile): version and type that go with it.
_LLMC = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
_LLMC_HEADER = 256 * 4
_OTHERS = {
    b"PK\x03\x04": "a zip archive, such as a checkpoint of torch",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"MMIDIDX": "the index of a Megatron data set",
}
_SAMPLE_TOKENS, _FEWEST = 1 << 16, 64


@dataclass(frozen=True)
class ArrayRows:
    """A TokenFile over a two-dimensional `.npy` [rows, length]: each row is a record."""

    paths: tuple[Path, ...]
    ids: FlatArray
    length: int
    reading: Reading
    facts: Mapping[str, Any]
    has_mask: bool = False
    word: str = "row"
    hints: tuple[str, ...] = ()

    def records(self, skip: int) -> Iterator[TokenRecord]:
        """The rows from number `skip` on."""
        ids = self.ids.open()
        for number in range(skip, self.ids.count // self.length if self.length else 0):
            end = (number + 1) * self.length
            row = ids[end - self.length : end]
            lengths = document_lengths(row, np.zeros(len(row), np.bool_), self.reading)
            yield TokenRecord(number, row, self.ids.offset + end * ids.dtype.itemsize, None, lengths)


def open_file(path: Path, reading: Reading) -> TokenFile:
    """Open an array of ids. Raises UserError where its header, size or type cannot be one."""
    head = read_bytes(path, 16)
    kind = next((kind for magic, kind in _OTHERS.items() if head.startswith(magic)), None)
    if kind is not None:
        raise UserError(f"{path} is {kind}, no array of ids; name the files of ids (or their kind by --format)")
    if head.startswith(_NUMPY_MAGIC):
        ids, shape = _numpy_array(path)
        _check_type(ids, reading)
        if len(shape) == 2:
            facts = {"dtype": ids.dtype.name, "bounds": "end_token" if reading.bounds == "end_token" else "records"}
            return ArrayRows((path,), ids, shape[1], reading, facts)
        return flat_file(path, ids, reading)
    magic = int.from_bytes(head[:4], "little")
    if magic in _LLMC:
        ids = _llmc_array(path, magic)
        _check_type(ids, reading)
        return flat_file(path, ids, reading)
    return flat_file(path, headerless(path, dtype=reading.dtype, vocab_size=reading.vocab_size), reading)


def _check_type(ids: FlatArray, reading: Reading) -> None:
    """Refuse a type that was named where the file says another."""
    if reading.dtype not in (None, ids.dtype.name):
        raise UserError(
            f"{ids.path} says that its ids are {ids.dtype.name}, and --dtype is {reading.dtype}; leave it out"
        )


def flat_file(path: Path, ids: FlatArray, reading: Reading) -> FlatFile:
    """A file of ids, with the bounds that lie beside it where there are some."""
    table = path.with_name(f"{path.stem}.csv.gz")
    recorded = CsvBounds(table) if table.is_file() and reading.bounds in ("auto", "recorded") else None
    bounds, name, hints = choose_bounds(path, recorded, reading)
    paths = (path, table) if recorded is not None else (path,)
    return FlatFile(paths, ids, bounds, {"dtype": ids.dtype.name, "bounds": name}, hints=hints)


def headerless(path: Path, *, dtype: str | None, vocab_size: int) -> FlatArray:
    """A file that is nothing but ids, little-endian, of `dtype`; None: by the size of the vocabulary, as writers do.

    Raises UserError where the file's size does not fit the type, or its beginning shows a wider one.
    """
    chosen = np.dtype(dtype or ("uint16" if vocab_size <= 1 << 16 else "uint32")).newbyteorder("<")
    num_bytes = file_size(path)
    if num_bytes % chosen.itemsize:
        raise UserError(
            f"{path} has {num_bytes} bytes, which are no whole number of ids of {chosen.itemsize} bytes "
            f"({chosen.name}); it is cut off, or name the type of the ids (--dtype)"
        )
    ids = FlatArray(path, chosen, num_bytes // chosen.itemsize)
    if dtype is None:
        sample = ids.open()[:_SAMPLE_TOKENS]
        pairs = sample[: len(sample) // 2 * 2].reshape(-1, 2)
        # Ids below 2^16 in a type of twice the width: every second number is 0, and the others are valid ids.
        if 2 * len(pairs) >= _FEWEST and not pairs[:, 1].any() and pairs[:, 0].any():
            raise UserError(
                f"{path}: read as {chosen.name}, every second id is 0, as if the ids had {2 * chosen.itemsize} bytes; "
                f"name their type (--dtype uint{16 * chosen.itemsize}, or --dtype {chosen.name} if that is right)"
            )
    return ids


def _numpy_array(path: Path) -> tuple[FlatArray, tuple[int, ...]]:
    """The array after NumPy's header, and its shape: one or two dimensions of integers, in C order."""
    from numpy.lib import format as npy

    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    try:
        with path.open("rb") as stream:
            version = npy.read_magic(stream)
            if version not in readers:
                raise ValueError(f"version {version} of the header")
            shape, fortran, dtype = readers[version](stream)
            offset = stream.tell()
    except Exception as error:  # of many kinds: the header is Python text
        raise UserError(
            f"{path} begins as a NumPy file, but its header cannot be read: {error}; write it again"
        ) from error
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or (fortran and len(shape) == 2):
        order = " in Fortran order" if fortran else ""
        raise UserError(
            f"{path} holds {dtype} {list(shape)}{order}; expected integers [tokens] or [rows, length] in C order"
        )
    count, num_bytes = int(np.prod(shape, dtype=object)), file_size(path)
    if num_bytes != offset + count * dtype.itemsize:
        raise UserError(
            f"{path} has {num_bytes} bytes, expected {offset + count * dtype.itemsize} for {list(shape)} of {dtype}; "
            "it is cut off or damaged: write it again"
        )
    return FlatArray(path, dtype, count, offset), shape


def _llmc_array(path: Path, magic: int) -> FlatArray:
    """The ids after a header of llm.c: int32 [256], of which magic, version and number of tokens are used."""
    wanted, dtype = _LLMC[magic][0], np.dtype(_LLMC[magic][1])
    header = np.frombuffer(read_bytes(path, 12).ljust(12, b"\0"), "<i4")
    version, count = int(header[1]), int(header[2])
    size = file_size(path)
    if version != wanted or size != _LLMC_HEADER + count * dtype.itemsize:
        raise UserError(
            f"{path} begins as a file of llm.c (magic {magic}): version {version} and {count} tokens in {size} bytes, "
            f"expected version {wanted} and {_LLMC_HEADER + count * dtype.itemsize} bytes; it is damaged. If it is no "
            "such file, its first two ids cannot be told from that magic: put it into a .npy"
        )
    return FlatArray(path, dtype, count, _LLMC_HEADER)
