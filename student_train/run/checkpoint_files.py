"""What a checkpoint's manifest says of its files, and the checks against it before anything is loaded.

The manifest (`potstill.json`) names each file of the checkpoint with its size and digest, and holds a digest of itself.
The digest of a file is the SHA-256 of the SHA-256 digests of its pieces of 64 MiB, so that the pieces of a large file
can be read by many threads.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError

log = logging.getLogger(__name__)
MANIFEST = "potstill.json"
DONE_FILE = "done.json"  # in the run folder: it is done
MANIFEST_VERSION = 2  # 1 named sizes only
PIECE_BYTES = 64 << 20
_THREADS = min(16, max(4, os.cpu_count() or 1))  # some wait for the disk
_READ_BYTES = 1 << 20
_MANIFEST_LIMIT = 1 << 30  # of a manifest in bytes: more than one of 1024 ranks has, by far
# What a path says that leads to no readable file. Anything else (no right, a stale handle) may pass: no damage.
_GONE = {errno.ENOENT, errno.EIO, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}


class ResumeError(UserError):
    """A checkpoint cannot be continued with this configuration, these stores or this world."""


class UnfinishedError(ResumeError):
    """A folder without a manifest: its save or its deletion was cut short."""


class DamagedError(ResumeError):
    """A checkpoint is not what was saved: a file is missing, of another size or content, or the manifest is."""


def checkpoints_folder(run: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run / "checkpoints"


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint that has a manifest, whatever that says; 0 where there is none."""
    folders = (path.parent.name for path in checkpoints_folder(run).glob(f"step_*/{MANIFEST}"))
    return max((int(name.removeprefix("step_")) for name in folders), default=0)


