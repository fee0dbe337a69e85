"""Size, speed and fidelity of the targets store beside plain layouts of the same targets.

    python -m benchmarks.store_codec [--positions 8192] [--vocab 32000 128256] [--store PATH] [--output FILE]

Targets come from the seeded stand-in teacher (benchmarks/teacher_stand_in.py) at two entropies, or from a real
targets store. Store sizes are those of whole unit files with every side column (tail, entropy, label log-probability
and rank); the tokens store is given beside them. Files that other projects' writers made are read from a folder beside
the checkout, where it exists, and stand beside the store on the same targets. Prints tables; the last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import zstandard

from benchmarks.foreign_codec import FOLDER, run_foreign
from benchmarks.teacher_stand_in import TOP, Dump, calibration, make_dumps
from potstill.storage import RunSpec, SparseTargets, StoreReader, TargetsRow, TokensRow, token_digest
from potstill.storage.files.unit_file import DecodedBatch, EncodedUnit, encode_unit
from potstill.storage.rows.codec import planes_of
from potstill.storage.rows.id_map import IdMap

REPEATS = 7


@dataclass(frozen=True)
class Result:
    """Figures of one store layout; speeds in tokens per CPU second on one core."""

    name: str
    num_entries: float
    store_bytes: float
    side_bytes: float
    ranked_bytes: float
    bound_bytes: float
    encode_rate: float
    decode_rate: float
    kl_mean: float
    kl_p99: float


def select(dump: Dump, mode: str) -> SparseTargets:
    """SparseTargets of one dump under a selection: `k64`, `topp95`, `draws12`, `draws50`."""
    side = {
        "entropy": dump.entropy,
        "label_logprob": np.minimum(dump.label_logprob, 0),
        "label_rank": dump.label_rank,
        "vocab_size": dump.vocab_size,
    }
    if mode.startswith("draws"):
        n = int(mode[5:])
        offsets, ids, counts = dump.draws[n]
        lengths = np.diff(offsets)
        # Mass outside the drawn ids is not known from the top 128 alone; the mean coverage stands in for the column.
        tail = np.log1p(-np.minimum(np.exp(dump.logprobs[:, :TOP].astype(np.float64)).cumsum(1), 0.9999))
        log_tail = tail[np.arange(len(lengths)), np.minimum(lengths, TOP) - 1].astype(np.float32)
        return SparseTargets.build(offsets=offsets, ids=ids, counts=counts, num_draws=n, log_tail=log_tail, **side)
    mass = np.exp(dump.logprobs.astype(np.float64)).cumsum(1)
    kept = np.full(len(mass), 64)
    if mode == "topp95":
        kept = np.minimum((mass < 0.95).sum(1) + 1, 100)
    mask = np.arange(TOP)[None] < kept[:, None]
    tail = np.log(np.maximum(1 - mass[np.arange(len(mass)), kept - 1], 1e-30)).astype(np.float32)
    order = np.lexsort((dump.ids, -dump.logprobs))  # ties by ascending id
    ids, logprobs = np.take_along_axis(dump.ids, order, 1), np.take_along_axis(dump.logprobs, order, 1)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
    return SparseTargets.build(
        offsets=offsets, ids=ids[mask], logprobs=np.minimum(logprobs[mask], 0), log_tail=tail, strict=True, **side
    )


def spec_for(mode: str, vocab_size: int, num_tokens: int) -> RunSpec:
    selection = {"mode": "top_k", "k": 100}
    if mode.startswith("draws"):
        selection = {"mode": "sample", "num_draws": int(mode[5:])}
    return RunSpec(
        kind="targets",
        row_length=num_tokens,
        rows_per_unit=1,
        num_rows=1,
        vocab_size=vocab_size,
        tokenizer_digest="stand-in",
        input_digest="stand-in",
        selection=selection,
    )


def best(work: Callable[[], object]) -> float:
    """CPU seconds of the best of a few calls."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def measure(name: str, targets: SparseTargets, mode: str, vocab_size: int, unigram: np.ndarray) -> Result:
    """Encode and decode one row of targets through real unit files."""
    n = targets.num_tokens
    spec = spec_for(mode, vocab_size, n)
    rows = [TargetsRow(0, 1, targets)]
    encoded = encode_unit(rows, spec=spec, unit=0, id_map=None)
    ranked = encode_unit(rows, spec=spec, unit=0, id_map=IdMap.from_frequencies(unigram))
    batch = encoded.batches[0]
    message = encoded.data[batch.offset : batch.offset + batch.length]

    def decode() -> SparseTargets:
        found = DecodedBatch(message, spec=spec, where="bench").decode(0, row=0, stats={}, id_map=None)
        assert isinstance(found, TargetsRow)
        return found.targets

    encode_seconds = best(lambda: encode_unit(rows, spec=spec, unit=0, id_map=None))
    decode_seconds = best(decode)
    kl = divergence(targets, decode()) if targets.logprobs is not None else np.zeros(1)
    return Result(
        name=name,
        num_entries=targets.num_entries / n,
        store_bytes=len(encoded.data) / n,
        side_bytes=side_bytes(encoded, spec) / n,
        ranked_bytes=len(ranked.data) / n,
        bound_bytes=order0_bytes(targets, spec, encoded, unigram) / n,
        encode_rate=n / encode_seconds,
        decode_rate=n / decode_seconds,
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
    )


