"""Stores in a data set of the Hugging Face hub, for reading: hf://datasets/ORG/NAME[@REVISION][/PATH].

A revision is resolved once a process to its commit, which is all that is read from then on and what `url` says, so
that a branch that moves on changes nothing under a reader; ranks of a run must name the commit. Requests go through
the hub client's own session (HF_ENDPOINT, HF_TOKEN or the saved login, proxies), with limits of time, which that
session has not.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import unquote

from potstill.storage.errors import CorruptError, GaveUpError, ReadFailedError, StoreError, WriteFailedError
from potstill.storage.files.folder import Listed
from potstill.storage.files.waiting import waiting_for

logger = logging.getLogger(__name__)

T = TypeVar("T")
HUB_SCHEME = "hf://"
ATTEMPTS, BACKOFF_SECONDS, REQUEST_SECONDS = 4, 0.5, 60.0
PARALLEL_REQUESTS = 8
_URL = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/@]+))?(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PASSING = (408, 429, 500, 502, 503, 504)
# Of this process: (endpoint, repository, revision) to commit.
_resolved: dict[tuple[str, str, str], str] = {}


class HubFolder:
    """One folder of a data set at one commit, seen as a StoreFolder that cannot be written."""

    parallel_reads = PARALLEL_REQUESTS
    max_create_bytes: int | None = None

    def __init__(self, url: str) -> None:
        """Asks the hub which commit a revision is, unless it is one. Raises StoreError, ReadFailedError."""
        match = _URL.fullmatch(url.rstrip("/"))
        if match is None:
            raise StoreError(f"{url}: expected hf://datasets/ORG/NAME@REVISION/PATH, with or without the last two")
        self._repo, self._path = match[1], match[3] or ""
        self._commit = self._resolve(unquote(match[2] or "main"))
        self.url = "/".join(part for part in (f"hf://datasets/{self._repo}@{self._commit}", self._path) if part)
        self._listings: dict[str, dict[str, Listed]] = {}

    def prepare(self) -> None:
        self._refuse()

    def check_writable(self) -> None:
        self._refuse()

    def explain_absence(self) -> str:
        return f"{self.url} holds no run.json, so it is no store; check the path in the data set"

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        found = self._get(name, f"bytes=0-{max_bytes}")
        if found is not None and len(found) > max_bytes:
            raise CorruptError(f"{self.url}/{name}: more than the {max_bytes} bytes that were expected at most")
        return found

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if not length:
            return b""
        found = self._get(name, f"bytes={offset}-{offset + length - 1}", offset=offset)
        if found is None:
            raise CorruptError(f"{self.url}/{name}: the file is missing in this commit; name another one")
        if len(found) < length:
            raise CorruptError(f"{self.url}/{name}: {len(found)} bytes from {offset} on, expected {length} (truncated)")
        return found[:length]

    def size(self, name: str) -> int | None:
        from huggingface_hub import constants

        api, path = self._api(), self._inside(name)
        asked = f"{constants.ENDPOINT} for {path}"
        found = self._asking(asked, lambda: api.get_paths_info(self._repo, [path], **self._where()))
        sizes = [int(entry.size) for entry in found or () if hasattr(entry, "size") and entry.path == path]
        return sizes[0] if sizes else None

    def names(self, prefix: str, *, cuts: Sequence[str] = ()) -> list[str]:
        return list(self.listing(prefix, cuts=cuts))

    def listing(self, prefix: str, *, cuts: Sequence[str] = (), suffix: str = "") -> dict[str, Listed]:
        if prefix not in self._listings:  # of a commit, so that it never changes
            self._listings[prefix] = self._listed(prefix)
        return {name: listed for name, listed in self._listings[prefix].items() if name.endswith(suffix)}

    def _listed(self, prefix: str) -> dict[str, Listed]:
        api, place = self._api(), self._inside(prefix)

        def ask() -> dict[str, Listed]:
            entries = api.list_repo_tree(self._repo, place or None, recursive=False, **self._where())
            files = [entry for entry in entries if hasattr(entry, "size")]
            # The hub tells when a file changed only at the price of another request for each: for people alone.
            return {entry.path.rpartition("/")[2]: Listed(int(entry.size), 0.0) for entry in files}

        found = self._asking(f"{self.url}/{prefix}", ask) or {}
        return {name: found[name] for name in sorted(found)}

    def put(self, name: str, data: bytes | memoryview) -> None:
        self._refuse()

    def create(self, name: str, data: bytes | memoryview) -> bool:
        self._refuse()

    def scratch(self) -> Path:
        self._refuse()

    def create_file(self, name: str, path: Path) -> bool:
        self._refuse()

    def put_file(self, name: str, path: Path) -> None:
        self._refuse()

    def replace_torn(self, name: str, data: bytes | memoryview) -> bool:
        self._refuse()

    def delete(self, name: str) -> None:
        self._refuse()

    def move(self, name: str, new_name: str) -> bool:
        self._refuse()

    def remove_if_empty(self) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise WriteFailedError(
            f"{self.url}: a store on the hub is read only; write it to a folder, and upload that (`hf upload`)"
        )

    def _inside(self, name: str) -> str:
        return "/".join(part for part in (self._path, name) if part)

    def _where(self) -> dict[str, Any]:
        return {"revision": self._commit, "repo_type": "dataset"}

    @staticmethod
    def _api() -> Any:
        from huggingface_hub import HfApi, constants

        return HfApi(endpoint=constants.ENDPOINT)

    def _resolve(self, revision: str) -> str:
        from huggingface_hub import constants

        if _COMMIT.fullmatch(revision):
            return revision
        key = (constants.ENDPOINT, self._repo, revision)
        if key not in _resolved:
            place = f"hf://datasets/{self._repo}@{revision}"
            api = self._api()
            seconds = {"timeout": REQUEST_SECONDS, "repo_type": "dataset"}
            found = self._asking(place, lambda: api.repo_info(self._repo, revision=revision, **seconds))
            if found is None:
                raise StoreError(
                    f"{place}: the hub {constants.ENDPOINT} has no such data set, or no such revision of it"
                )
            if int(os.environ.get("WORLD_SIZE") or 1) > 1:
                # Each rank would ask for itself, and a push in between would give them different stores.
                raise StoreError(
                    f"{place} may move on between the ranks of a run; name its commit: "
                    f"hf://datasets/{self._repo}@{found.sha}" + (f"/{self._path}" if self._path else "")
                )
            _resolved[key] = str(found.sha)
            logger.info("%s is commit %s: that is read, also when the branch moves on", place, found.sha)
        return _resolved[key]

    def _get(self, name: str, span: str, *, offset: int = 0) -> bytes | None:
        """The bytes of a file in a range, from `offset` on; None where there is no such file."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self._repo, self._inside(name), endpoint=constants.ENDPOINT, **self._where())

        def ask() -> bytes:
            headers = {**build_hf_headers(), "Range": span, "Accept-Encoding": "identity"}
            answer = get_session().get(url, headers=headers, timeout=REQUEST_SECONDS)
            if answer.status_code == 416:  # nothing lies that far in
                return b""
            hf_raise_for_status(answer)
            # A server may answer with the whole file instead.
            return bytes(answer.content if answer.status_code == 206 else answer.content[offset:])

        return self._asking(f"{self.url}/{name}", ask)

    def _asking(self, what: str, ask: Callable[[], T]) -> T | None:
        """Bounded attempts on what may pass, each in time; None where the hub says that it is not there."""
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError

        if constants.HF_HUB_OFFLINE:
            raise ReadFailedError(
                f"{what}: HF_HUB_OFFLINE is set; name a local copy (`hf download --repo-type dataset`)"
            )
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return waiting_for(what, lambda wait: ask())
            except StoreError:
                raise
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status == 404:
                    return None
                if status in (401, 403):
                    raise ReadFailedError(
                        f"{what}: the hub answers {status}; set HF_TOKEN to one that may read {self._repo}"
                    ) from error
                text, passes = f"the hub answers {status}", status in _PASSING
            except Exception as error:  # of the client's transport, whose classes depend on its version
                text, passes = f"{type(error).__name__}: {error}", True
            if not passes or attempt == ATTEMPTS:
                raise GaveUpError(f"reading {what} failed: {text} (attempt {attempt} of {ATTEMPTS}); try again")
            logger.warning("%s: attempt %d of %d: %s", what, attempt, ATTEMPTS, text)
            time.sleep(BACKOFF_SECONDS * 2**attempt * (0.5 + random.random()))
        raise AssertionError("unreachable")
