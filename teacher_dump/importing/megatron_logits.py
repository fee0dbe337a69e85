"""Megatron-LM's cached teacher logits: tars of `.pt.zst` members, one for each iteration, by data and context rank.

Source: NVIDIA/Megatron-LM, megatron/training/distillation (commit d98e8a6). A member is a torch.save of three lists,
one tensor [S, B, K] for each micro-batch: values (log-probabilities over the vocabulary, -1000: no entry),
indices_low (uint16) and bit_17 of the token ids. The files hold no tokens: sequence number r of the order iteration,
micro-batch, data rank, place in the micro-batch belongs to row r of a tokens store.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from potstill.common.errors import UserError
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_records import (
    NO_BOUNDS,
    Entries,
    ForeignRecord,
    FoundRecord,
    SourceFacts,
    TargetsSource,
)
from potstill.teacher_dump.importing.table_files import expanded
from potstill.teacher_dump.importing.targets_config import ImportTargetsConfig
from potstill.teacher_dump.importing.torch_tensors import UnsafeFileError, load_tensors
from potstill.teacher_dump.inputs import InputFile, digest_files
from potstill.teacher_dump.records.base import BadRecord

META_NAME = "_meta.json"
ABSENT = -1000.0  # exact in float16 and bfloat16
_TAR_NAME = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
_MEMBER_NAME = re.compile(r"(\d+)\.pt\.zst")
_KEYS = ("values", "indices_low", "bit_17")


@dataclass(frozen=True)
class Member:
    """Where the logits of one iteration and rank lie: bytes [offset, offset + num_bytes) of a tar."""

    tar: Path
    offset: int
    num_bytes: int


def recognises(inputs: Sequence[str]) -> bool:
    """Whether the first input is a tar of a name that Megatron-LM gives, or a folder with some."""
    return bool(_tars_at(expanded(inputs)[0]))


def open_source(config: ImportTargetsConfig) -> TargetsSource:
    """Raises UserError: no such tars, ranks or iterations missing, tars of different runs."""
    return MegatronLogits(_find_tars(config.input))


def _find_tars(inputs: Sequence[str]) -> list[InputFile]:
    files: list[InputFile] = []
    for entry in expanded(inputs):
        named = _tars_at(entry)
        if not named:
            raise UserError(f"input {entry!r}: expected files cp0_dp0__ITERATION.tar of Megatron-LM, found none")
        files += [InputFile(one, one.name, "tar", "", one.stat().st_size) for one in named]
    return files


def _tars_at(entry: str) -> list[Path]:
    path = Path(entry).expanduser()
    found = sorted(path.glob("*.tar")) if path.is_dir() else [path] if path.is_file() else []
    return [one for one in found if _TAR_NAME.fullmatch(one.name)]


class MegatronLogits:
    """The sequences of all ranks in their global order. `Place.file` counts iterations, `record` sequences in one."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        members: dict[tuple[int, int], dict[int, Member]] = {}  # (cp, dp) -> iteration -> member
        metas: dict[str, Mapping[str, Any]] = {}
        for file in files:
            name = _TAR_NAME.fullmatch(file.path.name)
            assert name is not None
            rank = (int(name[1]), int(name[2]))
            metas[str(file.path)], found = _scan(file.path)
            _merge(members.setdefault(rank, {}), found, file.path)
        self._meta = _one_meta(metas)
        self._num_cp, self._num_dp = _check_ranks(members)
        self._members = members
        self._iterations = sorted(members[0, 0])
        saver = self._meta["saver"]
        p = saver.get("p")
        k = int(saver["k"])
        self.facts = SourceFacts(
            format="megatron_logits",
            num_files=len(files),
            num_bytes=sum(file.num_bytes for file in files),
            digest=digest_files(files),
            values="logprobs",
            selection={"mode": "top_k", "k": k} if p is None else {"mode": "top_p_k", "k": k, "p": float(p)},
            num_records=None,
            has_tokens=False,
            settings={
                "meta": dict(self._meta),
                "data_parallel": self._num_dp,
                "context_parallel": self._num_cp,
                "iterations": len(self._iterations),
            },
            lost=(
                f"the entries past the {k} of each position" + ("" if p is None else f", and past the mass {p}"),
                f"rounding of the values to {saver.get('save_dtype')}, which moves the mass of the tail with them",
                "the tokens: nothing in the files proves that they are those of the store that was named",
                NO_BOUNDS,
            ),
        )

    def read(self, start: Place, *, entries: bool) -> Iterator[FoundRecord]:
        """See TargetsSource. A member that cannot be read is a UserError: its sequences cannot be counted."""
        for number in range(start.file, len(self._iterations)):
            first = start.record if number == start.file else 0
            iteration = self._iterations[number]
            sequence = 0
            for where, tables in self._micro_batches(iteration):
                for place_in_batch in range(tables["values"].shape[1]):
                    if sequence >= first:
                        place = Place(number, sequence)
                        record = _record(tables, place_in_batch)
                        yield FoundRecord(place, Place(number, sequence + 1), f"{where}, sequence {sequence}", record)
                    sequence += 1

    def _micro_batches(self, iteration: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Micro-batch j of data rank d is number j * dp + d; the parts of the context ranks are put together."""
        parts = {
            rank: _load(self._members[rank][iteration], f"iteration {iteration}") for rank in sorted(self._members)
        }
        counts = {len(lists["values"]) for lists in parts.values()}
        if len(counts) != 1:
            raise UserError(
                f"iteration {iteration}: the ranks hold {sorted(counts)} micro-batches; expected one number"
            )
        for number in range(counts.pop()):
            for dp in range(self._num_dp):
                of_ranks = [{key: parts[cp, dp][key][number] for key in _KEYS} for cp in range(self._num_cp)]
                where = f"{self._members[0, dp][iteration].tar}, iteration {iteration}, micro-batch {number}"
                yield where, _joined(of_ranks, where)


def _scan(path: Path) -> tuple[Mapping[str, Any], dict[int, Member]]:
    """The tar's _meta.json and its members by iteration."""
    members: dict[int, Member] = {}
    meta: Mapping[str, Any] | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                name = _MEMBER_NAME.fullmatch(info.name)
                if info.name == META_NAME:
                    stream = tar.extractfile(info)
                    meta = None if stream is None else json.loads(stream.read())
                elif name is not None and info.isreg():
                    members[int(name[1])] = Member(path, info.offset_data, info.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"input {path} is not a readable tar of Megatron-LM's logits: {error}") from error
    saver = meta.get("saver") if isinstance(meta, dict) else None
    if not isinstance(saver, dict) or type(saver.get("k")) is not int or not members:
        raise UserError(f"input {path}: expected {META_NAME} with saver.k and members N.pt.zst; was it written whole?")
    assert meta is not None
    return meta, members


def _merge(into: dict[int, Member], found: Mapping[int, Member], path: Path) -> None:
    for iteration, member in found.items():
        if iteration in into:
            raise UserError(
                f"input {path}: iteration {iteration} stands in {into[iteration].tar} as well; name one of them"
            )
        into[iteration] = member


def _one_meta(metas: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    (first, meta), *others = metas.items()
    for path, other in others:
        for key in ("hash", "identifiers", "saver"):
            if other.get(key) != meta.get(key):
                raise UserError(
                    f"{path}: {key} is {other.get(key)}, {first} has {meta.get(key)}: they are of other runs"
                )
    return meta


def _check_ranks(members: Mapping[tuple[int, int], Mapping[int, Member]]) -> tuple[int, int]:
    """Numbers of context and of data ranks; all of them must be there, with the same iterations."""
    num_cp, num_dp = (max(rank[axis] for rank in members) + 1 for axis in (0, 1))
    missing = [f"cp{cp}_dp{dp}" for cp in range(num_cp) for dp in range(num_dp) if (cp, dp) not in members]
    if missing:
        raise UserError(f"the tars of {', '.join(missing[:5])} are missing; all ranks are needed for the order of rows")
    wanted = members[0, 0].keys()
    for (cp, dp), found in members.items():
        alone = sorted(found.keys() ^ wanted)
        if alone:
            raise UserError(f"iteration {alone[0]} is in cp0_dp0 or cp{cp}_dp{dp} and not in both; a tar is missing")
    return num_cp, num_dp


def _load(member: Member, where: str) -> dict[str, list[np.ndarray]]:
    try:
        with member.tar.open("rb") as stream:
            stream.seek(member.offset)
            packed = stream.read(member.num_bytes)
        data = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True).readall()
        lists = load_tensors(data)
    except (OSError, zstandard.ZstdError, UnsafeFileError) as error:
        raise UserError(
            f"{member.tar}, {where}: not read, because {error}; nothing of it was run. Get the file again from whom "
            "you trust"
        ) from error
    if not isinstance(lists, dict) or any(not isinstance(lists.get(key), list) for key in _KEYS):
        raise UserError(f"{member.tar}, {where}: expected lists {', '.join(_KEYS)}")
    for tensors in zip(*(lists[key] for key in _KEYS), strict=False):
        shapes = {getattr(one, "shape", None) for one in tensors}
        if len(shapes) != 1 or len(shapes.pop() or ()) != 3:
            raise UserError(f"{member.tar}, {where}: expected tensors [sequence, batch, k] of one shape")
    if len({len(lists[key]) for key in _KEYS}) != 1:
        raise UserError(f"{member.tar}, {where}: the lists differ in length")
    return {key: lists[key] for key in _KEYS}


def _joined(parts: Sequence[dict[str, np.ndarray]], where: str) -> dict[str, np.ndarray]:
    """One micro-batch of the whole sequence.

    With C context ranks the sequence is cut into 2 C pieces, and rank c has the pieces c and 2 C - 1 - c (as
    Megatron-LM's get_batch_on_this_cp_rank deals them out, for an even load of causal attention).
    """
    if len(parts) == 1:
        return parts[0]
    pieces = 2 * len(parts)
    shapes = {part["values"].shape[:2] for part in parts}
    if len(shapes) != 1 or parts[0]["values"].shape[0] % 2:
        raise UserError(f"{where}: the context ranks hold parts of {sorted(shapes)}; expected one even length")
    width = max(part["values"].shape[2] for part in parts)
    found: dict[str, np.ndarray] = {}
    for key, fill in zip(_KEYS, (ABSENT, 65535, True), strict=True):
        ordered: list[Any] = [None] * pieces
        for rank, part in enumerate(parts):
            table = part[key]
            wide = np.pad(table, ((0, 0), (0, 0), (0, width - table.shape[2])), constant_values=fill)
            ordered[rank], ordered[pieces - 1 - rank] = np.split(wide, 2)
        found[key] = np.concatenate(ordered)
    return found


def _record(tables: Mapping[str, np.ndarray], place: int) -> ForeignRecord | BadRecord:
    values = tables["values"][:, place].astype(np.float64)
    ids = tables["indices_low"][:, place].astype(np.int64) + (tables["bit_17"][:, place].astype(np.int64) << 16)
    return ForeignRecord(None, None, Entries.of_table(ids, np.where(values == ABSENT, -np.inf, values)))
