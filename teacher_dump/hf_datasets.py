"""Documents out of Hugging Face data sets: a folder of `save_to_disk`, a folder of data files, or a hub name.

Nothing is downloaded as a whole and nothing is held in memory: what `save_to_disk` wrote is memory-mapped, everything
else is streamed, shard by shard (a shard is a data file). The order is that of the data set, never shuffled, so that
(shard, record) means the same in every run. What pins the input: sizes, first and last 64 KiB of local files as for
text files, the fingerprint of a saved data set, the commit of a data set on the hub; and configuration, split, shards.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.teacher_dump.config import DatasetInput
from potstill.teacher_dump.documents import BadRecords, Document, Place
from potstill.teacher_dump.inputs import InputFile, digest_files
from potstill.teacher_dump.records.base import Record, RecordKind, missing_field

log = logging.getLogger(__name__)

_BATCH_RECORDS = 64
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """True for a folder that `save_to_disk` wrote."""
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


@dataclass(frozen=True)
class DatasetSource:
    """A data set of documents.

    data: Dataset (then one shard) or IterableDataset; name: what a person calls it; identity: what pins its records.
    """

    data: Any
    name: str
    num_files: int
    num_bytes: int
    identity: Mapping[str, Any]
    kind: RecordKind
    max_bad_lines: int

    @property
    def digest(self) -> str:
        """sha256 (hex) of the identity and the number of shards."""
        parts = {**self.identity, "shards": self.num_files}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def info(self) -> Mapping[str, Any]:
        """Configuration, split, and the commit of a data set on the hub; a local folder may be moved between runs."""
        return {"dataset": {name: value for name, value in self.identity.items() if name != "files"}}

    def read(self, *, start: Place | None = None, bad_lines: int = 0) -> DatasetReader:
        """The documents from `start` on."""
        return DatasetReader(self, start=start if start is not None else Place(0, 0), bad_lines=bad_lines)

    @property
    def num_records(self) -> int:
        """How many records the only shard has, 0 where that is not known."""
        return int(getattr(self.data, "num_rows", 0))

    def values(self, shard: int, skip: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number of the record, column -> value) of a shard, without the first `skip` records."""
        record = 0
        if hasattr(self.data, "num_rows"):  # memory-mapped: what is skipped is not read
            if skip >= self.data.num_rows:
                return
            part, record = self.data.select(range(skip, self.data.num_rows)), skip
        else:
            part = self.data.shard(num_shards=self.num_files, index=shard, contiguous=True)
        columns = list(self.kind.fields.values())
        for batch in part.select_columns(columns).iter(_BATCH_RECORDS):
            for values in zip(*(batch[name] for name in columns), strict=True):
                if record >= skip:
                    yield record, dict(zip(columns, values, strict=True))
                record += 1


class DatasetReader:
    """One pass over a data set from `start` on. Raises UserError that names shard and record."""

    def __init__(self, source: DatasetSource, *, start: Place, bad_lines: int) -> None:
        self._source, self._start = source, start
        self._bad = BadRecords(allowed=source.max_bad_lines, before=bad_lines)
        self._share = start.file / max(source.num_files, 1)

    @property
    def bad_lines(self) -> int:
        return self._bad.count

    @property
    def bytes_read(self) -> int:
        """The share of shards (of records, where their number is known) that is done, of the data set's bytes."""
        return int(self._share * self._source.num_bytes)

    def __iter__(self) -> Iterator[Document]:
        source = self._source
        for shard in range(self._start.file, source.num_files):
            skip = self._start.record if shard == self._start.file else 0
            for record, values in self._values(shard, skip):
                found = source.kind.read(values)
                if isinstance(found, Record):
                    yield Document(Place(shard, record), found, self._bad.count)
                else:
                    self._bad.add(f"data set {source.name}, shard {shard + 1}, record {record + 1}", str(found))
                if source.num_records:
                    self._share = (record + 1) / source.num_records
            self._share = (shard + 1) / source.num_files

    def _values(self, shard: int, skip: int) -> Iterator[tuple[int, dict[str, Any]]]:
        values, last = self._source.values(shard, skip), skip
        while True:
            try:
                found = next(values, None)
            except Exception as error:  # the library raises errors of many kinds
                raise self._broken(shard, last, error) from error
            if found is None:
                return
            last = found[0] + 1
            yield found

    def _broken(self, shard: int, record: int, error: Exception) -> UserError:
        return UserError(
            f"data set {self._source.name}, shard {shard + 1} of {self._source.num_files}: cannot be read after record "
            f"{record}: {type(error).__name__}: {error}; what is prepared so far is kept: run the same command again "
            "when the data can be read"
        )


