"""Hostile stores: every parser refuses with a StoreError or reads; sizes are checked before memory is asked for."""

from __future__ import annotations

import random
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill.storage import CorruptError, StoreError, StoreReader
from potstill.storage.files.checked_json import load_checked
from potstill.storage.files.ipc_layout import MAX_EXPANSION, parse_batch
from potstill.storage.files.unit_file import NUM_HEAD_BUFFERS, DecodedBatch
from tests.campaign import tell
from tests.storage.mutations import GOLDEN, Targets, checksum_is_no_shield, mutate, mutate_json


@pytest.fixture(scope="module")
def parsers():
    return Targets()


def campaign(parsers, count, seed):
    rng = random.Random(seed)
    names = sorted(parsers.seeds)
    taken = 0
    for number in range(count):
        name = names[number % len(names)]
        data = rng.choice(parsers.seeds[name])
        is_json = name.startswith(("record", "run", "manifest"))
        data = mutate_json(rng, data) if is_json and rng.random() < 0.7 else mutate(rng, data)
        try:
            taken += parsers.run(name, data)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__} {error} for {data[:200]!r}...") from error
    return taken


def test_seeds_are_sound(parsers):
    for name, seeds in parsers.seeds.items():
        for data in seeds:
            assert parsers.run(name, data), name


def test_mutated_inputs_never_crash(parsers):
    assert campaign(parsers, 4000, seed=1) < 4000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_mutated_inputs(parsers, capsys):
    tracemalloc.start()
    taken = campaign(parsers, 110_000, seed=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with capsys.disabled():
        tell("mutated inputs of the parsers", {"tried": 110_000, "detected": 110_000 - taken, "harmless": taken})
        print(f"\n110000 mutated inputs, {taken} read, the rest refused, none crashed; peak memory {peak >> 20} MiB")
    assert peak < 1 << 28


@given(data=st.binary(max_size=400), name=st.sampled_from(["footer", "batch targets", "batch tokens", "index targets"]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_are_refused(parsers, data, name):
    assert not parsers.run(name, data)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=20,
    )
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_json_is_refused(parsers, value):
    import json

    data = json.dumps(value).encode()
    for name in ("run", "record targets", "manifest targets"):
        assert not parsers.run(name, data)
    if data.startswith(b"{") and len(data) > 2:
        assert load_checked(checksum_is_no_shield(data), where="fuzz") == value


def test_deep_nesting_is_refused():
    data = checksum_is_no_shield(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    with pytest.raises(CorruptError, match="not JSON"):
        load_checked(data, where="fuzz")


def first_message(name):
    reader = StoreReader(GOLDEN / name)
    entry = reader._locate(0)
    data = (GOLDEN / name / "units" / reader.manifest.units[0].file).read_bytes()
    return reader.spec, data[int(entry["offset"]) : int(entry["offset"]) + int(entry["length"])]


@pytest.mark.parametrize("declared", [1 << 40, 1 << 31, -5, 0])
def test_buffers_that_declare_huge_sizes_ask_for_no_memory(declared):
    """A small file whose buffers claim a terabyte; also with a zstd frame that claims the same."""
    spec, message = first_message("targets")
    layout = parse_batch(message, where="seed", max_rows=100, num_buffers=200)
    for number, (start, length) in enumerate(layout.buffers):
        if length < 12:
            continue
        for frame in (False, True):
            forged = bytearray(message)
            forged[start : start + 8] = struct.pack("<q", declared)
            if frame:
                # Frame header: magic, descriptor for an 8-byte content size, window, size.
                head = b"\x28\xb5\x2f\xfd\xc0\x58" + struct.pack("<q", declared)
                forged[start + 8 : start + 8 + len(head)] = head
            tracemalloc.start()
            try:
                with pytest.raises(StoreError):
                    DecodedBatch(bytes(forged), spec=spec, where="fuzz").planes(0)
                assert tracemalloc.get_traced_memory()[1] < 8 << 20, (number, declared)
            finally:
                tracemalloc.stop()


def test_rows_that_declare_more_than_the_run_allows_are_refused():
    spec, message = first_message("targets")
    layout = parse_batch(message, where="seed", max_rows=100, num_buffers=200)
    assert layout.num_rows == 4
    with pytest.raises(CorruptError, match="declares 4 rows"):
        parse_batch(message, where="fuzz", max_rows=3, num_buffers=200)
    with pytest.raises(CorruptError, match="vector of"):
        parse_batch(message, where="fuzz", max_rows=100, num_buffers=3)
    assert NUM_HEAD_BUFFERS == 10 and MAX_EXPANSION * 1024 <= 1 << 26
    import dataclasses

    with pytest.raises(CorruptError, match="longer than the row length 8"):
        DecodedBatch(message, spec=dataclasses.replace(spec, row_length=8), where="fuzz")


def test_an_honest_but_huge_frame_is_refused_by_what_the_row_may_hold():
    """A few bytes of zstd can stand for megabytes; the row's own counts bound them."""
    import zstandard

    spec, message = first_message("tokens")
    layout = parse_batch(message, where="seed", max_rows=100, num_buffers=200)
    start, length = next((s, n) for s, n in layout.buffers[NUM_HEAD_BUFFERS + 2 :] if n > 40)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))[: length - 8]
    forged = bytearray(message)
    forged[start : start + 8 + len(bomb)] = struct.pack("<q", 1 << 24) + bomb
    tracemalloc.start()
    try:
        with pytest.raises(CorruptError):
            DecodedBatch(bytes(forged), spec=spec, where="fuzz").planes(0)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
