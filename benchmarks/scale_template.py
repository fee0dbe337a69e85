"""One real unit file that stands for thousands: its bytes with other row numbers in them, and their checksums.

The rows of a unit carry their numbers. The template is encoded with numbers that do not compress, so that they lie in
it as they are and others of the same width can take their places; what that does to the crc32 of a record batch follows
from the numbers alone, as a checksum is linear: no unit is read to make its record.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from potstill.storage.files.unit_file import BatchEntry, EncodedUnit

SYNTHETIC = "-000000000000.arrow"  # how the names of data files end that are made of a template
TEMPLATES = "templates"  # folder beside the stores
NUMBER_BITS = 40  # of a row number
_ROW_BYTES = 8


def unlikely_numbers(count: int, *, seed: int) -> NDArray[np.uint64]:
    """Row numbers that do not compress."""
    return np.random.default_rng(seed).integers(1 << 60, 1 << 63, count, dtype=np.uint64)


def _applied(operator: NDArray[np.uint32], values: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A linear map of 32 bits, given by where it takes each bit, of many values."""
    out = np.zeros_like(values)
    for bit in range(32):
        out ^= np.where((values >> np.uint32(bit)) & np.uint32(1), operator[bit], np.uint32(0))
    return out


def _zero_byte_powers() -> list[NDArray[np.uint32]]:
    """What 2**n zero bytes behind it do to a crc32, n = 0 .. 31, as linear maps."""
    table = np.array([zlib.crc32(bytes([n])) ^ zlib.crc32(b"\0") for n in range(256)], np.uint32)
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    powers = [table[bits & np.uint32(255)] ^ (bits >> np.uint32(8))]
    for _ in range(31):
        powers.append(_applied(powers[-1], powers[-1]))
    return powers


@dataclass(frozen=True)
class Template:
    """`places` [R]: where in `data` the number of each row lies; `basis` [R, NUMBER_BITS]: what each bit does to the
    crc32 of its batch; `batches`: of unit 0."""

    data: bytes
    places: NDArray[np.int64]
    basis: NDArray[np.uint32]
    batches: tuple[BatchEntry, ...]
    num_tokens: tuple[int, ...]
    num_entries: tuple[int, ...]
    num_targets: int

    @property
    def rows_per_unit(self) -> int:
        return len(self.places)

    @property
    def row_bytes(self) -> NDArray[np.float64]:
        """Compressed bytes of each row of a unit [R]: its share of the batch that it lies in."""
        return np.repeat([b.length / b.num_rows for b in self.batches], [b.num_rows for b in self.batches])

    @classmethod
    def of(cls, encoded: EncodedUnit, numbers: NDArray[np.uint64]) -> Template:
        """The template of a unit that was encoded with the row numbers `numbers`, made into unit 0."""
        data, powers = bytearray(encoded.data), _zero_byte_powers()
        bits = np.uint64(1) << np.arange(NUMBER_BITS, dtype=np.uint64)
        empty = zlib.crc32(bytes(_ROW_BYTES))
        of_bit = np.array([zlib.crc32(int(bit).to_bytes(_ROW_BYTES, "little")) ^ empty for bit in bits], np.uint32)
        places, basis, batches, first = [], [], [], 0
        for batch in encoded.batches:
            end = batch.offset + batch.length
            held = numbers[first : first + batch.num_rows].tobytes()
            at = data.find(held, batch.offset, end)
            if at < 0:
                raise ValueError(f"the numbers of the rows from {first} on do not lie in their batch as they are")
            data[at : at + len(held)] = np.arange(first, first + batch.num_rows, dtype=np.uint64).tobytes()
            for place in range(at, at + len(held), _ROW_BYTES):
                values, behind = of_bit, end - place - _ROW_BYTES
                for power, operator in enumerate(powers):
                    values = _applied(operator, values) if behind >> power & 1 else values
                places.append(place)
                basis.append(values)
            crc = zlib.crc32(memoryview(data)[batch.offset : end])
            batches.append(BatchEntry(batch.offset, batch.length, crc, batch.num_rows))
            first += batch.num_rows
        return cls(
            data=bytes(data),
            places=np.array(places, np.int64),
            basis=np.array(basis, np.uint32),
            batches=tuple(batches),
            num_tokens=encoded.num_tokens,
            num_entries=encoded.num_entries,
            num_targets=encoded.num_targets,
        )

    def numbers(self, unit: int) -> NDArray[np.uint64]:
        first = unit * self.rows_per_unit
        return np.arange(first, first + self.rows_per_unit, dtype=np.uint64)

    def batches_of(self, unit: int) -> tuple[BatchEntry, ...]:
        """The record batches of a unit, with their checksums."""
        changed = self.numbers(unit) ^ self.numbers(0)
        bits = (changed[:, None] >> np.arange(NUMBER_BITS, dtype=np.uint64)) & np.uint64(1)
        by_row = np.bitwise_xor.reduce(np.where(bits, self.basis, np.uint32(0)), axis=1)
        starts = np.cumsum([0, *(batch.num_rows for batch in self.batches[:-1])])
        by_batch = np.bitwise_xor.reduceat(by_row, starts).tolist()
        pairs = zip(self.batches, by_batch, strict=True)
        return tuple(BatchEntry(b.offset, b.length, b.crc32 ^ crc, b.num_rows) for b, crc in pairs)

    def piece(self, unit: int, start: int, end: int) -> bytearray:
        """Bytes [start, end) of the data file of a unit."""
        out = bytearray(self.data[start:end])
        low, high = np.searchsorted(self.places, (start - _ROW_BYTES + 1, end))
        for place, number in zip(self.places[low:high].tolist(), self.numbers(unit)[low:high].tolist(), strict=True):
            held = number.to_bytes(_ROW_BYTES, "little")
            first, last = max(place, start), min(place + _ROW_BYTES, end)
            out[first - start : last - start] = held[first - place : last - place]
        return out

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(self.data)
        batches = np.array([tuple(vars(batch).values()) for batch in self.batches], np.int64)
        sizes = np.array([self.num_tokens, self.num_entries], np.int64)
        targets = np.array(self.num_targets)
        np.savez(
            folder / "figures", places=self.places, basis=self.basis, batches=batches, sizes=sizes, targets=targets
        )

    @classmethod
    def load(cls, folder: Path) -> Template:
        held = np.load(folder / "figures.npz")
        return cls(
            data=(folder / "data").read_bytes(),
            places=held["places"],
            basis=held["basis"],
            batches=tuple(BatchEntry(*map(int, row)) for row in held["batches"]),
            num_tokens=tuple(held["sizes"][0].tolist()),
            num_entries=tuple(held["sizes"][1].tolist()),
            num_targets=int(held["targets"]),
        )
