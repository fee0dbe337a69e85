"""Files of token ids as other programs write them, made byte by byte from their descriptions, and one more format.

Nothing here uses the reading code: what a file means is what these functions put into it.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from potstill.teacher_dump.importing.token_file import Reading, TokenFile, TokenRecord

END = 0  # id of the end token in tests/teacher_dump/conftest.py's tokenizer, of 300 entries
VOCAB = 300
CODES = {"<u1": 1, "<i1": 2, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}

Documents = list[list[int]]


def some_documents(count: int, *, seed: int = 0, longest: int = 60, vocab_size: int = VOCAB) -> Documents:
    """Documents of ids 1 to vocab_size - 1 that end with END; some are of two tokens."""
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, vocab_size, rng.integers(1, longest)).tolist(), END] for _ in range(count)]


def joined(documents: Documents) -> list[int]:
    return [token for document in documents for token in document]


def write_ids(path: Path, documents: Documents, dtype: str = "<u2") -> Path:
    path.write_bytes(np.array(joined(documents), dtype).tobytes())
    return path


def megatron(
    prefix: Path, documents: Documents, dtype: str = "<u2", *, sequences: int = 1, modes: bytes = b"", code: int = 0
) -> Path:
    """The .bin and .idx of a set: each document as so many sequences; returns the prefix."""
    pieces = [np.array_split(np.array(document, dtype), sequences) for document in documents]
    lengths = [len(piece) for document in pieces for piece in document]
    size = np.dtype(dtype).itemsize
    write_ids(prefix.with_name(f"{prefix.name}.bin"), documents, dtype)
    places = np.cumsum([0, *lengths])[:-1] * size
    bounds = range(0, len(lengths) + 1, sequences)
    prefix.with_name(f"{prefix.name}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code or CODES[dtype], len(lengths), len(documents) + 1)
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *places.tolist())
        + struct.pack(f"<{len(documents) + 1}q", *bounds)
        + modes
    )
    return prefix


def numpy_array(path: Path, array: np.ndarray) -> Path:
    """A real .npy, version 1.0 of the header."""
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}"
    header = text.encode().ljust(118 - 1) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + array.tobytes())
    return path


def csv_bounds(path: Path, documents: Documents, *, more: str = "") -> Path:
    """The .csv.gz of OLMo-core (and of dolma, with more columns)."""
    ends = np.cumsum([0, *map(len, documents)]).tolist()
    lines = [f"{start},{end}{more}\n" for start, end in pairwise(ends)]
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return path


def llmc(path: Path, documents: Documents) -> Path:
    """A shard of llm.c for GPT-2: 256 int32 of a header, then uint16."""
    ids = joined(documents)
    path.write_bytes(struct.pack("<3i", 20240520, 1, len(ids)).ljust(1024, b"\0") + np.array(ids, "<u2").tobytes())
    return path


def datatrove(path: Path, documents: Documents, *, loss: Sequence[int] | None = None) -> Path:
    """A .ds with its index, metadata, and loss mask where there is one."""
    write_ids(path, documents)
    ends = np.cumsum([len(document) for document in documents]).tolist()
    path.with_name(f"{path.name}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name(f"{path.name}.metadata").write_text(f"some/tokenizer|2\n{ends[-1]}\n0.1 kT")
    if loss is not None:
        path.with_name(f"{path.name}.loss").write_bytes(bytes(loss))
    return path


def parquet(path: Path, columns: dict[str, Any], *, group: int = 1 << 20) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def arrow_stream(path: Path, columns: dict[str, Any], *, batch: int = 1 << 20) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def arrow_file(path: Path, columns: dict[str, Any], *, batch: int = 1 << 20) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def saved_to_disk(folder: Path, shards: Sequence[dict[str, Any]]) -> Path:
    """A folder of save_to_disk: streams, state.json, and a file of the cache, which is no shard."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, columns in zip(names, shards, strict=True):
        arrow_stream(folder / name, columns)
    arrow_stream(folder / "cache-0a1b.arrow", shards[0])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


class Numerals:
    """A format that stands nowhere else: a line of decimal numbers for each document."""

    has_mask, word = False, "line"
    hints: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.paths, self.facts = (path,), {"bounds": "records"}

    def records(self, skip: int) -> Iterator[TokenRecord]:
        for number, line in enumerate(self.paths[0].read_text().splitlines()):
            if number >= skip:
                yield TokenRecord(number, np.array(line.split(), np.int64), 0)


def open_file(path: Path, reading: Reading) -> TokenFile:
    """What the module of a format has."""
    return Numerals(path)
