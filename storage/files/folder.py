"""What a place of a store must be able to do; local folders and object stores both keep to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

SUBFOLDERS = ("units", "failures", "refused", "tmp")
QUARANTINE = "quarantine"  # a further one, where repair puts what it takes out
URL_SCHEMES = ("s3://", "gs://", "az://", "file://", "memory://")
StorePath = str | Path


class Listed(NamedTuple):
    """What a listing tells of an object besides its name."""

    num_bytes: int
    modified_seconds: float  # of the place's own clock: for people only


class StoreFolder(Protocol):
    """A flat set of named objects; names are relative with `/` and never leave the folder."""

    url: str
    parallel_reads: int
    max_create_bytes: int | None  # above which `create_file` is no way to publish a file; None: any size

    def prepare(self) -> None:
        """Make the folder, and those above it, ready for writing; WriteFailedError when it cannot be written."""

    def check_writable(self) -> None:
        """Raise WriteFailedError when it is plain, without writing anything, that no store can be made here."""

    def explain_absence(self) -> str:
        """One line for a person who named this place although it holds no store."""

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """Whole object, or None when it does not exist."""

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; CorruptError when the object is missing or shorter."""

    def size(self, name: str) -> int | None:
        """Bytes of an object, or None."""

    def names(self, prefix: str, *, cuts: Sequence[str] = ()) -> list[str]:
        """Names of the objects in one subfolder ('' for the top), without the prefix, sorted.

        `cuts`: names, in order, between which the objects lie about evenly. Where a listing comes in pages, one after
        the other, the parts between them are listed side by side; what is found does not depend on them.
        """

    def listing(self, prefix: str, *, cuts: Sequence[str] = (), suffix: str = "") -> dict[str, Listed]:
        """Size and time of each object that `names` lists and that ends with `suffix`, by name, in order of names."""

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Publish a whole object durably under a name that nobody else writes."""

    def create(self, name: str, data: bytes | memoryview) -> bool:
        """Publish durably unless the name exists: True if this call made it. The commit point.

        Where there are no hard links, True may also mean that another writer has made it, of the same bytes.
        """

    def scratch(self) -> Path:
        """Path of a local file, not there yet, for content that `create_file` or `put_file` is to publish."""

    def create_file(self, name: str, path: Path) -> bool:
        """As `create`, of the content of a local file of `scratch`, which is not held in memory as a whole."""

    def put_file(self, name: str, path: Path) -> None:
        """As `put`, of the content of a local file of `scratch`; whoever else writes the name writes the same bytes."""

    def replace_torn(self, name: str, data: bytes | memoryview) -> bool:
        """As `create` of a checked JSON file, but one that was never finished does not count as there."""

    def delete(self, name: str) -> None:
        """Remove an object; a missing one is no error."""

    def move(self, name: str, new_name: str) -> bool:
        """Give an object, or whatever stands at its place, another name durably; False where nothing stands there.

        `new_name` must be free. Of the two names at least one is there at any moment.
        """

    def remove_if_empty(self) -> None:
        """Remove the folder and its subfolders as far as nothing is in them."""
