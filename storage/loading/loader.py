"""Loader: this rank's slice of every global batch, several aligned stores joined by row, prefetched by threads."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar, overload

from potstill.storage.errors import MismatchError, StoreError
from potstill.storage.files.prefetch import Prefetcher
from potstill.storage.loading.joining import JoinedRow, as_targets
from potstill.storage.loading.order import ORDER_VERSION, Int64
from potstill.storage.loading.row_plan import RowPlan
from potstill.storage.loading.sources import Joined, Source, SourceRows, as_sources
from potstill.storage.rows.row_types import TargetsRow, TokensRow
from potstill.storage.store.reader import StoreReader

STATE_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LoadedBatch:
    """One rank's contiguous slice of a global batch; a rank may hold no rows when the world exceeds the batch.

    Row ids (rows int64 [rows], and `.row` of all rows) are global where there are several sources. joined: by name, one
    entry per row, None for a row whose source has no store of that name. source int64 [rows]: number of the source that
    each row is of; None where there is one source only.
    """

    batch: int
    rows: Int64
    tokens: list[TokensRow]
    joined: Mapping[str, Sequence[JoinedRow | None]]
    source: Int64 | None = None

    def targets(self, name: str) -> list[TargetsRow]:
        """The rows of the targets store `name`.

        Raises MismatchError where that is a store of scores, or a row's source has no such store.
        """
        for number, row in enumerate(self.joined[name]):
            if row is None:
                raise MismatchError(f"row {self.rows[number]} is of a source that has no store {name}")
        return [as_targets(name, row) for row in self.joined[name] if row is not None]


@dataclass(frozen=True, eq=False)
class _Piece:
    tokens: list[TokensRow]
    joined: Joined


class _Share:
    """What the plan says of one batch, asked once, by the thread that needs it first: the consumer has other work."""

    def __init__(self, ask: Callable[[], tuple[Int64, frozenset[str]]]) -> None:
        self._ask, self._lock = ask, threading.Lock()
        self._found: tuple[Int64, frozenset[str]] | None = None

    def get(self) -> tuple[Int64, frozenset[str]]:
        """Row numbers of this rank's share, and the names of the joined stores. Raises what the plan raises."""
        with self._lock:
            if self._found is None:
                self._found = self._ask()
            return self._found


