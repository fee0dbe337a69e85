"""The list of what a dump on Ray has to do: every unit is done, given up by name, or still to be done; never lost."""

from __future__ import annotations

import random

import pytest

from potstill.common.errors import ConfigError
from potstill.launch.cli import parse
from potstill.launch.on_ray import options as ray_options
from potstill.launch.on_ray.options import parse_actors, read_ray_options
from potstill.launch.on_ray.schedule import HUNG_SECONDS, MAX_ATTEMPTS, STRAGGLER_FACTOR, STRAGGLER_SECONDS, Schedule


def do_all(schedule: Schedule, actor: int, *, now: float = 0.0, seconds: float = 1.0) -> list[int]:
    """Let an actor take units and do them until it gets none."""
    done: list[int] = []
    while units := schedule.take(actor, num_actors=1, now=now):
        for unit in units:
            now += seconds
            assert schedule.done(actor, unit, now=now)
        schedule.ended(actor)
        done += units
    return done


def test_units_are_done_in_order_and_once() -> None:
    schedule = Schedule(range(100))
    assert do_all(schedule, 0) == list(range(100)) and schedule.is_over


def test_calls_grow_with_short_units_and_shrink_towards_the_end() -> None:
    schedule, sizes, now = Schedule(range(1000)), [], 0.0
    while units := schedule.take(0, num_actors=4, now=now):
        sizes.append(len(units))
        for unit in units:
            now += 2.0
            schedule.done(0, unit, now=now)
        schedule.ended(0)
    assert sizes[0] == 1 and max(sizes) == 30 and sizes[-1] == 1


def test_what_a_lost_node_held_comes_first_and_counts_against_no_unit() -> None:
    schedule = Schedule(range(3))
    for actor in range(2 * MAX_ATTEMPTS):
        assert schedule.take(actor, num_actors=1, now=0.0) == [0]
        schedule.lost(actor, "node lost", by_itself=False)
    assert do_all(schedule, 99) == [0, 1, 2] and not schedule.given_up


def test_a_unit_that_kills_is_tried_behind_the_others_and_given_up_by_name() -> None:
    schedule, deaths, done, actor = Schedule(range(5)), 0, [], 0
    while not schedule.is_over:
        actor += 1
        for unit in schedule.take(actor, num_actors=1, now=float(actor)):
            if unit == 1:
                schedule.lost(actor, "killed", by_itself=True)
                deaths += 1
                break
            schedule.done(actor, unit, now=actor + 0.1)
            done.append(unit)
        else:
            schedule.ended(actor)
    assert sorted(done) == [0, 2, 3, 4] and schedule.given_up == {1: "3 actors died of it, the last one: killed"}
    assert MAX_ATTEMPTS <= deaths <= MAX_ATTEMPTS + 1


def test_of_a_call_of_many_units_none_is_blamed_and_all_are_tried_alone() -> None:
    schedule = Schedule(range(40))
    schedule.take(0, num_actors=1, now=0.0)
    schedule.done(0, 0, now=0.5)
    schedule.ended(0)
    held = schedule.take(0, num_actors=1, now=1.0)
    assert len(held) > 5
    schedule.lost(0, "killed", by_itself=True)
    order = []
    while units := schedule.take(1, num_actors=1, now=2.0):
        order.append(units)
        for unit in units:
            schedule.done(1, unit, now=2.1)
        schedule.ended(1)
    assert [held[0]] in order and [held[1]] in order and not schedule.given_up
    assert sorted(unit for units in order for unit in units) == list(range(1, 40))


def test_an_idle_actor_takes_the_unit_of_a_slow_one_and_the_first_wins() -> None:
    schedule = Schedule(range(3))
    assert schedule.take(0, num_actors=2, now=0.0) == [0]
    assert do_all(schedule, 1) == [1, 2]
    limit = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * 1.0)
    assert schedule.take(1, num_actors=2, now=limit) == []
    assert schedule.take(1, num_actors=2, now=limit + 0.1) == [0]
    assert schedule.take(2, num_actors=2, now=limit + 9.0) == []  # two copies are enough
    assert schedule.done(1, 0, now=limit + 1.0) and schedule.is_over
    assert not schedule.done(0, 0, now=limit + 2.0)


def test_an_actor_that_was_overtaken_and_does_not_answer_is_named() -> None:
    schedule = Schedule(range(3))
    assert schedule.take(0, num_actors=2, now=0.0) == [0]
    assert do_all(schedule, 1) == [1, 2]
    assert schedule.take(1, num_actors=2, now=10.0) == [0]
    assert schedule.hung(now=1000.0) == []  # slow, but nobody has done it
    assert schedule.done(1, 0, now=11.0)
    assert schedule.hung(now=HUNG_SECONDS - 1) == [] and schedule.hung(now=HUNG_SECONDS + 1) == [0]


def test_a_unit_that_fails_is_given_up_after_some_attempts() -> None:
    schedule = Schedule([7, 8])
    for _ in range(MAX_ATTEMPTS):
        (unit,) = schedule.take(0, num_actors=1, now=0.0)
        if unit == 8:
            schedule.done(0, 8, now=1.0)
            schedule.ended(0)
            (unit,) = schedule.take(0, num_actors=1, now=0.0)
        schedule.failed(0, unit, "OutOfMemoryError", now=1.0)
        schedule.ended(0)
    assert schedule.is_over and schedule.given_up == {7: "OutOfMemoryError"}


@pytest.mark.parametrize("seed", range(20))
def test_no_unit_is_ever_lost(seed: int) -> None:
    """Actors that come, answer, die, and hang in any order; who answers late tells nothing new."""
    rng = random.Random(seed)
    schedule, done, now, actors = Schedule(range(60)), set[int](), 0.0, list(range(4))
    for _ in range(20_000):
        if schedule.is_over:
            break
        now += rng.expovariate(1.0)
        actor = rng.choice(actors)
        held = schedule.holds(actor)
        if not held:
            schedule.ended(actor)
            schedule.take(actor, num_actors=len(actors), now=now)
        elif rng.random() < 0.1:
            schedule.lost(actor, "killed", by_itself=rng.random() < 0.5)
            actors[actors.index(actor)] = max(actors) + 1
        elif rng.random() < 0.05:
            schedule.failed(actor, held[0], "failed", now=now)
        elif rng.random() < 0.7:
            assert schedule.done(actor, held[0], now=now) == (held[0] not in done | schedule.given_up.keys())
            done |= {held[0]} - schedule.given_up.keys()
    assert schedule.is_over
    assert done | schedule.given_up.keys() == set(range(60)) and not done & schedule.given_up.keys()


@pytest.mark.parametrize("text", ["0", "-1", "4:2", "a", "1:", ":", "1:2:3", ""])
def test_numbers_of_actors_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--ray-actors"):
        parse_actors(text)


def test_numbers_of_actors() -> None:
    assert (parse_actors("8"), parse_actors("1:64")) == ((8, 8), (1, 64))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ray-actors", "2"], "without --ray"),
        (["--ray", "ray://head:10001"], "ray job submit"),
        (["--ray", "--ray-gpus", "-1"], "below 0"),
    ],
)
def test_flags_that_do_not_fit(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_ray_options(parse(["dump", *words]))


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_options.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'potstill\[ray\]'"):
        read_ray_options(parse(["dump", "--ray"]))
