"""What the digests of a checkpoint's files cost: at a save, beside writing the files, and before a load.

    python -m benchmarks.checkpoint_cost --gigabytes 2 --rounds 5

Both kinds of save, with digests and without, write the same files by turns, each round on a folder of its own; a load
reads them from memory (as after a save) and from the disk (its pages are dropped before).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.about import about
from potstill.student_train.run.checkpoint_files import check_contents, describe_files, manifest_of

FILES = 4  # ranks that wrote a part each


def write(folder: Path, tensors: list[torch.Tensor]) -> list[str]:
    """The files of a checkpoint, as DeepSpeed writes them."""
    folder.mkdir()
    names = []
    for number, tensor in enumerate(tensors):
        names.append(f"zero_pp_rank_{number}_optim_states.pt")
        torch.save({"optimizer_state_dict": {"fp32": tensor}}, folder / names[-1])
    return names


def save_without(folder: Path, tensors: list[torch.Tensor]) -> None:
    """Write, and see that it is on the disk."""
    for name in write(folder, tensors):
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())


def save_with(folder: Path, tensors: list[torch.Tensor]) -> None:
    """Write, digest, and see that it is on the disk."""
    describe_files(folder, write(folder, tensors), sync=True)


def seconds(function: Callable[..., object], *args: object) -> float:
    begun = time.perf_counter()
    function(*args)
    return time.perf_counter() - begun


def drop_pages(folder: Path) -> None:
    """Let the system forget what it holds of the files in memory."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(folder: Path) -> None:
    for path in sorted(folder.glob("*.pt")):
        torch.load(path, weights_only=True)


def measure(place: Path, *, gigabytes: float, rounds: int) -> dict[str, object]:
    """Seconds of each way, and the two figures that are bounded. Raises OSError."""
    tensors = [torch.randn(int(gigabytes * 1e9 / 4 / FILES)) for _ in range(FILES)]
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        ways = {"save without": save_without, "save with": save_with}
        for name, way in sorted(ways.items(), reverse=bool(number % 2)):
            folder = place / name.replace(" ", "_")
            shutil.rmtree(folder, ignore_errors=True)
            os.sync()  # what the last one left is not written at the cost of this one
            times.setdefault(name, []).append(seconds(way, folder, tensors))
        files = describe_files(folder, [path.name for path in sorted(folder.iterdir())])
        manifest = manifest_of(files, {})
        for name, prepare in (("memory", lambda _: None), ("disk", drop_pages)):
            prepare(folder)
            times.setdefault(f"check from {name}", []).append(seconds(check_contents, folder, manifest))
            prepare(folder)
            times.setdefault(f"load from {name}", []).append(seconds(load, folder))
    middle = {name: statistics.median(found) for name, found in times.items()}
    ratios = [a / b - 1 for a, b in zip(times["save with"], times["save without"], strict=True)]
    return {
        "seconds": {name: round(found, 3) for name, found in middle.items()},
        "save_digest_share": round(statistics.median(ratios), 4),
        "save_digest_share_range": [round(min(ratios), 4), round(max(ratios), 4)],
        "load_check_seconds_per_gb": round(middle["check from memory"] / gigabytes, 3),
        "load_check_from_disk_seconds_per_gb": round(middle["check from disk"] / gigabytes, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        found = measure(Path(place), gigabytes=options.gigabytes, rounds=options.rounds)
    for name, value in found["seconds"].items():  # type: ignore[attr-defined]
        print(f"{name:<20} {value:8.3f} s  {options.gigabytes / value if value else 0:6.2f} GB/s")
    settings = {"gigabytes": options.gigabytes, "rounds": options.rounds, "files": FILES}
    print(json.dumps({**found, "settings": settings, **about()}))


if __name__ == "__main__":
    main()
