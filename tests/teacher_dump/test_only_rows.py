"""A dump of some rows only: they are those of a whole dump, the others keep their places, and workers share it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import HELD, MismatchError, StoreReader, TargetsRow, held_rows, seal_store, verify_store
from potstill.teacher_dump import DumpConfig, dump
from tests.teacher_dump.test_dump import config, targets_of
from tests.teacher_dump.tiny import make_tokens, save_llama

ROWS = np.array([1, 2, 5])  # of three units of two rows, all but the first halves of two of them


def some(rows: Any = ROWS) -> Any:
    return lambda member: np.asarray(rows)


@pytest.mark.parametrize("selection", [{"mode": "top_p_k", "p": 0.8, "k": 20}, {"mode": "sample", "num_draws": 9}])
def test_the_rows_are_those_of_a_whole_dump(tokens: Path, tmp_path: Path, llama: Path, selection: Any) -> None:
    options = {"selection": selection, "temperatures": [] if selection["mode"] == "sample" else [2.0]}
    dump(config(tokens, tmp_path / "all", llama, **options))
    summary = dump(config(tokens, tmp_path / "few", llama, **options), only_rows=some())
    assert (summary.rows, summary.sealed, summary.refused_rows) == (3, True, ())
    few = StoreReader(tmp_path / "few")
    found = held_rows(few)
    assert found is not None and found.tolist() == ROWS.tolist() and verify_store(tmp_path / "few", deep=True).ok
    num_tokens = sum(
        len(few_row.targets.offsets) - 1 for few_row in targets_of(tmp_path / "few") if few_row.row in ROWS
    )
    size = json.loads((tmp_path / "few" / "manifest.json").read_text())["num_bytes"]
    assert summary.bytes_per_token == pytest.approx(size / num_tokens), "of the rows that the teacher was run over"
    for own, whole in zip(targets_of(tmp_path / "few"), targets_of(tmp_path / "all"), strict=True):
        assert own.token_digest == whole.token_digest and own.targets.num_tokens == whole.targets.num_tokens
        if own.row in ROWS:
            np.testing.assert_array_equal(own.targets.ids, whole.targets.ids)
            np.testing.assert_array_equal(own.targets.offsets, whole.targets.offsets)
            np.testing.assert_allclose(own.targets.entropy, whole.targets.entropy, atol=1 / 16)
            assert own.stats == pytest.approx({**whole.stats, HELD: 1.0}, abs=1e-5)
        else:
            assert not own.targets.num_entries and set(own.stats.values()) == {0.0}


def test_workers_share_it_and_another_set_of_rows_is_refused(tokens: Path, tmp_path: Path, llama: Path) -> None:
    options = {"seal": False, "num_workers": 2}
    # The second worker's unit holds no row that is wanted.
    for worker, rows in ((0, 2), (1, 0)):
        found = dump(config(tokens, tmp_path / "few", llama, worker=worker, **options), only_rows=some([1, 5]))
        assert found.rows == rows and found.num_missing == (0 if worker else 1)
    seal_store(tmp_path / "few")
    found = held_rows(StoreReader(tmp_path / "few"))
    assert found is not None and found.tolist() == [1, 5]
    for other in (some([1]), None):
        with pytest.raises(MismatchError, match=r"another run stands here: .*only_rows"):
            dump(config(tokens, tmp_path / "few", llama), only_rows=other)


def test_each_checkpoint_of_a_series_has_rows_of_its_own(tokens: Path, tmp_path: Path) -> None:
    for name in ("early", "late"):
        save_llama(tmp_path / "runs" / name, seed=len(name))
    settings = config(tokens, tmp_path / "out", tmp_path / "runs", teacher={"checkpoints": ["early", "late"]})
    rows = {"early": [0], "late": [3, 4]}

    def of(member: DumpConfig) -> Any:
        return np.array(rows[Path(member.output).name])

    dump(settings, only_rows=of)
    for name, wanted in rows.items():
        found = held_rows(StoreReader(tmp_path / "out" / name))
        assert found is not None and found.tolist() == wanted


def test_refused_rows_are_counted_over_the_rows_that_are_run(tmp_path: Path, llama: Path) -> None:
    """One of two is too many where one of twenty would not be."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][63] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    many = make_tokens(tmp_path / "t", [(16,)] * 20, vocab_size=64)
    rows = StoreReader(many).tokens_rows(range(20))
    bad = [row.row for row in rows if 63 in row.tokens][:1]
    good = [row.row for row in rows if 63 not in row.tokens][:1]
    assert bad and good
    settings = config(many, tmp_path / "few", broken, max_rejected_fraction=0.1)
    with pytest.raises(UserError, match="1 rows are refused, 0 are allowed"):
        dump(settings, only_rows=some(bad + good))
    kept = config(many, tmp_path / "kept", broken, max_rejected_fraction=0.5)
    assert dump(kept, only_rows=some(bad + good)).refused_rows == tuple(bad)
    [row] = [row for row in targets_of(tmp_path / "kept") if isinstance(row, TargetsRow) and row.row == bad[0]]
    assert row.stats[HELD] == 1.0 and row.stats["num_targets"] == 0.0
