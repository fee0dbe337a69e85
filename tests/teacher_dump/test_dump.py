"""dump as a whole: what is stored is what transformers says, whatever the batches, workers and interruptions."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.storage import (
    MismatchError,
    StoreReader,
    StoreWriter,
    TargetsRow,
    UnsealedError,
    WriteFailedError,
    store_status,
    token_digest,
)
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.engines.hf import HfEngine
from potstill.teacher_dump.job import StoppedError
from tests.teacher_dump.tiny import VOCAB, make_tokens, save_llama, save_model, token_rows
from tests.teacher_dump.truth import dense_truth


def config(tokens: Path, output: Path, model: Path, **changes: Any) -> DumpConfig:
    teacher = {"model": model, "batch_rows": 3, "check_tokenizer": False} | changes.pop("teacher", {})
    settings = {"tokens": tokens, "output": output, "teacher": teacher, "selection": {"mode": "top_k", "k": 8}}
    return DumpConfig(**(settings | changes))


def targets_of(path: Path) -> list[TargetsRow]:
    reader = StoreReader(path)
    rows = reader.rows(range(reader.num_rows))
    return [row for row in rows if isinstance(row, TargetsRow)]


def refuse_nothing(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """Keep what is handed to the store, before its grids round it."""
    kept: list[list[Any]] = []
    commit = StoreWriter.commit_unit

    def spy(self: StoreWriter, unit: int, rows: Any, **options: Any) -> bool:
        kept.append(list(rows))
        return commit(self, unit, rows, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", spy)
    return kept


@pytest.mark.parametrize("selection", [{"mode": "top_k", "k": 8}, {"mode": "top_p_k", "p": 0.8, "k": 20}])
def test_rows_are_what_transformers_says(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, selection: dict[str, Any]
) -> None:
    kept = refuse_nothing(monkeypatch)
    summary = dump(config(tokens, tmp_path / "out", llama, selection=selection, temperatures=[2.0, 0.5]))
    assert summary.sealed and summary.rows == 6 and not summary.refused_rows
    for row, truth, source in zip(
        sorted((r for unit in kept for r in unit), key=lambda r: r.row),
        dense_truth(llama, tokens, vocab_size=VOCAB),
        token_rows(tokens),
        strict=True,
    ):
        targets = row.targets
        assert row.token_digest == token_digest(source.tokens, source.doc_lens)
        for place, token in enumerate(truth):
            here = slice(*targets.offsets[place : place + 2])
            ids, logprobs = targets.ids[here], targets.logprobs[here]
            if token.label is None:
                side = [targets.log_tail, targets.entropy, targets.label_logprob, *targets.log_tail_at.values()]
                assert len(ids) == 0 and targets.label_rank[place] == 255
                assert all(column[place] == 0 for column in side)
                continue
            order = token.order
            mass = np.exp(token.logprobs[order]).cumsum()
            count = 8 if selection["mode"] == "top_k" else min(20, 1 + int((mass < 0.8).sum()))
            assert ids.tolist() == order[:count].tolist()
            np.testing.assert_allclose(logprobs, token.logprobs[ids], atol=3e-5)
            np.testing.assert_allclose(targets.log_tail[place], token.log_tail(ids), atol=2e-3)
            for temperature in (2.0, 0.5):
                expected = token.log_tail(ids, temperature)
                np.testing.assert_allclose(targets.log_tail_at[temperature][place], expected, atol=2e-2, rtol=1e-3)
            np.testing.assert_allclose(targets.entropy[place], token.entropy, atol=1e-4)
            np.testing.assert_allclose(targets.label_logprob[place], token.logprobs[token.label], atol=3e-5)
            assert targets.label_rank[place] == order.tolist().index(token.label)
        losses = [-t.logprobs[t.label] for t in truth if t.label is not None]
        assert row.stats["mean_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        assert row.stats["num_targets"] == len(losses)


def test_the_store_reads_back_on_its_grid(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "out", llama))
    reader = StoreReader(tmp_path / "out")
    spec = reader.spec
    assert spec.input_digest == StoreReader(tokens).digest and spec.selection == {"mode": "top_k", "k": 8}
    assert spec.teacher is not None and spec.teacher["engine"] == "hf" and spec.teacher["dtype"] == "float32"
    for row, truth in zip(targets_of(tmp_path / "out"), dense_truth(llama, tokens, vocab_size=VOCAB), strict=True):
        for place, token in enumerate(truth):
            here = slice(*row.targets.offsets[place : place + 2])
            assert row.targets.logprobs is not None
            kept = row.targets.ids[here]
            assert sorted(kept.tolist()) == sorted([] if token.label is None else token.order[:8].tolist())
            np.testing.assert_allclose(row.targets.logprobs[here], token.logprobs[kept], atol=1 / 32 + 1e-4)
    losses = [
        -t.logprobs[t.label]
        for row in dense_truth(llama, tokens, vocab_size=VOCAB)[:1]
        for t in row
        if t.label is not None
    ]
    assert reader.row_stats["mean_loss"][0] == pytest.approx(np.mean(losses), abs=1e-4)


def test_ids_beyond_the_tokenizer_are_left_out_and_their_mass_is_told(
    tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = make_tokens(tmp_path / "tokens", vocab_size=50)
    summary = dump(config(tokens, tmp_path / "out", llama, selection={"mode": "top_k", "k": 60}))
    truth = dense_truth(llama, tokens, vocab_size=50)
    full = dense_truth(llama, tokens, vocab_size=VOCAB)
    excluded = [1 - np.exp(wide.logprobs[:50]).sum() for row in full for wide in row if wide.label is not None]
    assert summary.excluded_mass == pytest.approx(np.mean(excluded), rel=1e-3)
    assert "beyond the tokenizer" in summary.format() and "beyond the tokenizer" in caplog.text
    for row, tokens_of_row in zip(targets_of(tmp_path / "out"), truth, strict=True):
        assert row.targets.ids.max() < 50
        counts = np.diff(row.targets.offsets)
        assert set(counts[[t.label is not None for t in tokens_of_row]]) == {50}


def test_the_store_is_the_same_for_every_number_of_workers(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "one", llama))
    for worker in (2, 0, 1):
        summary = dump(config(tokens, tmp_path / "three", llama), worker=worker, num_workers=3)
        assert not summary.sealed and summary.units == 1
    with pytest.raises(UnsealedError):
        StoreReader(tmp_path / "three")
    last = dump(config(tokens, tmp_path / "three", llama))
    assert last.sealed and last.units == 0
    assert StoreReader(tmp_path / "three").digest == StoreReader(tmp_path / "one").digest


def test_a_run_that_broke_goes_on(tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(config(tokens, tmp_path / "whole", llama))
    forward, calls = HfEngine.forward, 0

    def breaking(self: HfEngine, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("the device fell off the bus")
        return forward(self, batch)

    monkeypatch.setattr(HfEngine, "forward", breaking)
    with pytest.raises(
        UserError, match=r"1 units failed and 2 were committed: unit 1: RuntimeError: the device fell off"
    ):
        dump(config(tokens, tmp_path / "out", llama))
    status = store_status(tmp_path / "out")
    assert (status.committed, status.missing) == (2, 1) and status.failed == 1
    summary = dump(config(tokens, tmp_path / "out", llama))
    assert summary.units == 1 and summary.sealed
    assert StoreReader(tmp_path / "out").digest == StoreReader(tmp_path / "whole").digest


def test_failures_in_a_row_stop_the_worker(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: HfEngine, batch: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(HfEngine, "forward", broken)
    with pytest.raises(UserError, match=r"unit 1: failure 2 in a row, the worker stops.*out of luck"):
        dump(config(tokens, tmp_path / "out", llama, max_consecutive_failures=2))
    assert store_status(tmp_path / "out").committed == 0


def test_no_space_stops_at_once(tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: StoreWriter, *args: Any, **options: Any) -> bool:
        raise WriteFailedError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "commit_unit", full)
        with pytest.raises(WriteFailedError, match="no space"):
            dump(config(tokens, tmp_path / "out", llama))
    assert dump(config(tokens, tmp_path / "out", llama)).sealed


def _spoil(monkeypatch: pytest.MonkeyPatch, row: int, value: float) -> None:
    """Make the teacher give `value` somewhere in row number `row`."""
    forward = HfEngine.forward

    def spoiled(self: HfEngine, batch: Any) -> Any:
        output = forward(self, batch)
        start = 0
        for item in batch.rows:
            count = len(item.tokens) - len(item.doc_lens)
            if item.row == row:
                assert output.hidden is not None
                output.hidden[start + count // 2, 0] = value
            start += count
        return output

    monkeypatch.setattr(HfEngine, "forward", spoiled)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_and_listed(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    dump(config(tokens, tmp_path / "good", llama))
    _spoil(monkeypatch, 3, value)
    with pytest.raises(UserError, match=r"1 rows are refused, 0 are allowed .*row 3: logits are not finite at 1 of 13"):
        dump(config(tokens, tmp_path / "out", llama))
    assert store_status(tmp_path / "out").committed < 3
    summary = dump(config(tokens, tmp_path / "out", llama, max_rejected_fraction=0.2))
    assert summary.refused_rows == (3,) and "refused rows" in summary.format() and summary.sealed
    reader = StoreReader(tmp_path / "out")
    assert reader.row_stats["num_targets"].tolist() == [15, 14, 13, 0, 14, 4]
    good = targets_of(tmp_path / "good")
    for row in targets_of(tmp_path / "out"):
        columns = [row.targets.log_tail, row.targets.entropy, row.targets.label_logprob, row.targets.logprobs]
        assert not any(np.isnan(column).any() for column in columns if column is not None)
        assert row.targets.num_entries == (0 if row.row == 3 else good[row.row].targets.num_entries)
    # A listing tells of it, by a note that was there before the record.
    assert [note.name[:11] for note in (tmp_path / "out" / "refused").iterdir()] == ["u0000001-1-"]
    # The count of an earlier run is not forgotten: a second bad row is one too many now.
    assert StoreWriter.create(tmp_path / "out", reader.spec).committed()[1].extra["refused"][0][0] == 3


def test_a_teacher_that_rules_out_everything_is_refused(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = HfEngine.forward

    def masked(self: HfEngine, batch: Any) -> Any:
        output = forward(self, batch)
        assert output.logits is not None
        output.logits[0] = -torch.inf
        return output

    monkeypatch.setattr(HfEngine, "forward", masked)
    with pytest.raises(UserError, match=r"row 0: logits are not finite at 1 of 15 positions, first at token 0"):
        dump(config(tokens, tmp_path / "out", llama, teacher={"head": "logits"}))


def test_ids_that_the_teacher_rules_out_are_no_entries(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: Any
) -> None:
    forward = HfEngine.forward

    def masked(self: HfEngine, batch: Any) -> Any:
        output = forward(self, batch)
        assert output.logits is not None
        output.logits[:, 5:] = -torch.inf
        return output

    monkeypatch.setattr(HfEngine, "forward", masked)
    dump(config(tokens, tmp_path / "out", llama, teacher={"head": "logits"}))
    for row in targets_of(tmp_path / "out"):
        assert set(row.targets.ids.tolist()) <= set(range(5))
        assert set(np.diff(row.targets.offsets).tolist()) <= {0, 5}


def test_a_signal_ends_the_worker_between_batches(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = HfEngine.forward, 0

    def signalled(self: HfEngine, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(HfEngine, "forward", signalled)
        with pytest.raises(StoppedError, match=r"stopped by SIGTERM after [12] of 3 units"):
            dump(config(tokens, tmp_path / "out", llama))
    assert signal.getsignal(signal.SIGTERM) is before
    assert store_status(tmp_path / "out").committed in (1, 2)
    dump(config(tokens, tmp_path / "out", llama))
    dump(config(tokens, tmp_path / "whole", llama))
    assert StoreReader(tmp_path / "out").digest == StoreReader(tmp_path / "whole").digest


def test_nothing_is_loaded_when_nothing_is_missing(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dump(config(tokens, tmp_path / "out", llama))
    monkeypatch.setattr(HfEngine, "__init__", lambda *a, **o: pytest.fail("the teacher was loaded"))
    assert dump(config(tokens, tmp_path / "out", llama)).units == 0


def test_what_does_not_fit_is_refused_before_the_weights_are_loaded(
    tmp_path: Path, llama: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HfEngine, "__init__", lambda *a, **o: pytest.fail("the teacher was loaded"))
    large = make_tokens(tmp_path / "large", vocab_size=VOCAB + 1)
    with pytest.raises(UserError, match=r"64 output rows.* 65 entries"):
        dump(config(large, tmp_path / "a", llama))
    long = make_tokens(tmp_path / "long", [(65,)], row_length=65)
    with pytest.raises(UserError, match="at most 64 positions, but the rows hold 65"):
        dump(config(long, tmp_path / "b", llama))
    plain = make_tokens(tmp_path / "plain")
    other = save_llama(tmp_path / "with tokenizer")
    for file in tokenizer_folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"has a tokenizer with digest .*check_tokenizer=false"):
        dump(config(plain, tmp_path / "c", other, teacher={"check_tokenizer": True}))
    dump_store = make_tokens(tmp_path / "d")
    (dump_store / "manifest.json").unlink()
    with pytest.raises(UnsealedError):
        dump(config(dump_store, tmp_path / "e", llama))
    assert not any((tmp_path / name).exists() for name in "abce")


def test_another_teacher_or_selection_does_not_mix_with_a_store(
    tokens: Path, tmp_path: Path, llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dump(config(tokens, tmp_path / "out", llama))
    twin = save_llama(tmp_path / "twin" / "model", seed=1)  # the same name and configuration, other weights
    with pytest.raises(MismatchError, match="weights_digest"):
        dump(config(tokens, tmp_path / "out", twin))
    with pytest.raises(MismatchError, match="selection"):
        dump(config(tokens, tmp_path / "out", llama, selection={"mode": "top_k", "k": 9}))
    with pytest.raises(MismatchError, match="dtype"):
        dump(config(tokens, tmp_path / "out", llama, teacher={"dtype": "bfloat16"}))
    with caplog.at_level(logging.WARNING):
        dump(config(tokens, tmp_path / "out", twin, force=True))
    with pytest.raises(UserError, match="single worker"):
        dump(config(tokens, tmp_path / "out", llama, force=True), worker=0, num_workers=2)


def test_a_bfloat16_teacher_stays_near_the_float32_one(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "full", llama))
    dump(config(tokens, tmp_path / "half", llama, teacher={"dtype": "bfloat16"}))
    full, half = (StoreReader(tmp_path / name).row_stats["mean_loss"] for name in ("full", "half"))
    np.testing.assert_allclose(half, full, atol=0.1)
    assert not np.array_equal(half, full)


def test_draws_are_the_same_for_every_layout(tokens: Path, tmp_path: Path, llama: Path) -> None:
    selection = {"mode": "sample", "num_draws": 20, "seed": 5}
    dump(config(tokens, tmp_path / "a", llama, selection=selection))
    for worker in (1, 0):
        dump(config(tokens, tmp_path / "b", llama, selection=selection), worker=worker, num_workers=2)
    assert dump(config(tokens, tmp_path / "b", llama, selection=selection)).sealed
    assert StoreReader(tmp_path / "a").digest == StoreReader(tmp_path / "b").digest
    # Other batches give other last bits of the logits; a draw may fall on the other side of a bound, hardly ever.
    dump(config(tokens, tmp_path / "c", llama, selection=selection, teacher={"batch_rows": 1}))
    for a, c in zip(targets_of(tmp_path / "a"), targets_of(tmp_path / "c"), strict=True):
        assert a.targets.counts is not None and c.targets.counts is not None
        assert np.array_equal(a.targets.ids, c.targets.ids) and np.array_equal(a.targets.counts, c.targets.counts)
    other = selection | {"seed": 6}
    dump(config(tokens, tmp_path / "d", llama, selection=other))
    assert StoreReader(tmp_path / "d").digest != StoreReader(tmp_path / "a").digest
    with pytest.raises(MismatchError, match="info"):
        dump(config(tokens, tmp_path / "a", llama, selection=other))


def test_draws_are_unbiased(tokens: Path, tmp_path: Path, llama: Path) -> None:
    truth = dense_truth(llama, tokens, vocab_size=VOCAB)
    total = np.zeros(0)
    expected = np.concatenate([np.exp(t.logprobs) for row in truth for t in row if t.label is not None])
    num_draws, num_seeds = 255, 4
    for seed in range(num_seeds):
        output = tmp_path / str(seed)
        dump(config(tokens, output, llama, selection={"mode": "sample", "num_draws": num_draws, "seed": seed}))
        counts = []
        for row, tokens_of_row in zip(targets_of(output), truth, strict=True):
            for place, token in enumerate(tokens_of_row):
                here = slice(*row.targets.offsets[place : place + 2])
                dense = np.zeros(VOCAB)
                assert row.targets.counts is not None
                dense[row.targets.ids[here]] = row.targets.counts[here]
                assert dense.sum() == (0 if token.label is None else num_draws)
                if token.label is not None:
                    counts.append(dense)
                    drawn = np.exp(token.logprobs[dense > 0]).sum()
                    np.testing.assert_allclose(np.exp(row.targets.log_tail[place]), 1 - drawn, atol=0.02)
        total = np.concatenate(counts) + (total if len(total) else 0)
    count = num_draws * num_seeds
    deviation = (total - count * expected) / np.sqrt(count * expected * (1 - expected) + 1)
    assert abs(deviation).max() < 6 and abs(deviation.mean()) < 0.05


def test_temperatures_do_not_go_with_draws(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no exact tails in mode sample"):
        config(tmp_path, tmp_path, tmp_path, selection={"mode": "sample"}, temperatures=[2.0])


def test_workers_may_not_refuse_more_rows_together_than_one_may(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once, a bad row each, one allowed: neither sees the other's when it begins."""
    monkeypatch.setattr("potstill.teacher_dump.pipeline._RECOUNT_SECONDS", 0.0)
    _spoil(monkeypatch, 3, float("nan"))
    _spoil(monkeypatch, 0, float("nan"))
    forward, other = HfEngine.forward, []
    settings = config(tokens, tmp_path / "out", llama, max_rejected_fraction=1 / 6)

    def with_another_beside(self: HfEngine, batch: Any) -> Any:
        if not other:
            other.append("begun")
            other[0] = dump(settings, worker=1, num_workers=2)  # unit 1, with row 3
        return forward(self, batch)

    monkeypatch.setattr(HfEngine, "forward", with_another_beside)
    with pytest.raises(UserError, match="2 rows are refused, 1 are allowed"):
        dump(settings, worker=0, num_workers=2)
    assert other[0].refused_rows == (3,) and store_status(tmp_path / "out").missing