def divergence(true: SparseTargets, stored: SparseTargets) -> np.ndarray:
    """KL(true || stored) per token over the k+1 buckets (entries and tail), each side renormalised by its sum."""

    def buckets(targets: SparseTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert targets.logprobs is not None
        p, tail = np.exp(targets.logprobs.astype(np.float64)), np.exp(targets.log_tail.astype(np.float64))
        return p, tail, np.add.reduceat(p, targets.offsets[:-1]) + tail

    p, p_tail, p_sum = buckets(true)
    q, q_tail, q_sum = buckets(stored)
    kept = np.diff(true.offsets)
    terms = p * (np.log(p) - np.log(q))
    tail = np.where(p_tail > 0, p_tail * (np.log(np.maximum(p_tail, 1e-300)) - np.log(np.maximum(q_tail, 1e-300))), 0)
    assert int(kept.min()) > 0
    return (np.add.reduceat(terms, true.offsets[:-1]) + tail) / p_sum - np.log(p_sum / q_sum)


def side_bytes(encoded: EncodedUnit, spec: RunSpec) -> int:
    """Compressed bytes of the per-token columns."""
    names = [p.name for p in planes_of(spec) if p.axis == "token"]
    decoded = _planes(encoded, spec)
    compressor = zstandard.ZstdCompressor(level=1)
    return sum(len(compressor.compress(decoded[name].tobytes())) for name in names)


def _planes(encoded: EncodedUnit, spec: RunSpec) -> dict[str, np.ndarray]:
    batch = encoded.batches[0]
    return DecodedBatch(encoded.data[batch.offset : batch.offset + batch.length], spec=spec, where="bench").planes(0)


def order0_bytes(targets: SparseTargets, spec: RunSpec, encoded: EncodedUnit, unigram: np.ndarray) -> float:
    """Order-0 bound: ids under a static prior (learned on even 1024-token windows, paid on odd ones, smoothed by the
    unigram), every other plane at its empirical entropy."""
    planes = _planes(encoded, spec)
    rest = sum(_entropy_bits(plane) for name, plane in planes.items() if not name.startswith("id")) / 8
    window = np.arange(targets.num_tokens) // 1024 % 2
    of_entry = np.repeat(window, np.diff(targets.offsets))
    learn, pay = targets.ids[of_entry == 0], targets.ids[of_entry == 1]
    if not len(learn) or not len(pay):
        learn = pay = targets.ids
    prior = np.bincount(learn, minlength=spec.vocab_size) + 0.05 * len(learn) * unigram / unigram.sum() + 1e-9
    bits = -np.log2(prior / prior.sum())[pay].mean()
    return rest + bits * targets.num_entries / 8


def _entropy_bits(plane: np.ndarray) -> float:
    counts = np.bincount(plane)
    p = counts[counts > 0] / max(1, len(plane))
    return float(-(p * np.log2(p)).sum() * len(plane))


def peers(targets: SparseTargets, vocab_size: int) -> dict[str, float]:
    """Bytes per token of plain layouts holding ids and fp16 log-probabilities only (no side columns)."""
    n, ids = targets.num_tokens, targets.ids
    values = (targets.logprobs if targets.logprobs is not None else targets.counts).astype(np.float16)  # type: ignore[union-attr]
    offsets = pa.array(targets.offsets.astype(np.int32))
    table = pa.table(
        {
            "ids": pa.ListArray.from_arrays(offsets, pa.array(ids)),
            "logprobs": pa.ListArray.from_arrays(offsets, pa.array(values)),
        }
    )
    out = {}
    for compression in (None, "lz4", "zstd"):
        sink = io.BytesIO()
        codec = pa.Codec("zstd", 1) if compression == "zstd" else compression
        with ipc.new_file(sink, table.schema, options=ipc.IpcWriteOptions(compression=codec, use_threads=False)) as w:
            w.write_table(table)
        out[f"arrow_int32_fp16_{compression or 'none'}"] = len(sink.getvalue()) / n
    sink = io.BytesIO()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={"ids.list.element": "BYTE_STREAM_SPLIT", "logprobs.list.element": "BYTE_STREAM_SPLIT"},
    )
    out["parquet_bss_zstd"] = len(sink.getvalue()) / n
    parts = [np.diff(targets.offsets).astype(np.uint8).tobytes(), (ids & 0xFFFF).astype(np.uint16).tobytes()]
    if vocab_size > 65536:
        parts.append(np.packbits((ids >> 16).astype(np.uint8)).tobytes())
    out["index17_fp16_zstd3"] = (
        len(zstandard.ZstdCompressor(level=3).compress(b"".join([*parts, values.tobytes()]))) / n
    )
    return out


