"""Flags of the commands that run on Ray, checked before anything is started."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass

from potstill.common.errors import ConfigError

DEFAULT_WAIT_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """How to reach a cluster and what to ask of it. None: what the cluster has decides."""

    address: str | None
    min_actors: int = 1
    max_actors: int | None = None
    num_cpus: float = 1.0
    num_gpus: float | None = None
    wait_seconds: float = DEFAULT_WAIT_SECONDS


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags; `read_ray_options` reads them."""
    group = parser.add_argument_group("Ray")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="run on a Ray cluster: actors hold the teacher and take units as they come. Without an address: that of "
        "RAY_ADDRESS, else the one running on this machine, else one that is started here (local: always that)",
    )
    group.add_argument(
        "--ray-actors",
        metavar="N|MIN:MAX",
        help="actors to ask for, each with a teacher of its own: a cluster that scales itself adds nodes for them, and "
        "work begins with the first. Default: as many as there is room for, as nodes come and go",
    )
    group.add_argument("--ray-cpus", type=float, metavar="N", help="CPUs of an actor, and its threads; default 1")
    group.add_argument(
        "--ray-gpus", type=float, metavar="N", help="GPUs of an actor; default 1 where the cluster has any, else 0"
    )
    group.add_argument(
        "--ray-wait",
        type=float,
        metavar="SECONDS",
        help=f"end with an error where fewer than MIN actors are ready by then; default {DEFAULT_WAIT_SECONDS:.0f}",
    )


def read_ray_options(arguments: argparse.Namespace) -> RayOptions | None:
    """The flags of a command line, None without --ray. Raises ConfigError, also where Ray is not installed."""
    given = {name: getattr(arguments, f"ray_{name}") for name in ("actors", "cpus", "gpus", "wait")}
    if arguments.ray is None:
        if without := [f"--ray-{name}" for name, value in given.items() if value is not None]:
            raise ConfigError(f"{' and '.join(without)} without --ray: add it, or leave them out")
        return None
    if arguments.ray.startswith("ray://"):
        raise ConfigError(
            f"--ray {arguments.ray}: Ray's client protocol is not used, because this command reads the stores itself; "
            "run it on a node of the cluster (`ray job submit -- potstill dump --ray ...`) or give HOST:PORT"
        )
    for name in ("cpus", "gpus", "wait"):
        if given[name] is not None and given[name] < 0:
            raise ConfigError(f"--ray-{name} {given[name]:g} must not be below 0")
    require_ray()
    low, high = (1, None) if given["actors"] is None else parse_actors(given["actors"])
    return RayOptions(
        address=arguments.ray or None,
        min_actors=low,
        max_actors=high,
        num_cpus=1.0 if given["cpus"] is None else given["cpus"],
        num_gpus=given["gpus"],
        wait_seconds=DEFAULT_WAIT_SECONDS if given["wait"] is None else given["wait"],
    )


def parse_actors(text: str) -> tuple[int, int]:
    """`N` or `MIN:MAX` as (MIN, MAX). Raises ConfigError."""
    low, colon, high = text.partition(":")
    parts = (low, high) if colon else (low, low)
    if not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[1]):
        raise ConfigError(f"--ray-actors {text!r}: expected a whole number above 0 (8), or MIN:MAX (1:64)")
    return int(parts[0]), int(parts[1])


def require_ray() -> None:
    """Raise ConfigError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("--ray needs the extra: pip install 'potstill[ray]', on every node of the cluster")
