"""Mutated inputs for every parser of the storage room, shared by the plain, the hypothesis and the atheris fuzzers."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from potstill.storage import RunSpec, StoreError, StoreReader
from potstill.storage.files.checked_json import load_checked
from potstill.storage.files.commit import parse_record
from potstill.storage.files.ipc_layout import parse_batch, parse_footer
from potstill.storage.files.unit_file import DecodedBatch
from potstill.storage.store.index import column_types
from potstill.storage.store.seal import parse_manifest

INTERESTING = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**40, 2**62, -(2**63), 2**63 - 1)
GOLDEN = Path(__file__).parent / "golden"


class Targets:
    """Parsers under test with seeds for each; `run` raises only if a parser raises something but a StoreError."""

    def __init__(self) -> None:
        self.seeds: dict[str, list[bytes]] = {}
        self.parsers: dict[str, Callable[[bytes], object]] = {"footer": lambda data: parse_footer(data, where="fuzz")}
        self.seeds["footer"] = []
        self.seeds["run"] = []
        self.parsers["run"] = lambda data: RunSpec.from_json(as_object(data))
        for name in ("tokens", "targets", "sampled", "weighted", "scores", "masked", "kept", "rolled"):
            self._add_store(name)

    def _add_store(self, name: str) -> None:
        reader = StoreReader(GOLDEN / name)
        spec, units = reader.spec, reader.manifest.units
        data = (GOLDEN / name / "units" / units[0].file).read_bytes()
        self.seeds["footer"].append(data)
        self.seeds["run"].append(body(GOLDEN / name / "run.json"))
        self.seeds[f"batch {name}"] = [data[o : o + n] for o, n in parse_footer(data, where="seed")]

        def decode(message: bytes) -> object:
            batch = DecodedBatch(message, spec=spec, where="fuzz")
            rows = range(min(len(batch.rows), 8))
            ids = reader._id_map
            return [batch.decode(i, row=int(batch.rows[i]), stats={}, id_map=ids) for i in rows]

        self.parsers[f"batch {name}"] = decode
        self.seeds[f"record {name}"] = [body(GOLDEN / name / "units" / "u0000000.json")]
        self.parsers[f"record {name}"] = lambda data: parse_record(as_object(data), unit=0, spec=spec, where="fuzz")
        self.seeds[f"manifest {name}"] = [body(GOLDEN / name / "manifest.json")]
        self.parsers[f"manifest {name}"] = lambda data: parse_manifest(as_object(data), spec, where="fuzz")
        index = (GOLDEN / name / "index.arrow").read_bytes()
        types = column_types(spec.stats)

        def blocks(message: bytes) -> object:
            layout = parse_batch(message, where="fuzz", max_rows=4096, num_buffers=2 * len(types))
            return [layout.buffer(2 * i + 1, num_bytes=layout.num_rows * 4) for i in range(len(types))]

        self.seeds[f"index {name}"] = [index[o : o + n] for o, n in parse_footer(index, where="seed")]
        self.parsers[f"index {name}"] = blocks

    def run(self, name: str, data: bytes) -> bool:
        """True if the parser took the input, False if it refused it with a StoreError."""
        try:
            self.parsers[name](data)
        except StoreError:
            return False
        return True


def body(path: Path) -> bytes:
    return json.dumps(load_checked(path.read_bytes(), where="seed")).encode()


def as_object(data: bytes) -> dict[str, Any]:
    """What a forger can reach: any JSON object behind a checksum that fits."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise StoreError("not JSON") from None
    if not isinstance(value, dict):
        raise StoreError("not an object")
    return value


def mutate(rng: random.Random, data: bytes) -> bytes:
    """One to four random edits: bits, bytes, interesting integers, cuts, copies, insertions."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            return bytes(rng.randbytes(rng.randint(0, 64)))
        place = rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place] = rng.randrange(256)
        elif kind == 2:
            width = rng.choice((2, 4, 8))
            value = rng.choice(INTERESTING) & (256**width - 1)
            # Most fields of Arrow metadata are aligned.
            place = place // width * width
            out[place : place + width] = value.to_bytes(width, "little")
        elif kind == 3:
            del out[place : place + rng.randint(1, 64)]
        elif kind == 4:
            other = rng.randrange(len(out))
            out[place:place] = out[other : other + rng.randint(1, 64)]
        elif kind == 5:
            out = out[:place]
        else:
            out[place:place] = rng.randbytes(rng.randint(1, 8))
    return bytes(out)


def odd_values() -> list[Any]:
    return [None, True, -1, 0, 2**63, 2**70, 1e308, "", "x" * 300, "../../etc/passwd", [], {}, [[]], -0.5]


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Replace, drop or wrap one value somewhere in a JSON object, keeping it JSON."""
    value = json.loads(data)
    for _ in range(rng.randint(1, 2)):
        place: Any = value
        while True:
            keys = list(place.keys()) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
                place = place[key]
                continue
            if rng.random() < 0.2:
                del place[key]
            else:
                place[key] = rng.choice([*odd_values(), [place[key]], str(place[key])])
            break
    return json.dumps(value).encode()


def checksum_is_no_shield(data: bytes) -> bytes:
    """The same bytes as a checked JSON file."""
    return data[:-1] + b',"crc32":"%08x"}\n' % zlib.crc32(data[:-1])
