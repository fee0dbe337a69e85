"""Which actor does which units next: the list of what is to do, who holds what, and what was tried how often.

Plain bookkeeping without Ray. A unit is handed out again when its actor is lost, when it failed, and when it takes far
longer than the others while an actor is idle; whoever commits it first has done it. One that was under way in several
actors as they died is given up, named, and tried again by the next start.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

MAX_ATTEMPTS = 3  # deaths of actors that hold a unit alone, and failures, before it is given up
STRAGGLER_FACTOR = 3.0  # times the median, for a unit that an idle actor takes as well
STRAGGLER_SECONDS = 2.0  # below which nobody is slow
MAX_COPIES = 2
HUNG_FACTOR, HUNG_SECONDS = 10.0, 60.0  # as these, for an actor that is replaced though it has not died
CALL_SECONDS = 60.0  # of work in one call: the model idles at its beginning and end for about a second
MAX_UNITS_PER_CALL = 64
UNDER_WAY = 4  # of a call, when its actor dies: one in the model, one read ahead, two being committed
_TIMES_KEPT = 501


@dataclass
class _Held:
    units: deque[int]  # in order, those that were not told of
    since: float  # when the first of them began
    is_alone: bool  # whether the call is of one unit, so that it is known which one an actor died of


class Schedule:
    """See above. Actors are numbers; `now` is a monotonic clock's."""

    def __init__(self, units: Sequence[int]) -> None:
        self._queue: deque[int] = deque(units)
        self._left = set(units)  # neither done nor given up
        self._held: dict[int, _Held] = {}
        self._attempts: Counter[int] = Counter()
        self._alone: set[int] = set()
        self._times: deque[float] = deque(maxlen=_TIMES_KEPT)
        self.given_up: dict[int, str] = {}

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do or to wait for."""
        return not self._left

    @property
    def num_left(self) -> int:
        """Units that are neither done nor given up."""
        return len(self._left)

    def is_left(self, unit: int) -> bool:
        """Whether a unit is neither done nor given up."""
        return unit in self._left

    def holds(self, actor: int) -> list[int]:
        """The units of an actor's call that it has not told of."""
        held = self._held.get(actor)
        return [] if held is None else list(held.units)

    def take(self, actor: int, *, num_actors: int, now: float) -> list[int]:
        """Units for an idle actor; none where there is nothing to begin and nobody is slow."""
        units = self._from_queue(num_actors) or self._from_slow(now)
        if units:
            self._held[actor] = _Held(deque(units), now, is_alone=len(units) == 1)
        return units

    def done(self, actor: int, unit: int, *, now: float) -> bool:
        """An actor tells that a unit is there; False where it was known before."""
        self._told(actor, unit, now)
        is_news = unit in self._left
        self._left.discard(unit)
        return is_news

    def failed(self, actor: int, unit: int, reason: str, *, now: float) -> None:
        """An actor tells that a unit could not be made: it is tried again behind all others, then given up."""
        self._told(actor, unit, now, is_measured=False)
        self._blame(unit, reason)

    def ended(self, actor: int) -> None:
        """An actor's call is over; what it has not told of is to be done."""
        held = self._held.pop(actor, None)
        if held is not None:
            self._put_back(held.units)

    def lost(self, actor: int, cause: str, *, by_itself: bool) -> None:
        """An actor is gone. `by_itself`: it died, so that a unit may be why; else its node went, or it was stopped."""
        held = self._held.pop(actor, None)
        if held is None:
            return
        if not by_itself:
            self._put_back(held.units)
        elif held.is_alone:
            for unit in held.units:
                self._blame(unit, f"{MAX_ATTEMPTS} actors died of it, the last one: {cause}")
        else:
            units = list(held.units)
            self._put_back(units[UNDER_WAY:])
            for unit in units[:UNDER_WAY]:
                self._back(unit)

    def hung(self, now: float) -> list[int]:
        """Actors that were overtaken on their unit long ago and still do not answer."""
        if not self._times:
            return []
        limit = self._limit(HUNG_FACTOR, HUNG_SECONDS)
        return [
            actor
            for actor, held in self._held.items()
            if held.units and held.units[0] not in self._left and now - held.since > limit
        ]

    def _blame(self, unit: int, reason: str) -> None:
        if unit not in self._left:
            return
        self._attempts[unit] += 1
        if self._attempts[unit] < MAX_ATTEMPTS:
            self._back(unit)
            return
        self._left.discard(unit)
        self.given_up[unit] = reason

    def _back(self, unit: int) -> None:
        """Behind all others, in a call of its own: it may be what the actor died of."""
        self._alone.add(unit)
        if unit in self._left and not self._is_under_way(unit):
            self._queue.append(unit)

    def _put_back(self, units: Sequence[int] | deque[int]) -> None:
        self._queue.extendleft(unit for unit in reversed(units) if unit in self._left and not self._is_under_way(unit))

    def _is_under_way(self, unit: int) -> bool:
        return unit in self._queue or any(unit in held.units for held in self._held.values())

    def _told(self, actor: int, unit: int, now: float, *, is_measured: bool = True) -> None:
        held = self._held.get(actor)
        if held is not None and unit in held.units:
            held.units.remove(unit)
            if is_measured:
                self._times.append(now - held.since)
            held.since = now

    def _from_queue(self, num_actors: int) -> list[int]:
        units: list[int] = []
        size = self._call_size(num_actors)
        while self._queue and len(units) < size:
            unit = self._queue[0]
            if unit in self._alone and units:
                break
            self._queue.popleft()
            if unit in self._left:
                units.append(unit)
            if unit in self._alone and units:
                break
        return units

    def _call_size(self, num_actors: int) -> int:
        """As many units as fill CALL_SECONDS, and few where little is left, so that all actors end together."""
        if not self._times:
            return 1
        fair = -(-len(self._queue) // (2 * max(1, num_actors)))
        wanted = round(CALL_SECONDS / max(statistics.median(self._times), 1e-3))
        return max(1, min(wanted, fair, MAX_UNITS_PER_CALL))

    def _limit(self, factor: float, least_seconds: float) -> float:
        return max(least_seconds, factor * statistics.median(self._times))

    def _from_slow(self, now: float) -> list[int]:
        if not self._times:
            return []
        limit = self._limit(STRAGGLER_FACTOR, STRAGGLER_SECONDS)
        copies = Counter(unit for held in self._held.values() for unit in held.units)
        for held in sorted(self._held.values(), key=lambda held: held.since):
            if now - held.since <= limit:
                break
            for unit in held.units:
                if unit in self._left and copies[unit] < MAX_COPIES:
                    return [unit]
        return []