def open_dataset(config: DatasetInput, *, kind: RecordKind, max_bad_lines: int) -> DatasetSource:
    """Open a data set without reading its records. Raises UserError for a wrong name, split, config or column."""
    library = _library()
    folder = Path(config.path).expanduser()
    if folder.is_dir() and is_saved(folder):
        data, identity, num_bytes = _open_saved(library, folder, config)
    else:
        data, identity, num_bytes = _open_streaming(library, folder, config)
    columns = data.column_names
    if columns is None:  # a stream whose first record has not been seen
        columns = sorted(next(iter(data), {}))
    if missing := missing_field(kind, columns):
        raise UserError(f"data set {config.path}: {missing.replace('field', 'column', 1)}")
    num_files = 1 if hasattr(data, "num_rows") else int(data.num_shards)
    return DatasetSource(data, config.path, num_files, num_bytes, identity, kind, max_bad_lines)


def _library() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "a Hugging Face data set needs the package datasets, which is not installed here: "
            "pip install 'potstill[datasets]'; JSON lines, Parquet and text files are read without it (--input)"
        ) from error


def _pick(names: Sequence[str], config: DatasetInput) -> str:
    """The split that is asked for, or the only one, or train."""
    if config.split is None and len(names) == 1:
        return names[0]
    wanted = config.split or "train"
    if wanted not in names:
        raise UserError(
            f"data set {config.path}: no split {wanted!r}; it has {sorted(names)}; name one of these (--dataset-split; "
            "a part such as train[:10%] cannot be streamed)"
        )
    return wanted


def _open_saved(library: Any, folder: Path, config: DatasetInput) -> tuple[Any, dict[str, Any], int]:
    """(Dataset, identity, bytes) of a folder of `save_to_disk`; it is memory-mapped."""
    if config.config is not None or config.revision is not None:
        raise UserError(f"data set {folder} was written by save_to_disk and has neither configurations nor revisions")
    if (folder / _SAVED_SPLITS).is_file():
        split = _pick(list(_json(folder / _SAVED_SPLITS)["splits"]), config)
        folder = folder / split
    elif config.split is not None:
        raise UserError(f"data set {folder} is one split by itself; leave out --dataset-split {config.split}")
    else:
        split = "all"
    state = _json(folder / _SAVED)
    paths = [folder / entry["filename"] for entry in state["_data_files"]]
    try:
        data = library.load_from_disk(str(folder), keep_in_memory=False).with_format(None)
    except Exception as error:  # the library raises errors of many kinds
        raise UserError(f"data set {folder} cannot be opened: {type(error).__name__}: {error}") from error
    digest, num_bytes = _digest(paths, folder)
    return data, {"split": split, "fingerprint": state["_fingerprint"], "files": digest}, num_bytes


def _open_streaming(library: Any, folder: Path, config: DatasetInput) -> tuple[Any, dict[str, Any], int]:
    """(IterableDataset, identity, bytes) of a local folder of data files, or of a data set on the hub."""
    is_local = folder.is_dir()
    if not is_local and (folder.exists() or folder.is_absolute() or config.path.startswith((".", "~"))):
        state = "is a file; name it as --input, or" if folder.exists() else "does not exist;"
        raise UserError(f"data set {config.path} {state} give a folder or a hub name (org/name)")
    if is_local and config.revision is not None:
        raise UserError(f"data set {folder} is a local folder, which has no revisions; leave out --dataset-revision")
    try:
        builder = library.load_dataset_builder(
            str(folder.resolve()) if is_local else config.path, config.config, revision=config.revision
        )
        splits = builder.as_streaming_dataset()
    except Exception as error:  # the library raises errors of many kinds
        advice = "" if is_local else "; check the name and the network (HF_HUB_OFFLINE), or name a local folder"
        raise UserError(f"data set {config.path} cannot be opened: {error}{advice} (--dataset-config)") from error
    split = _pick([str(name) for name in splits], config)
    names = [str(name) for name in builder.config.data_files[split]]
    identity = {"config": str(builder.config.name), "split": split}
    if is_local:
        digest, num_bytes = _digest([Path(name) for name in names], folder.resolve())
    else:
        # The names of the files hold the commit: hf://datasets/org/name@commit/file.
        digest, num_bytes = hashlib.sha256("\n".join(names).encode()).hexdigest(), _declared_bytes(builder, split)
        identity |= {"name": config.path, "revision": str(builder.hash)}
    return splits[split], identity | {"files": digest}, num_bytes


def _declared_bytes(builder: Any, split: str) -> int:
    """Size of a split on the hub as its card declares it, or 0."""
    declared = (builder.info.splits or {}).get(split)
    return int(getattr(declared, "num_bytes", 0) or 0)


def _digest(paths: Sequence[Path], folder: Path) -> tuple[str, int]:
    """(digest of local files as `digest_files` makes it, their bytes)."""
    files = []
    for path in paths:
        name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
        if not path.is_file():
            raise UserError(
                f"data set {folder}: its file {path} does not exist; restore it, or save the data set again"
            )
        files.append(InputFile(path, name, "dataset", "", path.stat().st_size))
    return digest_files(files), sum(file.num_bytes for file in files)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; save the data set again") from error
