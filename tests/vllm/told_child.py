"""Run by itself (`python -m tests.vllm.told_child task.json`): one batch through engine vllm_logprobs, into a file.

The task names the teacher, the tokens store, how many rows, k and the output: an npz with the figures of each position.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from potstill.storage import StoreReader
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import TopKWanted, TopLogprobs
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.on_device import batch_best


def main(task: dict[str, object]) -> None:
    """See above."""
    tokens = StoreReader(str(task["tokens"]))
    spec, k = tokens.spec, int(str(task["k"]))
    wanted = TopKWanted(k=k, vocab_size=spec.vocab_size, temperatures=())
    engine = load_engine(TeacherConfig.model_validate(task["teacher"]), wanted, row_length=spec.row_length)
    batch = packed_batch(tokens.tokens_rows(range(int(str(task["rows"])))), length=spec.row_length)
    best = batch_best(engine, batch, k=k, vocab_size=spec.vocab_size, temperatures=(), chunk_bytes=None).wait()
    assert isinstance(best, TopLogprobs)
    np.savez(str(task["output"]), **{name: value.numpy() for name, value in asdict(best).items()})


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
