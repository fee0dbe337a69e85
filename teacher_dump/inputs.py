"""Which files an input names, in which order, and a digest that notices when they change."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import UserError

log = logging.getLogger(__name__)

COMPRESSIONS = (".gz", ".zst", ".xz")
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class InputFile:
    """One file: `name` is its place below the input entry, so that a corpus may be moved between runs."""

    path: Path
    name: str
    kind: str  # jsonl, parquet, text
    compression: str  # "", .gz, .zst, .xz
    num_bytes: int


def find_files(entries: Sequence[str]) -> list[InputFile]:
    """Files named by paths, folders (searched to the bottom, known kinds only) and globs.

    Order: entries as given, inside an entry by path. A file named twice is read once. Raises UserError when an entry
    names nothing, a file is empty, or a file cannot be read.
    """
    files: list[InputFile] = []
    seen: set[Path] = set()
    for entry in entries:
        found = list(_expand(entry))
        if not found:
            raise UserError(f"input {entry!r}: no such file or folder, and no file matches it; check the spelling")
        for path, name, kind, compression in found:
            real = path.resolve()
            if real in seen:
                log.info("input %s is named twice and read once", path)
                continue
            seen.add(real)
            files.append(InputFile(path, name, kind, compression, _readable_size(path)))
    return files


def _expand(entry: str) -> Iterator[tuple[Path, str, str, str]]:
    path = Path(entry).expanduser()
    if path.is_file():
        yield (path, path.name, *_kind(path))
    elif path.is_dir():
        below = sorted(p for p in path.rglob("*") if p.is_file() and _known(p) and not _hidden(p, path))
        if not below and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            raise UserError(f"input folder {path} is a data set of save_to_disk; name it as --dataset {path} instead")
        if not below:
            raise UserError(
                f"input folder {path} holds no {', '.join(KINDS)} file (also with {', '.join(COMPRESSIONS)}); "
                "name files of other kinds by a glob, e.g. 'folder/**/*.py', to read each as one text"
            )
        yield from ((p, p.relative_to(path).as_posix(), *_kind(p)) for p in below)
    elif glob.has_magic(entry):
        for name in sorted(glob.glob(str(path), recursive=True)):
            if Path(name).is_file():
                yield (Path(name), Path(name).as_posix().removeprefix(_fixed_part(str(path))), *_kind(Path(name)))


def _fixed_part(pattern: str) -> str:
    parts = Path(pattern).parts
    fixed = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed).as_posix() + "/" if fixed else ""


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> tuple[str, str]:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    inner = Path(path.stem).suffix if compression else path.suffix
    return KINDS.get(inner, "text"), compression


def _known(path: Path) -> bool:
    inner = Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix
    return inner in KINDS


def _readable_size(path: Path) -> int:
    try:
        with path.open("rb") as stream:
            stream.read(1)
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"input file {path} cannot be read: {error.strerror}; check its permissions") from error


def digest_files(files: Sequence[InputFile]) -> str:
    """sha256 over names, sizes and the first and last 64 KiB of each file, in order.

    Not the whole content: that would read the corpus twice. It tells another corpus from this one, and a file that
    grew or was replaced.
    """
    digest = hashlib.sha256()
    for file in files:
        with file.path.open("rb") as stream:
            head = stream.read(_SAMPLE_BYTES)
            stream.seek(max(0, file.num_bytes - _SAMPLE_BYTES))
            tail = stream.read(_SAMPLE_BYTES)
        parts = [file.name, file.num_bytes, hashlib.sha256(head).hexdigest(), hashlib.sha256(tail).hexdigest()]
        digest.update(json.dumps(parts).encode() + b"\n")
    return digest.hexdigest()
