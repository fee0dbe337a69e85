"""A writer process for the kill campaigns: commits its share of units, then seals if it can.

    python -m tests.storage.kill_worker TOKENS STORE WORKER NUM_WORKERS OFFSET [--few UNITS]

With --few a store of more units than that counts as one of many, whose records are presumed by their names.
"""

from __future__ import annotations

import sys

from potstill.storage import StoreReader, StoreWriter, UnsealedError, seal_store
from potstill.storage.store import presence
from tests.storage.stores import make_targets_row, targets_spec


def main() -> None:
    tokens, path, worker, num_workers, offset = sys.argv[1], sys.argv[2], *(int(x) for x in sys.argv[3:6])
    if sys.argv[6:7] == ["--few"]:
        presence.FEW_LOCAL = int(sys.argv[7])
    reader = StoreReader(tokens)
    spec = targets_spec(reader.num_rows, reader.digest)
    writer = StoreWriter.create(path, spec)
    print("ready", flush=True)
    todo = writer.todo(worker=worker, num_workers=num_workers)
    # Both writers of a pair may be given the same share; starting elsewhere makes them race in the middle.
    start = offset % max(1, len(todo))
    for unit in todo[start:] + todo[:start]:
        rows = [make_targets_row(reader.row(r), spec) for r in writer.unit_rows(unit)]  # type: ignore[arg-type]
        writer.commit_unit(unit, rows)
    try:
        seal_store(path)
    except UnsealedError:
        return


if __name__ == "__main__":
    main()