def open_regular(path: Path) -> int:
    """Open a file for reading, if it is one: a pipe or a device in its place would block or never end.

    Returns the descriptor. Raises OSError, and DamagedError where the path is no regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedError(f"{path} is no regular file; the checkpoint is damaged")
    return handle


def _unreadable(path: Path | str, error: OSError) -> ResumeError:
    """What a failed read means: damage, or a file system that does not serve right now."""
    if error.errno in _GONE:
        return DamagedError(f"{path} cannot be read: {error.strerror}; the checkpoint is damaged")
    return ResumeError(f"{path} cannot be read: {error.strerror}; see that it can, and start again")


def _piece_digest(handle: int, start: int, size: int) -> bytes:
    """SHA-256 of one piece of an open file."""
    digest, buffer = hashlib.sha256(), bytearray(min(size, _READ_BYTES))
    view, at, end = memoryview(buffer), start, start + size
    while at < end:
        read = os.preadv(handle, [view[: min(len(buffer), end - at)]], at)
        if not read:
            break  # shorter than it was: another digest
        digest.update(view[:read])
        at += read
    return digest.digest()


class _Digesting:
    """Files whose pieces are being digested by a pool of threads."""

    def __init__(self, pool: ThreadPoolExecutor, path: Path, *, sync: bool) -> None:
        self._path, self._handle = path, open_regular(path)
        self.size = os.fstat(self._handle).st_size
        # The disk writes while the pieces are digested out of memory.
        self._synced: Future[None] | None = pool.submit(os.fsync, self._handle) if sync else None
        starts = range(0, self.size, PIECE_BYTES)
        self._pieces: list[Future[bytes]] = [
            pool.submit(_piece_digest, self._handle, start, min(PIECE_BYTES, self.size - start)) for start in starts
        ]

    def finish(self) -> dict[str, Any]:
        """What the manifest says of the file: {"bytes", "sha256"}. Raises OSError that names it."""
        try:
            if self._synced is not None:
                self._synced.result()
            whole = hashlib.sha256(b"".join(future.result() for future in self._pieces))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error  # a read names no file
        finally:
            self.abandon()
        return {"bytes": self.size, "sha256": whole.hexdigest()}

    def abandon(self) -> None:
        """Wait until no thread reads the file any more, and close it."""
        futures: list[Future[Any]] = [*([self._synced] if self._synced else []), *self._pieces]
        for future in futures:
            future.cancel()
        wait(futures)
        os.close(self._handle)


def describe_files(folder: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, dict[str, Any]]:
    """Size and digest of files of a checkpoint by name, `{"bytes": int, "sha256": hex}`; `sync` makes them durable.

    Raises OSError that names the file, and DamagedError where something is no regular file.
    """
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: list[tuple[str, _Digesting]] = []

        def finish_oldest() -> None:
            name, digesting = waiting.pop(0)
            found[name] = digesting.finish()

        try:
            for name in names:
                waiting.append((name, _Digesting(pool, folder / name, sync=sync)))
                if len(waiting) > 2 * _THREADS:  # not every file of a large checkpoint is open at once
                    finish_oldest()
            while waiting:
                finish_oldest()
        finally:
            for _, digesting in waiting:
                digesting.abandon()
    return found


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Digest of a manifest without its field for it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_of(files: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a checkpoint, with its own digest. `about` must be of JSON's types."""
    manifest = json.loads(json.dumps({"version": MANIFEST_VERSION, "files": dict(files), **about}))
    return {**manifest, "sha256": _own_digest(manifest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check it against its own digest.

    Raises UnfinishedError where there is none, ResumeError where a newer potstill wrote it, DamagedError where it is
    not what was written.
    """
    path = folder / MANIFEST
    try:
        with open(open_regular(path), "rb") as file:
            content = file.read(_MANIFEST_LIMIT)
    except FileNotFoundError as error:
        raise UnfinishedError(
            f"{folder} holds no {MANIFEST}: its save was not finished, so it is no checkpoint; take another one"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is no JSON ({error}); the checkpoint is damaged") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version == 1 and _is_of_version_1(manifest):
        log.warning("%s was saved by an older potstill: sizes are checked, contents cannot be", folder)
        return manifest
    if isinstance(version, int) and version > MANIFEST_VERSION and manifest.get("sha256") == _own_digest(manifest):
        raise ResumeError(
            f"{folder}: manifest version {version}, this potstill reads up to {MANIFEST_VERSION}; install the potstill "
            "that saved it"
        )
    if version != MANIFEST_VERSION or manifest.get("sha256") != _own_digest(manifest):
        raise DamagedError(f"{path} is not what was saved: its digest does not fit; the checkpoint is damaged")
    return manifest


def _is_of_version_1(manifest: dict[str, Any]) -> bool:
    """Whether this is a whole manifest of before there were digests."""
    files, loop = manifest.get("files"), manifest.get("loop")
    return (
        isinstance(files, dict)
        and all(isinstance(size, int) for size in files.values())
        and isinstance(loop, dict)
        and isinstance(loop.get("step"), int)
        and isinstance(manifest.get("pinned"), dict)
        and isinstance(manifest.get("world_size"), int)
    )


def files_of(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Files of a manifest by name: {"bytes"}, and {"sha256"} from version 2 on."""
    files: Mapping[str, Any] = manifest["files"]
    return {name: said if isinstance(said, dict) else {"bytes": said} for name, said in files.items()}


def check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Compare which files there are, and their sizes, with the manifest. Raises DamagedError that names the file."""
    files = files_of(manifest)
    for name, said in files.items():
        path = folder / name
        try:
            found = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is no regular file; the checkpoint is damaged")
        if found.st_size != said["bytes"]:
            raise DamagedError(
                f"{path} has {found.st_size} bytes, the manifest says {said['bytes']}; the checkpoint is damaged"
            )
    # DeepSpeed looks for files by pattern, so one that nobody named would be loaded beside the others.
    for path in sorted(folder.rglob("*.pt")):
        if (name := path.relative_to(folder).as_posix()) not in files:
            raise DamagedError(f"{path} is not in the manifest; move {name} out of the checkpoint")


def check_contents(folder: Path, manifest: Mapping[str, Any], *, part: tuple[int, int] = (0, 1)) -> None:
    """Compare the contents of files with the manifest; `part` = (rank, ranks): the share of this rank, by size.

    Raises DamagedError that names the first file that differs.
    """
    files = {name: said for name, said in files_of(manifest).items() if "sha256" in said}
    rank, ranks = part
    names = sorted(files, key=lambda name: (-files[name]["bytes"], name))[rank::ranks]
    try:
        found = describe_files(folder, names)
    except OSError as error:
        raise _unreadable(error.filename, error) from error
    for name in names:
        if found[name] != {key: files[name][key] for key in ("bytes", "sha256")}:
            raise DamagedError(
                f"{folder / name} is not what was saved: sha256 {found[name]['sha256'][:16]}..., the manifest says "
                f"{files[name]['sha256'][:16]}...; the checkpoint is damaged"
            )