def tokens_bytes(dump: Dump) -> float:
    """Bytes per token of the tokens store."""
    n = len(dump.tokens)
    spec = RunSpec(
        kind="tokens",
        row_length=n,
        rows_per_unit=1,
        num_rows=1,
        vocab_size=dump.vocab_size,
        tokenizer_digest="stand-in",
    )
    row = TokensRow(0, dump.tokens, np.array([n], np.int32))
    assert token_digest(row.tokens, row.doc_lens) >= 0
    return len(encode_unit([row], spec=spec, unit=0, id_map=None).data) / n


def row_text(r: Result) -> str:
    return (
        f"{r.name:<24}{r.num_entries:>8.1f}{r.store_bytes:>9.1f}{r.side_bytes:>7.2f}{r.ranked_bytes:>9.1f}"
        f"{r.bound_bytes:>9.1f}{r.encode_rate / 1e6:>8.2f}{r.decode_rate / 1e6:>8.2f}"
        f"{r.kl_mean:>10.1e}{r.kl_p99:>10.1e}"
    )


HEADER = (
    f"{'layout':<24}{'entries':>8}{'B/token':>9}{'side':>7}{'ranked':>9}{'order-0':>9}"
    f"{'enc M/s':>8}{'dec M/s':>8}{'KL mean':>10}{'KL p99':>10}"
)


