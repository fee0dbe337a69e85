"""Calls to a file system or server that may not come back: named in the log, then ended by an error with the file.

A read from a mount that hangs cannot be called back: the thread that makes it is lost until the server answers. So a
thread that others need never makes one itself. It hands the call to a helper and waits for the answer, for as long as
it likes; the threads of a prefetcher make theirs themselves, because whoever waits for them looks after their calls
(`check_waits`). All of these threads are daemons, so that none of them holds the process at its end.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from potstill.storage.errors import HungReadError, StoppedReadError, StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")
WARN_VARIABLE, LIMIT_VARIABLE = "POTSTILL_READ_WARN_SECONDS", "POTSTILL_READ_LIMIT_SECONDS"
DEFAULT_SECONDS = {WARN_VARIABLE: 30.0, LIMIT_VARIABLE: 600.0}
POLL_SECONDS = 0.1
# A read that has not come back for so long when a signal asks to stop is not waited for: the promise is 2 s in all.
STUCK_SECONDS = 1.0


class Wait:
    """One call under way; its clock starts again with `moved`, so that a long read of many pieces is no hang."""

    __slots__ = ("is_told", "pid", "since", "thread", "what")

    def __init__(self, what: str) -> None:
        self.what, self.since, self.is_told = what, time.monotonic(), False
        self.thread, self.pid = threading.get_ident(), os.getpid()

    def moved(self) -> None:
        """Say that the call has got on."""
        self.since = time.monotonic()

    def seconds(self) -> float:
        """How long nothing has come."""
        return time.monotonic() - self.since


# Of the process: a signal concerns all of it, and what hangs is found from any thread.
_under_way: dict[int, Wait] = {}
_stop_reason: str | None = None
_local = threading.local()


def seconds_of(variable: str) -> float:
    """The bound that an environment variable sets, or its default. Raises StoreError."""
    text = os.environ.get(variable, "")
    if not text:
        return DEFAULT_SECONDS[variable]
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise StoreError(f"{variable} is {text!r}, expected a number of seconds above 0; set it so, or not at all")
    return value


def waiting_for(what: str, work: Callable[[Wait], T]) -> T:
    """Do `work` and return its result; `what` names the file in errors. `work` says by `moved` that it gets on.

    Raises what `work` raises, HungReadError when nothing has come for the limit, and StoppedReadError when nothing has
    come for STUCK_SECONDS and a signal asks to stop. `work` is then left to a thread that nobody waits for: it must
    change nothing but its own result.
    """
    if getattr(_local, "is_watched", False):
        return _make(Wait(what), work)
    helper: _Helper | None = getattr(_local, "helper", None)
    if helper is None or helper.pid != os.getpid():  # a thread does not survive a fork
        helper = _local.helper = _Helper()
    try:
        return helper.make(what, work)
    except (HungReadError, StoppedReadError, KeyboardInterrupt, SystemExit):
        _local.helper = None  # it may be stuck
        raise


def watch_this_thread() -> None:
    """Have this thread make its calls itself from now on: another one waits for it and asks `check_waits`."""
    _local.is_watched = True


def check_waits(threads: Collection[int]) -> None:
    """Look after the calls of these threads (by ident). Raises HungReadError or StoppedReadError, names slow ones."""
    for wait in tuple(_under_way.values()):
        if wait.thread in threads:
            _check(wait)


def stuck_read(*, threads: Collection[int] | None = None) -> Wait | None:
    """A call, of these threads or of any, of which nothing has come for STUCK_SECONDS; None where there is none."""
    own = os.getpid()  # a fork has a copy of what was under way in its parent
    found = (w for w in tuple(_under_way.values()) if w.pid == own and (threads is None or w.thread in threads))
    return next((wait for wait in found if wait.seconds() > STUCK_SECONDS), None)


def give_up_reads(reason: str | None) -> None:
    """From now on a call that is stuck ends with StoppedReadError; None: as before. Safe in a signal handler."""
    global _stop_reason
    _stop_reason = reason


def stop_reason() -> str | None:
    """Why stuck calls are given up (`give_up_reads`); None: they are not."""
    return _stop_reason


def _check(wait: Wait) -> None:
    seconds, limit = wait.seconds(), seconds_of(LIMIT_VARIABLE)
    if seconds > limit:
        raise HungReadError(
            f"{wait.what}: a read has not come back for {seconds:.3g} s, at most {limit:.3g} are waited for "
            f"({LIMIT_VARIABLE}); see that the file system or the server answers, then run the same command again"
        )
    if _stop_reason is not None and seconds > STUCK_SECONDS:
        raise StoppedReadError(
            f"stopped by {_stop_reason} while a read of {wait.what} had not come back for {seconds:.3g} s; "
            "the same command continues from what is saved"
        )
    if seconds > seconds_of(WARN_VARIABLE) and not wait.is_told:
        wait.is_told = True
        text = "%s: a read has not come back for %.3g s; it is given up after %.3g s"
        logger.warning(text, wait.what, seconds, limit)


def _make(wait: Wait, work: Callable[[Wait], T]) -> T:
    wait.thread = threading.get_ident()
    _under_way[id(wait)] = wait
    try:
        return work(wait)
    finally:
        del _under_way[id(wait)]


class _Call:
    """A call in the hands of a helper; what it gives or raises is its answer."""

    def __init__(self, wait: Wait, work: Callable[[Wait], Any]) -> None:
        self.wait, self._work = wait, work
        self.answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def make(self) -> None:
        try:
            answer: tuple[Any, BaseException | None] = _make(self.wait, self._work), None
        except BaseException as error:  # for the thread that has asked, whatever it is
            answer = None, error
        self.answer.put(answer)


class _Helper:
    """A daemon thread that makes the calls of one thread; one that does not come back is left to itself."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="potstill-read", daemon=True).start()

    def make(self, what: str, work: Callable[[Wait], T]) -> T:
        call = _Call(Wait(what), work)
        self._calls.put(call)
        while True:
            try:
                # Of the main thread this wait is one in which handlers of signals have their turn.
                value, error = call.answer.get(timeout=POLL_SECONDS)
            except queue.Empty:
                _check(call.wait)
                continue
            if error is not None:
                raise error
            found: T = value
            return found

    def __del__(self) -> None:
        self._calls.put(None)


def _serve(calls: queue.SimpleQueue[_Call | None]) -> None:
    watch_this_thread()
    while (call := calls.get()) is not None:
        call.make()
        del call  # or its result would be held until the next one comes