def test_a_complete_store_with_too_many_refused_rows_is_not_sealed(
    tokens: Path, tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, 3, float("nan"))
    for worker in (0, 1):
        dump(config(tokens, tmp_path / "out", llama, max_rejected_fraction=0.5), worker=worker, num_workers=2)
    with pytest.raises(UserError, match=r"1 rows are refused, 0 are allowed \(max_rejected_fraction\)"):
        dump(config(tokens, tmp_path / "out", llama))
    assert not store_status(tmp_path / "out").sealed


def test_another_quantisation_or_head_does_not_mix_with_a_store(tokens: Path, tmp_path: Path, llama: Path) -> None:
    dump(config(tokens, tmp_path / "out", llama))
    options = {"quantization_config": {"quant_method": "hqq", "nbits": 4}}
    with pytest.raises(MismatchError, match="load_options"):
        dump(config(tokens, tmp_path / "out", llama, teacher={"load_options": options}))
    with pytest.raises(MismatchError, match="head"):
        dump(config(tokens, tmp_path / "out", llama, teacher={"head": "logits"}))
    assert dump(config(tokens, tmp_path / "out", llama, teacher={"load_options": {"max_memory": None}})).units == 0
    with pytest.raises(ValueError, match=r"load_options\.dtype is not recorded .* set teacher\.dtype"):
        config(tokens, tmp_path / "out", llama, teacher={"load_options": {"dtype": "bfloat16"}})


