"""Errors in the threads beside the model: of the one that reads ahead, of those that finish; noted, and tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader, StoreWriter, store_status
from potstill.teacher_dump import DumpConfig, dump
from tests.teacher_dump.tiny import make_tokens

NUM_UNITS = 4


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "check_tokenizer": False, "batch_rows": 2}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection={"k": 8}, **changes)


def test_a_damaged_unit_of_the_rows_is_named_and_the_rest_is_done(tmp_path: Path, llama: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 2 * NUM_UNITS)
    dump(config(tokens, tmp_path / "whole", llama))
    (file,) = (tokens / "units").glob("u0000001-*.arrow")
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    with pytest.raises(UserError, match=rf"1 units failed and 3 were committed: unit 1: CorruptError: .*{file.name}"):
        dump(config(tokens, tmp_path / "out", llama))
    status = store_status(tmp_path / "out")
    assert (status.committed, status.failed, status.missing) == (3, 1, 1)
    file.write_bytes(good)
    summary: Any = dump(config(tokens, tmp_path / "out", llama))
    assert summary.sealed and summary.units == 1 and store_status(tmp_path / "out").failed == 0
    assert StoreReader(tmp_path / "out").digest == StoreReader(tmp_path / "whole").digest


@pytest.mark.parametrize("finish_threads", [1, 3])
def test_a_unit_that_cannot_be_finished_is_tried_again_by_another_number_of_workers(
    tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, finish_threads: int
) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 2 * NUM_UNITS)
    dump(config(tokens, tmp_path / "whole", llama))
    settings = config(tokens, tmp_path / "out", llama, finish_threads=finish_threads)
    commit = StoreWriter.commit_unit

    def broken(self: StoreWriter, unit: int, *args: Any, **options: Any) -> bool:
        if unit == 2:
            raise RuntimeError("the encoder lost its way")
        return commit(self, unit, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit_unit", broken)
        with pytest.raises(UserError, match="1 units failed and 3 were committed: unit 2: RuntimeError: the encoder"):
            dump(settings)
        with pytest.raises(UserError, match="unit 2: failure 1 in a row, the worker stops"):
            dump(settings.model_copy(update={"max_consecutive_failures": 1}))
    for worker in range(3):
        dump(settings, worker=worker, num_workers=3)
    assert dump(settings).sealed  # type: ignore[union-attr]
    assert StoreReader(tmp_path / "out").digest == StoreReader(tmp_path / "whole").digest