class Loader(Generic[T]):
    """Iterator over batches, without end where none is given; any world size and resume give the same global batches.

    A batch is a LoadedBatch, or what `finish` makes of it in the threads that read.
    """

    @overload
    def __init__(
        self: Loader[LoadedBatch],
        plan: RowPlan,
        tokens: StoreReader | Sequence[Source],
        joined: Mapping[str, StoreReader] | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        prefetch_batches: int = 2,
        num_threads: int = 2,
        first_batch: int = 0,
        end_batch: int | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self,
        plan: RowPlan,
        tokens: StoreReader | Sequence[Source],
        joined: Mapping[str, StoreReader] | None = None,
        *,
        finish: Callable[[LoadedBatch], T],
        rank: int = 0,
        world: int = 1,
        prefetch_batches: int = 2,
        num_threads: int = 2,
        first_batch: int = 0,
        end_batch: int | None = None,
    ) -> None: ...

    def __init__(
        self,
        plan: RowPlan,
        tokens: StoreReader | Sequence[Source],
        joined: Mapping[str, StoreReader] | None = None,
        *,
        finish: Callable[[LoadedBatch], Any] | None = None,
        rank: int = 0,
        world: int = 1,
        prefetch_batches: int = 2,
        num_threads: int = 2,
        first_batch: int = 0,
        end_batch: int | None = None,
    ) -> None:
        """`tokens` and the stores `joined` by name, or several sources, each with its own; the plan counts rows of all.

        Stores must have been made from the tokens that they are joined to, and sources must agree in row length,
        tokenizer and vocabulary; MismatchError names the field otherwise.

        `prefetch_batches` batches are read and finished ahead of the one in use, by `num_threads` threads (take more
        for stores on object storage, where a read mostly waits). `finish` must be a pure function of the batch: it runs
        in one of the threads once the whole batch is there, several batches may be finished at once, and what it
        raises is raised by `next` in its batch's turn.

        The batches are [first_batch, end_batch), as if those before had been committed; nothing is read of others.
        """
        if not 0 <= rank < world or prefetch_batches < 1 or num_threads < 1:
            raise StoreError(
                f"loader: rank {rank} of {world}, {prefetch_batches} batches ahead, {num_threads} threads is no setting"
            )
        if first_batch < 0 or (end_batch is not None and end_batch < first_batch):
            raise StoreError(f"loader: batches [{first_batch}, {end_batch}) are no range of batches")
        self._plan, self._sources = plan, SourceRows(as_sources(tokens, joined))
        self._rank, self._world = rank, world
        self._finish: Callable[[LoadedBatch], T] = finish or _as_loaded
        self._prefetch_batches, self._num_threads = prefetch_batches, num_threads
        self._committed = self._next_batch = self._submitted = first_batch
        self._end_batch: float = math.inf if end_batch is None else end_batch
        self._prefetcher: Prefetcher[T] | None = None
        self._closed = False

    def __iter__(self) -> Loader[T]:
        return self

    def __next__(self) -> T:
        """The next batch in order; errors of the threads surface here."""
        if self._closed:
            raise StoreError("loader: closed; build a new one")
        if self._next_batch >= self._end_batch:
            raise StopIteration
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(num_threads=self._num_threads, name="potstill-loader")
        while self._submitted <= self._next_batch + self._prefetch_batches and self._submitted < self._end_batch:
            self._submit(self._prefetcher, self._submitted)
            self._submitted += 1
        try:
            found = self._prefetcher.take()
        except BaseException:
            # The batch is lost for this iterator; going on would silently shift the order.
            self.close()
            raise
        self._next_batch += 1
        return found

    def commit(self, batch: int) -> None:
        """Say that the optimizer step of `batch` is done; only this moves the state."""
        if batch != self._committed:
            raise StoreError(f"loader: batch {batch} committed, expected {self._committed}; commit each step once")
        self._committed += 1

    def state_dict(self) -> dict[str, Any]:
        """JSON state, equal on all ranks; it counts committed batches, never prefetched ones."""
        return {
            "version": STATE_VERSION,
            "order_version": ORDER_VERSION,
            # 96 bits pin a store and keep the state small.
            "stores": {name: digest[:24] for name, digest in self._sources.digests().items()},
            "plan": self._plan.identity(),
            "batches": self._committed,
            "position": self._plan.position(self._committed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after `state`; must come before iteration. MismatchError names the field that differs."""
        if self._prefetcher is not None or self._closed:
            raise StoreError("loader: load_state_dict must come before the first batch is asked for")
        own: dict[str, Any] = self.state_dict()
        for key in ("version", "order_version", "stores", "plan"):
            found = state.get(key)
            if found == own[key]:
                continue
            if isinstance(found, Mapping) and isinstance(own[key], Mapping):
                names = sorted(n for n in found.keys() | own[key].keys() if found.get(n) != own[key].get(n))
                detail = "; ".join(f"{n}: saved {found.get(n)!r}, now {own[key].get(n)!r}" for n in names)
            else:
                detail = f"saved {found!r}, now {own[key]!r}"
            raise MismatchError(
                f"loader state: {key} differs ({detail}); resume with the same stores and plan, or start a new run"
            )
        batches = state.get("batches")
        if type(batches) is not int or batches < 0:
            raise MismatchError(f"loader state: batches is {batches!r}, expected a count")
        self._committed = self._next_batch = self._submitted = batches

    def close(self) -> None:
        """Stop the threads (joined within a second) and drop what is prefetched."""
        self._closed = True
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __enter__(self) -> Loader[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _rank_rows(self, batch: int) -> Int64:
        rows = self._plan.rows(batch)
        size = self._plan.global_batch
        if rows.shape != (size,):
            raise StoreError(f"plan: batch {batch} has rows of shape {rows.shape}, expected ({size},)")
        return rows[self._rank_slice()]

    def _rank_slice(self) -> slice:
        """Places of this rank's rows in every global batch."""
        size = self._plan.global_batch
        return slice(size * self._rank // self._world, size * (self._rank + 1) // self._world)

    def reads(self, batch: int) -> list[Int64]:
        """Row ids of each read that this rank makes of the stores for global batch `batch`; nothing is read."""
        rows = self._rank_rows(batch)
        return [rows[cut] for cut in self._cuts(len(rows))]

    def _cuts(self, num_rows: int) -> list[slice]:
        """One task per thread and batch, so that a large batch is read in parallel."""
        step = max(1, -(-num_rows // self._num_threads))
        return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]

    def _submit(self, prefetcher: Prefetcher[T], batch: int) -> None:
        share = _Share(functools.partial(self._plan_share, batch))
        mine = self._rank_slice()
        parts = [functools.partial(self._load_cut, share, cut) for cut in self._cuts(mine.stop - mine.start)]
        prefetcher.submit(parts, functools.partial(self._join, batch, share))

    def _plan_share(self, batch: int) -> tuple[Int64, frozenset[str]]:
        """This rank's rows of a batch, and the joined stores that it needs."""
        names = self._plan.joined(batch)
        unknown = names - self._sources.joined_names
        if unknown:
            raise StoreError(f"plan: batch {batch} needs the stores {sorted(unknown)}, which were not given")
        return self._rank_rows(batch), names

    def _load_cut(self, share: _Share, cut: slice) -> _Piece:
        rows, names = share.get()
        return self._load(rows[cut], names)

    def _load(self, rows: Int64, names: frozenset[str]) -> _Piece:
        return _Piece(*self._sources.read(rows, names))

    def _join(self, batch: int, share: _Share, pieces: list[_Piece]) -> T:
        rows, names = share.get()
        joined = {name: [row for piece in pieces for row in piece.joined[name]] for name in sorted(names)}
        tokens = [row for piece in pieces for row in piece.tokens]
        source = None if self._sources.has_one else self._sources.source_of(rows)
        return self._finish(LoadedBatch(batch=batch, rows=rows, tokens=tokens, joined=joined, source=source))


def _as_loaded(batch: LoadedBatch) -> Any:
    return batch
