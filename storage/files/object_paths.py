"""Stores on S3, GCS and Azure through obstore: conditional create is the commit point, reads are byte ranges.

Credentials come from the client's own chain (environment, profile, instance role) and are never read here; the text
of client errors is stripped of URL queries, because some services sign URLs.
"""

from __future__ import annotations

import datetime
import logging
import os
import random
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from potstill.storage.errors import CorruptError, GaveUpError, NotAStoreError, StoreError, WriteFailedError
from potstill.storage.files.collecting import without_collection
from potstill.storage.files.folder import URL_SCHEMES, Listed
from potstill.storage.files.prefetch import in_parallel
from potstill.storage.files.waiting import Wait, waiting_for

logger = logging.getLogger(__name__)

T = TypeVar("T")
ATTEMPTS = 4
BACKOFF_SECONDS = 0.2
CONNECT_TIMEOUT_SECONDS = 5.0
READ_TIMEOUT_SECONDS = 20.0
REQUEST_TIMEOUT_SECONDS = 120.0
CLIENT_RETRIES = 3
PART_BYTES = 8 << 20
PARALLEL_PARTS = 8
PARALLEL_REQUESTS = 32
PAGE_OBJECTS = 1000  # that one request lists at most
SINGLE_PUT_BYTES = 256 << 20  # conditional creation is one request, which holds the object in memory
_LISTS_FROM_A_NAME = ("s3://", "gs://")  # elsewhere the client gets all names and drops those before it
_QUERY = re.compile(r"\?[^\s\"'>)]*")
_PERMANENT = ("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "NotSupportedError")


class ObjectFolder:
    """One prefix of an object store, seen as a StoreFolder."""

    parallel_reads = PARALLEL_REQUESTS
    max_create_bytes: int | None = SINGLE_PUT_BYTES

    def __init__(self, url: str) -> None:
        """Raises StoreError for a URL of an unknown scheme or one that carries credentials."""
        if not url.startswith(URL_SCHEMES):
            raise StoreError(f"{_clean(url)}: unknown scheme, expected a path or one of {URL_SCHEMES}")
        if "@" in url or "?" in url or "#" in url:
            text = _clean(url.split("@")[-1])
            raise StoreError(f"{text}: a store URL holds no credentials and no query; use the environment")
        self.url = url.rstrip("/")
        self._client: Any = None

    def prepare(self) -> None:
        """Prove that the store can be written and that it honours conditional creation."""
        probe = f"tmp/probe-{secrets.token_hex(8)}"
        first, second = self.create(probe, b"probe"), self.create(probe, b"probe")
        self.delete(probe)
        if not first or second:
            raise WriteFailedError(
                f"{self.url}: the object store ignores If-None-Match, so two writers could overwrite each other; "
                "use a store with conditional writes"
            )

    def check_writable(self) -> None:
        """Nothing is known of an object store before a request; `prepare` makes one."""

    def explain_absence(self) -> str:
        return (
            f"{self.url} holds no run.json, so it is no store (or none yet); "
            "check bucket, prefix and endpoint, and name the store itself (prepare: OUTPUT/train and OUTPUT/heldout)"
        )

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        def get() -> bytes:
            found = self._obs().get(self._store(), name)
            size = int(found.meta["size"])
            if size > max_bytes:
                raise CorruptError(f"{self.url}/{name}: {size} bytes, at most {max_bytes} expected")
            data = bytes(found.bytes())
            if len(data) != size:
                raise _ShortBodyError(f"{len(data)} of {size} bytes came")
            return data

        return self._reading(name, get)

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        def get() -> bytes:
            data = bytes(self._obs().get_range(self._store(), name, start=offset, length=length))
            if len(data) != length:
                raise _ShortBodyError(f"{len(data)} of {length} bytes came")
            return data

        try:
            found = self._reading(name, get) if length else b""
        except GaveUpError:
            size = self.size(name)
            if size is not None and size < offset + length:
                raise CorruptError(
                    f"{self.url}/{name}: {size} bytes, expected at least {offset + length} (truncated object)"
                ) from None
            raise
        if found is None:
            raise CorruptError(f"{self.url}/{name}: object is missing; restore it from a copy")
        return found

    def size(self, name: str) -> int | None:
        return self._reading(name, lambda: int(self._obs().head(self._store(), name)["size"]))

    def names(self, prefix: str, *, cuts: Sequence[str] = ()) -> list[str]:
        return list(self.listing(prefix, cuts=cuts))

    @without_collection()
    def listing(self, prefix: str, *, cuts: Sequence[str] = (), suffix: str = "") -> dict[str, Listed]:
        cuts = cuts if self.url.startswith(_LISTS_FROM_A_NAME) else ()
        found, last = self._listed(prefix, suffix, "", None, pages=1 if cuts else None)
        if last is not None:
            bounds = [last, *(cut for cut in cuts if cut > last), None]
            works = [partial(self._listed, prefix, suffix, str(a), b) for a, b in pairwise(bounds)]
            for part, _ in in_parallel(works, num_threads=PARALLEL_REQUESTS):
                found |= part
        return {name: found[name] for name in sorted(found)}

    def _listed(
        self, prefix: str, suffix: str, after: str, upto: str | None, *, pages: int | None = None
    ) -> tuple[dict[str, Listed], str | None]:
        """Objects right in `prefix` in (after, upto] whose names end in `suffix`, of so many pages at most.

        Second the last name of these pages, if there may be more. Pages come as they are asked for, so that little is
        read beyond `upto`.
        """

        def stream(wait: Wait) -> tuple[dict[str, Listed], str | None]:
            found: dict[str, Listed] = {}
            if prefix in ("", "tmp"):  # what lies below is not wanted, and may be much
                objects = self._obs().list_with_delimiter(self._store(), prefix=prefix or None)["objects"]
                named = ((str(item["path"]).rpartition("/")[2], item) for item in objects)
                return {name: _told(item) for name, item in named if name.endswith(suffix)}, None
            offset = f"{prefix}/{after}" if after else None
            chunks = self._obs().list(self._store(), prefix, offset=offset, chunk_size=PAGE_OBJECTS)
            for number, chunk in enumerate(chunks, start=1):
                wait.moved()
                names = [str(item["path"]).removeprefix(f"{prefix}/") for item in chunk]
                wanted = ((n, item) for n, item in zip(names, chunk, strict=True) if n.endswith(suffix))
                found |= {n: _told(item) for n, item in wanted if "/" not in n and (upto is None or n <= upto)}
                if upto is not None and names[-1] > upto:
                    break
                if number == pages:
                    return found, names[-1] if len(names) == PAGE_OBJECTS else None
            return found, None

        return self._waited(f"{prefix}/", stream) or ({}, None)

    def put(self, name: str, data: bytes | memoryview) -> None:
        def upload() -> None:
            self._obs().put(
                self._store(),
                name,
                data,
                use_multipart=len(data) > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARALLEL_PARTS,
            )

        self._writing(name, upload)

    def create(self, name: str, data: bytes | memoryview) -> bool:
        def upload() -> bool:
            try:
                self._obs().put(self._store(), name, data, mode="create", use_multipart=False)
            except self._obs().exceptions.AlreadyExistsError:
                return False
            return True

        return self._writing(name, upload)

    def scratch(self) -> Path:
        return Path(tempfile.gettempdir()) / f"potstill-{os.getpid():x}-{secrets.token_hex(8)}"

    def create_file(self, name: str, path: Path) -> bool:
        return self.create(name, path.read_bytes())  # of `max_create_bytes` at most

    def put_file(self, name: str, path: Path) -> None:
        def upload() -> None:
            self._obs().put(
                self._store(),
                name,
                path,
                use_multipart=path.stat().st_size > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARALLEL_PARTS,
            )

        self._writing(name, upload)

    def replace_torn(self, name: str, data: bytes | memoryview) -> bool:
        return self.create(name, data)  # an object appears whole or not at all

    def delete(self, name: str) -> None:
        def remove() -> None:
            try:
                self._obs().delete(self._store(), name)
            except FileNotFoundError:
                return

        self._writing(name, remove)

    def move(self, name: str, new_name: str) -> bool:
        def copy() -> bool:
            try:
                self._obs().copy(self._store(), name, new_name)
            except FileNotFoundError:
                return False
            return True

        if not self._writing(new_name, copy):
            return False
        self.delete(name)
        return True

    def remove_if_empty(self) -> None:
        """An object store has no folders."""

    @staticmethod
    def _obs() -> Any:
        try:
            import obstore
            import obstore.exceptions
        except ImportError as error:
            raise StoreError(f"object stores need the extra potstill[object-store] ({error})") from None
        return obstore

    def _store(self) -> Any:
        if self._client is None:
            self._obs()
            from obstore.store import from_url

            if self.url.startswith(("memory://", "file://")):
                self._client = from_url(self.url)
            else:
                self._client = from_url(self.url, client_options=_client_options(), retry_config=_retry_config())
        return self._client

    def _reading(self, name: str, work: Callable[[], T]) -> T | None:
        return self._waited(name, lambda wait: work())

    def _waited(self, name: str, work: Callable[[Wait], T]) -> T | None:
        try:
            # The client waits in its own code, where no signal reaches a thread of ours.
            return self._retry(name, lambda: waiting_for(f"{self.url}/{name}", work))
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise NotAStoreError(f"{self.url}/{name}: {_clean(str(error))}") from None
        except _GaveUpError as error:
            raise GaveUpError(f"reading {self.url}/{name} failed: {error}; check the network and try again") from None

    def _writing(self, name: str, work: Callable[[], T]) -> T:
        try:
            return self._retry(name, work)
        except (_GaveUpError, FileNotFoundError) as error:
            raise WriteFailedError(
                f"writing {self.url}/{name} failed: {_clean(str(error))}; nothing was committed, run again"
            ) from None

    def _retry(self, name: str, work: Callable[[], T]) -> T:
        """Bounded attempts with jittered backoff on errors that may pass; credentials and paths are not retried."""
        errors = (self._obs().exceptions.BaseError, _ShortBodyError, TimeoutError, ConnectionError)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except errors as error:
                text = f"{type(error).__name__}: {_clean(str(error))}"
                if type(error).__name__ in _PERMANENT or attempt == ATTEMPTS:
                    raise _GaveUpError(f"{text} (attempt {attempt} of {ATTEMPTS})") from None
                logger.warning("%s/%s: attempt %d of %d: %s", self.url, name, attempt, ATTEMPTS, text)
                time.sleep(BACKOFF_SECONDS * 2**attempt * (0.5 + random.random()))
        raise AssertionError("unreachable")


def _told(item: Any) -> Listed:
    return Listed(int(item["size"]), item["last_modified"].timestamp())


class _ShortBodyError(Exception):
    """Fewer bytes arrived than were promised."""


class _GaveUpError(Exception):
    """All attempts failed."""


def _client_options() -> dict[str, Any]:
    def seconds(value: float) -> datetime.timedelta:
        return datetime.timedelta(seconds=value)

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return {
        # Own client options hide AWS_ALLOW_HTTP from the client, so it is honoured here.
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true" or endpoint.startswith("http://"),
        "connect_timeout": seconds(CONNECT_TIMEOUT_SECONDS),
        "read_timeout": seconds(READ_TIMEOUT_SECONDS),
        "timeout": seconds(REQUEST_TIMEOUT_SECONDS),
    }


def _retry_config() -> dict[str, Any]:
    return {
        "max_retries": CLIENT_RETRIES,
        "retry_timeout": datetime.timedelta(seconds=REQUEST_TIMEOUT_SECONDS),
        "backoff": {
            "init_backoff": datetime.timedelta(seconds=BACKOFF_SECONDS / 2),
            "max_backoff": datetime.timedelta(seconds=5),
            "base": 2,
        },
    }


def _clean(text: str) -> str:
    """One line without the client's debug dump and URL queries, which may hold signatures."""
    text = text.split("Debug source:")[0]
    return _QUERY.sub("?...", " ".join(text.split()))[:500]
