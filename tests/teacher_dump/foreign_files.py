"""Files of foreign targets, written by hand from the documented bytes, with none of the reading code.

The teacher is the bigram chain of tests/student_train/tiny.py: position t of a row is the chain's distribution after
tokens[t], so that what comes out of an import is known.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from potstill.storage import TokensRow
from tests.student_train import tiny

K = tiny.TOP_K


@dataclass(frozen=True)
class Truth:
    """ids int64 [n, k] and logprobs float32 [n, k] of every position of a row, most probable first."""

    row: TokensRow
    ids: np.ndarray
    logprobs: np.ndarray


def truth_of(row: TokensRow, k: int = K) -> Truth:
    logprobs = tiny.transition()[row.tokens]
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    return Truth(row, ids, np.take_along_axis(logprobs, ids, 1).astype(np.float32))


def bits_first(ids: Sequence[int], bits: int) -> list[int]:
    """Numbers of `bits` bits one after the other, the most significant bit first, as bytes."""
    text = "".join(format(number, f"0{bits}b") for number in ids)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


CURRENT_CONFIG = (
    "d: 48\nk: {k}\nexact_k: {k}\nexact_dtype: float32\npolynomial_terms: []\nterm_dtype: float32\n"
    "residual_bins: []\ndelta_encoding: false\nerror_diffusion: false\nnormalize_t: false\n"
)


def write_distillkit(folder: Path, truths: Sequence[Truth], *, row_group: int = 4, **columns: list[Any]) -> Path:
    """Lossless DistillKit files: exact float32 values, 6-bit ids, n - 1 positions; attention_mask by document."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compression_config.yaml").write_text(CURRENT_CONFIG.format(k=K))
    table = {
        "input_ids": [one.row.tokens.tolist() for one in truths],
        "compressed_logprobs": [
            [list(values.astype("<f4").tobytes()) for values in one.logprobs[:-1]] for one in truths
        ],
        "bytepacked_indices": [[bits_first(ids, 6) for ids in one.ids[:-1]] for one in truths],
        "attention_mask": [documents(one.row).tolist() for one in truths],
    } | columns
    nested = pa.list_(pa.list_(pa.uint8()))
    types = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": nested, "bytepacked_indices": nested}
    schema = pa.schema([(name, types.get(name, pa.list_(pa.int8()))) for name in table])
    pq.write_table(pa.table(table, schema=schema), folder / "data_0.parquet", row_group_size=row_group)
    return folder


def documents(row: TokensRow) -> np.ndarray:
    """1, 1, .., 2, .. by document."""
    return np.repeat(np.arange(1, len(row.doc_lens) + 1), row.doc_lens)


def write_topk(path: Path, truths: Sequence[Truth], values: Sequence[Any] | None = None, **columns: list[Any]) -> Path:
    """Columns input_ids, topk_ids and topk_logprobs or others; all n positions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "input_ids": [one.row.tokens.tolist() for one in truths],
        "topk_ids": [one.ids.tolist() for one in truths],
        "topk_logprobs": [one.logprobs.tolist() for one in truths] if values is None else list(values),
        "attention_mask": [documents(one.row).tolist() for one in truths],
    } | columns
    pq.write_table(pa.table({name: column for name, column in table.items() if column}), path, row_group_size=4)
    return path


def write_megatron(
    folder: Path, truths: Sequence[Truth], *, num_dp: int = 1, num_cp: int = 1, batch: int = 2, dtype: str = "float16"
) -> Path:
    """Tars of one rank each, two micro-batches an iteration; torch's own writer makes the members."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    per_iteration = 2 * num_dp * batch
    assert len(truths) % per_iteration == 0
    meta = {"hash": "0" * 32, "identifiers": {"seed": 1}, "saver": {"k": K, "p": None, "min_k": 1, "save_dtype": dtype}}
    num_iterations = len(truths) // per_iteration
    for cp in range(num_cp):
        for dp in range(num_dp):
            members = {}
            for iteration in range(num_iterations):
                lists: dict[str, list[Any]] = {"values": [], "indices_low": [], "bit_17": []}
                for micro in range(2):
                    first = iteration * per_iteration + (micro * num_dp + dp) * batch
                    group = truths[first : first + batch]
                    ids = _part(np.stack([one.ids for one in group], axis=1), cp, num_cp)
                    values = _part(np.stack([one.logprobs for one in group], axis=1), cp, num_cp)
                    lists["values"].append(torch.from_numpy(values.copy()).to(getattr(torch, dtype)))
                    lists["indices_low"].append(torch.from_numpy((ids & 0xFFFF).astype(np.uint16)))
                    lists["bit_17"].append(torch.from_numpy(ids >= 1 << 16))
                members[iteration] = torch_bytes(lists)
            write_tar(folder / f"cp{cp}_dp{dp}__{num_iterations - 1}.tar", members, meta)
    return folder


def _part(whole: np.ndarray, cp: int, num_cp: int) -> np.ndarray:
    """What rank `cp` of the context has of [S, ..]: pieces cp and 2 C - 1 - cp of 2 C."""
    pieces = np.split(whole, 2 * num_cp)
    return whole if num_cp == 1 else np.concatenate([pieces[cp], pieces[2 * num_cp - 1 - cp]])


def torch_bytes(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[int, bytes], meta: dict[str, Any]) -> Path:
    with tarfile.open(path, "w") as tar:
        parts = {"_meta.json": json.dumps(meta).encode()}
        parts |= {f"{n}.pt.zst": zstandard.ZstdCompressor(level=3).compress(data) for n, data in members.items()}
        for name, data in parts.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