def test_a_full_disk_is_seen_before_the_unit_ends(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten batches a unit: the worker stops in the second unit, not after it."""
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 20, rows_per_unit=10)
    forward, rows, tried = HfEngine.forward, [], threading.Event()

    def noted(self: HfEngine, batch: Any) -> Any:
        rows.append(batch.rows[0].row)
        if len(rows) > 10:
            tried.wait(60)  # until the first unit was to be written
        return forward(self, batch)

    def full(self: StoreWriter, *args: Any, **options: Any) -> bool:
        tried.set()
        raise WriteFailedError("no space left on device")

    monkeypatch.setattr(HfEngine, "forward", noted)
    monkeypatch.setattr(StoreWriter, "commit_unit", full)
    with pytest.raises(WriteFailedError, match="no space"):
        dump(config(tokens, tmp_path / "out", llama, teacher={"batch_rows": 1}))
    assert 10 <= len(rows) < 15


def test_models_whose_long_rows_hang_on_their_neighbours_are_refused(tmp_path: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig, Phi3Config, Phi3ForCausalLM

    tokens = make_tokens(tmp_path / "tokens")
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    phi = Phi3Config(**small, eos_token_id=1, original_max_position_embeddings=8, rope_parameters=rope)
    folder = save_model(Phi3ForCausalLM(phi), tmp_path / "phi")
    with pytest.raises(UserError, match=r"longrope.*prepare with row_length=8 or less"):
        dump(config(tokens, tmp_path / "out", folder))
    chunked = Llama4TextConfig(
        **small, head_dim=8, attention_chunk_size=13, num_local_experts=2, intermediate_size_mlp=48
    )
    folder = save_model(Llama4ForCausalLM(chunked), tmp_path / "chunked")
    with pytest.raises(UserError, match=r"chunks of 13 tokens.*set documents=apart"):
        dump(config(tokens, tmp_path / "out", folder))
    dump(config(tokens, tmp_path / "out", folder, teacher={"documents": "apart"}))
