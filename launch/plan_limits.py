"""What a dump and a run cannot be faster than: the model's arithmetic, and what the host does for each token."""

from __future__ import annotations

import os
import re
import time

from potstill.common.errors import UserError

# Dense bfloat16 operations per second and memory, from the makers' data sheets.
GPUS = {
    "h200": (989e12, 141e9),
    "h100": (989e12, 80e9),
    "a100": (312e12, 80e9),
    "l40s": (362e12, 48e9),
    "a10": (125e12, 24e9),
    "rtx4090": (165e12, 24e9),
}
# Hopper and Ada multiply FP8 twice as fast as bfloat16, by the same data sheets; Ampere (A100, A10) has no FP8.
FP8_GPUS, _FP8_SPEED = ("h200", "h100", "l40s", "rtx4090"), 2.0
CPU = ("cpu", "none")
# Tokens per second of one core from results on the host to a committed unit, with 64 entries a token: the slowest of
# benchmarks/results/dump_cpu.json. About an eighth of it does not depend on the number of entries (storage_codec.txt).
_HOST_TOKENS, _HOST_ENTRIES, _HOST_FIXED = 372_609.0, 64.0, 0.12
# Tokens per second of a loader that reads tokens and targets from a local disk (benchmarks/results/storage_loader.txt).
LOADER_TOKENS = 1_100_294.0
# Imports and building a model, and reading its weights: a guess where nothing was measured, so that no plan says 0.
_START_SECONDS, _LOAD_BYTES_PER_SECOND = 10.0, 1e9
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
_COUNT = re.compile(r"(\d[\d_,]*(?:\.\d+)?(?:e\+?\d+)?)\s*([kmgbt]?)", re.IGNORECASE)
COUNT_FORMS = "100000000, 100e9, 100B, 20M"


def read_count(value: object) -> object:
    """A number of tokens from `100e9`, `100B`, `1.5T`, `20M`; any other text is left as it is. ValueError below 1."""
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match is None:
            return value
        value = float(match[1].replace(",", "").replace("_", "")) * _UNITS[match[2].lower()]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and (value < 1 or isinstance(value, float)):
        raise ValueError(f"found {value}; expected a whole number of tokens from 1 on, as in {COUNT_FORMS}")
    return value


def device(name: str) -> tuple[float, float]:
    """Operations per second and memory in bytes of a GPU of the table, or of this machine's processor, measured."""
    if name in CPU:
        return cpu_operations_per_second(), float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if name not in GPUS:
        raise UserError(f"gpu {name!r} is not known; use one of {', '.join(GPUS)}, or cpu for this machine without one")
    return GPUS[name]


def fp8_speed(name: str) -> float:
    """How many times faster than products of 16 bits those of FP8 are on a GPU of the table."""
    return _FP8_SPEED if name in FP8_GPUS else 1.0


def cpu_operations_per_second(*, seconds: float = 0.3, size: int = 1024) -> float:
    """What torch does here in a float32 matrix product, with the threads that it has: the best of a few."""
    import torch

    a, b = torch.ones(size, size), torch.ones(size, size)
    best, ends = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < ends:
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def host_tokens_per_second(entries: float, *, threads: int) -> float:
    """How many tokens of so many entries a worker's finishing threads select, encode and commit, each on a core."""
    return threads * _HOST_TOKENS / (_HOST_FIXED + (1 - _HOST_FIXED) * entries / _HOST_ENTRIES)


def start_seconds(weights_bytes: float) -> float:
    """From the start of a worker to its first batch."""
    return _START_SECONDS + weights_bytes / _LOAD_BYTES_PER_SECOND


def format_size(num_bytes: float) -> str:
    """Bytes with a decimal unit, as disks are sold: `640.0 MB`, `8.67 TB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_hours(seconds: float) -> str:
    """Hours with two digits that say something: `0.0042`, `1.37`, `1,204`."""
    hours = seconds / 3600
    return f"{hours:.2g}" if hours < 1 else f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"