def run_stand_in(vocab_sizes: list[int], positions: int, show: Callable[[str], None]) -> dict[str, float]:
    """All layouts on the stand-in teacher; returns the JSON figures."""
    figures: dict[str, float] = {}
    for vocab_size in vocab_sizes:
        for entropy, dump in make_dumps(vocab_size, (2.1, 1.4), positions=positions).items():
            shape = {k: round(v, 2) for k, v in calibration(dump).items()}
            show(f"\nV={vocab_size}, target entropy {entropy}: {shape}; tokens store {tokens_bytes(dump):.2f} B/token")
            show(HEADER)
            tag = f"h{round(entropy * 10)}_v{vocab_size // 1000}k"
            for mode in ("topp95", "k64", "draws50", "draws12"):
                targets = select(dump, mode)
                result = measure(f"{mode}_{tag}", targets, mode, vocab_size, dump.unigram)
                show(row_text(result))
                beside = peers(targets, vocab_size)
                show("    peers, ids and values only: " + ", ".join(f"{k} {v:.1f}" for k, v in beside.items()))
                figures |= {f"{mode}_{tag}_bytes": round(result.store_bytes, 2)}
                if mode == "topp95":
                    figures |= {f"{mode}_{tag}_bound_bytes": round(result.bound_bytes, 2)}
                if (mode, entropy) == ("topp95", 2.1):
                    figures |= headline(result)
                if (mode, entropy) == ("k64", 2.1):
                    figures["index17_fp16_zstd_k64_bytes"] = round(beside["index17_fp16_zstd3"], 2)
                    figures[f"k64_v{vocab_size // 1000}k_bytes"] = round(result.store_bytes, 2)
                if (mode, entropy) == ("draws50", 2.1):
                    figures[f"draws50_v{vocab_size // 1000}k_bytes"] = round(result.store_bytes, 2)
    return figures


def headline(result: Result) -> dict[str, float]:
    return {
        "kl_mean": float(f"{result.kl_mean:.3g}"),
        "kl_p99": float(f"{result.kl_p99:.3g}"),
        "encode_tokens_per_s": round(result.encode_rate),
        "decode_tokens_per_s": round(result.decode_rate),
    }


def run_store(path: str, show: Callable[[str], None]) -> dict[str, float]:
    """Bytes by column and decode speed of a real targets store."""
    reader = StoreReader(path)
    rows = min(reader.num_rows, 256)
    tokens = int(reader.row_lengths[:rows].sum())
    start = time.process_time()
    entries = sum(row.targets.num_entries for row in reader.iter_unit_rows(0, rows) if isinstance(row, TargetsRow))
    seconds = time.process_time() - start
    figures = {
        "store_bytes_per_token": round(reader.manifest.num_bytes / max(1, reader.num_tokens), 2),
        "store_entries_per_token": round(entries / max(1, tokens), 2),
        "store_decode_tokens_per_s": round(tokens / max(seconds, 1e-9)),
    }
    show(f"\nstore {path}: {figures}")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 128256])
    parser.add_argument("--store", help="a real targets store (path or URL) to measure as well")
    parser.add_argument("--foreign", type=Path, default=FOLDER, help="folder of other writers' files")
    parser.add_argument("--foreign-only", action="store_true", help="leave out everything else")
    parser.add_argument("--output", help="also write everything to this file")
    args = parser.parse_args()
    lines: list[str] = []

    def show(text: str) -> None:
        lines.append(text)
        print(text, flush=True)

    show(
        f"potstill store codec, {time.strftime('%Y-%m-%d')}, {platform.machine()} with {os.cpu_count()} cores "
        f"(load {os.getloadavg()[0]:.1f}), Python {platform.python_version()}, numpy {np.__version__}, pyarrow "
        f"{pa.__version__}, zstandard {zstandard.__version__}; CPU seconds, best of {REPEATS}, {args.positions} tokens"
    )
    figures: dict[str, Any] = {} if args.foreign_only else run_stand_in(args.vocab, args.positions, show)
    if args.store:
        figures |= run_store(args.store, show)
    figures |= run_foreign(show, args.foreign)
    show(json.dumps(figures))
    if args.output:
        with open(args.output, "w") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
