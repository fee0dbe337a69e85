"""Import of targets on files written by hand: bytes, values, order, broken records, what is refused, and a kill."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import MismatchError, StoreReader, TargetsRow, TokensRow, verify_store
from potstill.teacher_dump.importing.distillkit_codec import CurrentCodec, LegacyCodec
from potstill.teacher_dump.importing.target_formats import TARGET_FORMATS, TargetFormat
from potstill.teacher_dump.importing.targets import ImportTargetsConfig, import_targets
from potstill.teacher_dump.importing.torch_tensors import UnsafeFileError, load_tensors
from tests.student_train import tiny
from tests.teacher_dump import foreign_files
from tests.teacher_dump.foreign_files import K, Truth, truth_of, write_distillkit, write_megatron, write_topk

NUM_ROWS = 16


@pytest.fixture(scope="module")
def truths() -> list[Truth]:
    return [truth_of(row) for row in tiny.token_rows(NUM_ROWS)]


@pytest.fixture(scope="module")
def tokens(truths: list[Truth], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bigram") / "tokens"
    tiny.write_store(path, tiny.spec_of("tokens", num_rows=None, rows_per_unit=4), [one.row for one in truths])
    return path


def imported(source: Path, output: Path, **options: Any) -> tuple[Any, StoreReader]:
    config = ImportTargetsConfig(input=[str(source)], output=output, teacher="bigram", **options)
    return import_targets(config), StoreReader(output / "targets")


def check_stored(reader: StoreReader, truths: list[Truth], *, tolerance: float = 1 / 32 + 1e-3) -> None:
    """Ids as they are, values on the grid, exact tails, no target at the end of a document."""
    assert verify_store(Path(reader.url), deep=True).ok
    for one, row in zip(truths, reader.rows(range(reader.num_rows)), strict=True):
        assert isinstance(row, TargetsRow)
        mask = one.row.has_target()
        assert np.diff(row.targets.offsets).tolist() == np.where(mask, K, 0).tolist()
        assert row.targets.ids.tolist() == one.ids[mask].reshape(-1).tolist()
        assert row.targets.logprobs is not None
        np.testing.assert_allclose(row.targets.logprobs, one.logprobs[mask].reshape(-1), atol=tolerance)
        tail = 1 - np.exp(one.logprobs[mask].astype(np.float64)).sum(1)
        np.testing.assert_allclose(np.exp(row.targets.log_tail[mask]), tail, rtol=0.04)
        assert row.targets.entropy is None and row.targets.label_logprob is None


def test_bits_are_read_from_the_most_significant() -> None:
    rng = np.random.default_rng(0)
    for bits in (1, 6, 13, 14, 17, 24):
        codec = CurrentCodec(d=1 << bits, k=11, exact_k=11, residual_bins=[])
        ids = rng.integers(0, 1 << bits, (5, 11))
        packed = np.array([foreign_files.bits_first(row, bits) for row in ids.tolist()], np.uint8)
        assert codec.ids(packed).tolist() == ids.tolist()


def test_a_position_of_the_current_codec() -> None:
    """Two exact values, a fit 0.5 - t of three, residuals -1 and 1 of a quarter in two bits each, the last without."""
    fields: dict[str, Any] = {
        "d": 16,
        "k": 5,
        "exact_k": 2,
        "exact_dtype": "bfloat16",
        "polynomial_terms": [0, 1],
        "term_dtype": "float16",
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 2, "num_elements": 2}],
        "delta_encoding": False,
    }
    data = bytes.fromhex("80bf00c0")  # -1.0, -2.0 in bfloat16, little-endian
    data += np.array([0.5, -1.0], "<f2").tobytes() + np.array([0.25], "<f4").tobytes() + bytes([0b01_11_0000])
    packed = np.frombuffer(data, np.uint8)[None]
    assert CurrentCodec(**fields).num_value_bytes == packed.shape[1]
    values = CurrentCodec(**fields).values(packed)
    assert values.tolist() == [[-1.0, -2.0, 0.25, -0.25, -1.5]]
    running = CurrentCodec(**fields | {"delta_encoding": True}).values(packed)
    assert running.tolist() == [[-1.0, -3.0, -2.75, -3.0, -4.5]]
    gone = np.concatenate([packed[:, :2], np.frombuffer(bytes.fromhex("80ff"), np.uint8)[None], packed[:, 4:]], axis=1)
    missing = CurrentCodec(**fields | {"delta_encoding": True}).values(gone)
    assert missing.tolist() == [[-1.0, *[-np.inf] * 4]], "after a rank that the sampler did not return there is none"
    even = CurrentCodec(**fields | {"normalize_t": True}).values(packed)
    assert even.tolist() == [[-1.0, -2.0, 0.25, 0.25, -0.5]]
    one_bit = fields | {"residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 3}]}
    assert CurrentCodec(**one_bit).values(packed)[0, 2:].tolist() == [0.5 - 0.25, -0.5 + 0.25, -1.5 + 0.25]


def test_a_position_of_the_legacy_codec() -> None:
    codec = LegacyCodec(k=7, exact_k=4, polynomial_degree=1, vocab_size=1000, with_sqrt_term=True)
    ids = [999, 0, 5, 17, 500, 2, 600]  # 10 bits, six in a word, the first in the lowest bits
    words = [sum(number << (10 * place) for place, number in enumerate(ids[:6])), ids[6]]
    assert codec.ids(np.array([words], np.uint64)).tolist() == [ids]
    values = codec.values(np.array([[-1.0, -2, -3, -4]]), np.array([[1.0, 2.0, 0.5]]))[0]
    np.testing.assert_allclose(values, [-1, -2, -3, -4, *(1 + 2 / a + 0.5 * np.sqrt(a) for a in (1, 2, 3))])


def test_distillkit_over_a_tokens_store(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    summary, reader = imported(write_distillkit(tmp_path / "in", truths), tmp_path / "out", tokens=str(tokens))
    check_stored(reader, truths)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["targets"]
    spec, wanted = reader.spec, StoreReader(tokens)
    assert (spec.input_digest, spec.num_rows, spec.teacher) == (
        wanted.digest,
        NUM_ROWS,
        {"id": "bigram", "engine": "import"},
    )
    assert spec.info["input"]["settings"]["compression_config"]["d"] == 48 and spec.info["input"]["digest"]
    assert "16 rows" in summary.format() and "not in the files: the entropy" in summary.format()


@pytest.mark.parametrize(("num_dp", "num_cp", "dtype"), [(1, 1, "float16"), (2, 1, "bfloat16"), (2, 2, "float32")])
def test_megatron_ranks_are_put_together(
    truths: list[Truth], tokens: Path, tmp_path: Path, num_dp: int, num_cp: int, dtype: str
) -> None:
    source = write_megatron(tmp_path / "in", truths, num_dp=num_dp, num_cp=num_cp, dtype=dtype)
    _, reader = imported(source, tmp_path / "out", tokens=str(tokens))
    for one, row in zip(truths, reader.targets_rows(range(NUM_ROWS)), strict=True):
        wanted = one.ids[one.row.has_target()]
        assert np.sort(row.targets.ids.reshape(-1, K)).tolist() == np.sort(wanted).tolist()
    if dtype == "float32":  # rounding to the others makes ties, and moves the tails
        check_stored(reader, truths)
    assert reader.spec.info["input"]["settings"]["meta"]["saver"]["k"] == K


def test_tokens_out_of_the_files(truths: list[Truth], tokenizer_folder: Path, tmp_path: Path) -> None:
    """A packed set with padding in front, inside and at the end: left out, and a document ends there."""
    rows = [one.row for one in truths]
    masks = [foreign_files.documents(row) for row in rows]
    masks[0] = masks[0].copy()
    longest = int(rows[0].doc_lens.argmax())
    inside = int(rows[0].doc_lens[:longest].sum() + rows[0].doc_lens[longest] // 2)
    assert masks[0][inside - 1] == masks[0][inside + 1]
    masks[0][[0, inside, -1]] = 0
    source = write_distillkit(tmp_path / "in", truths, attention_mask=[mask.tolist() for mask in masks])
    summary, reader = imported(source, tmp_path / "out", tokenizer=str(tokenizer_folder), rows_per_unit=4)
    made = StoreReader(tmp_path / "out" / "tokens").tokens_rows(range(NUM_ROWS))
    assert reader.spec.row_length == 32 and (tmp_path / "out" / "tokenizer" / "tokenizer.json").is_file()
    assert all(np.array_equal(row.tokens, one.tokens) for row, one in zip(made[1:], rows[1:], strict=True))
    assert all(np.array_equal(row.doc_lens, one.doc_lens) for row, one in zip(made[1:], rows[1:], strict=True))
    kept = np.flatnonzero(masks[0])
    assert made[0].tokens.tolist() == rows[0].tokens[kept].tolist()
    ends = [i for i in range(len(kept)) if i == len(kept) - 1 or kept[i] + 1 != kept[i + 1]]
    ends += [i for i in range(len(kept) - 1) if masks[0][kept[i]] != masks[0][kept[i + 1]]]
    assert np.cumsum(made[0].doc_lens).tolist() == sorted({end + 1 for end in ends})
    targets = reader.targets_rows([0])[0].targets
    assert np.diff(targets.offsets).tolist() == np.where(made[0].has_target(), K, 0).tolist()
    assert targets.ids.tolist() == truths[0].ids[kept[made[0].has_target()]].reshape(-1).tolist()
    assert summary.bad_records == 0


def test_no_target_where_a_mask_is_off(truths: list[Truth], tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    rows = [
        TokensRow(one.row.row, one.row.tokens, one.row.doc_lens, rng.random(len(one.row.tokens)) < 0.6)
        for one in truths
    ]
    spec = tiny.spec_of("tokens", num_rows=None, rows_per_unit=4, columns=("mask",))
    tiny.write_store(tmp_path / "tokens", spec, rows)
    masked = [Truth(row, one.ids, one.logprobs) for row, one in zip(rows, truths, strict=True)]
    source = write_distillkit(tmp_path / "in", truths)
    summary, reader = imported(source, tmp_path / "out", tokens=str(tmp_path / "tokens"))
    check_stored(reader, masked)
    assert summary.figures.positions == sum(int(row.has_target().sum()) for row in rows)


def test_sums_above_one_are_scaled_and_counted(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    """Values that are too high at one position: their sum is above 1."""
    values = [one.logprobs.copy() for one in truths]
    position = int(np.flatnonzero(truths[3].row.has_target())[5])
    values[3][position] += 0.9
    shift = float(np.log(np.exp(values[3][position].astype(np.float64)).sum()))
    assert shift > 0.1
    source = write_topk(tmp_path / "in" / "a.parquet", truths, [one.tolist() for one in values])
    summary, reader = imported(source, tmp_path / "out", tokens=str(tokens))
    assert (summary.figures.rescaled, summary.figures.rescaled_nats_max) == (1, pytest.approx(shift, abs=1e-5))
    assert "1 positions" in summary.format() and "were scaled to 1" in summary.format()
    assert reader.spec.info["first_records"]["rescaled"] == 1
    found = reader.targets_rows([3])[0].targets.candidates(position)
    assert found.tail == 0.0 and found.ids.tolist() == truths[3].ids[position].tolist()
    np.testing.assert_allclose(np.log(found.probs), values[3][position] - shift, atol=1 / 32 + 1e-3)


def test_order_ties_and_a_smaller_k(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    shuffled = [Truth(one.row, one.ids[:, ::-1], one.logprobs[:, ::-1]) for one in truths]
    source = write_topk(tmp_path / "in" / "a.parquet", shuffled)
    summary, reader = imported(source, tmp_path / "out", tokens=str(tokens))
    check_stored(reader, truths)
    assert summary.figures.reordered == summary.figures.positions
    assert "values that rise" in summary.format()
    fewer, reader = imported(source, tmp_path / "fewer", tokens=str(tokens), k=3)
    best = reader.targets_rows([0])[0].targets
    mask = truths[0].row.has_target()
    assert best.ids.tolist() == truths[0].ids[mask, :3].reshape(-1).tolist()
    tail = 1 - np.exp(truths[0].logprobs[mask, :3].astype(np.float64)).sum(1)
    np.testing.assert_allclose(np.exp(best.log_tail[mask]), tail, rtol=0.04)
    assert fewer.figures.cut == fewer.figures.positions * (K - 3) and reader.spec.selection == {"mode": "top_k", "k": 3}


def test_logits_with_and_without_their_normaliser(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    constants = [rng.normal(size=len(one.row.tokens)) * 5 for one in truths]
    logits = [(one.logprobs + constant[:, None]).tolist() for one, constant in zip(truths, constants, strict=True)]
    columns = {"topk_logprobs": [], "topk_logits": logits}
    whole = write_topk(tmp_path / "whole" / "a.parquet", truths, lse=[one.tolist() for one in constants], **columns)
    _, reader = imported(whole, tmp_path / "out", tokens=str(tokens))
    check_stored(reader, truths)
    bare = write_topk(tmp_path / "bare" / "a.parquet", truths, **columns)
    summary, kept = imported(bare, tmp_path / "kept", tokens=str(tokens))
    assert kept.spec.normaliser == "kept" and "kept_normaliser" in kept.spec.required_features
    assert "missing_mass to renorm or support" in summary.format()
    row, mask = kept.targets_rows([0])[0].targets, truths[0].row.has_target()
    assert np.isneginf(row.log_tail[mask]).all()
    wanted = truths[0].logprobs[mask].astype(np.float64)
    wanted -= np.log(np.exp(wanted).sum(1, keepdims=True))
    np.testing.assert_allclose(row.logprobs, wanted.reshape(-1), atol=1 / 32 + 1e-3)
    with pytest.raises(
        UserError, match=r"normaliser=vocabulary: the values are raw logits without .*--normaliser-column"
    ):
        imported(bare, tmp_path / "no", tokens=str(tokens), normaliser="vocabulary")
    far = write_topk(tmp_path / "far.parquet", truths, [(one.logprobs + 9).tolist() for one in truths])
    with pytest.raises(UserError, match=r"sum to .* Raw logits are read with --values logits"):
        imported(far, tmp_path / "no", tokens=str(tokens))
    renormalised = [(one.logprobs - np.log(np.exp(one.logprobs).sum(1, keepdims=True))).tolist() for one in truths]
    source = write_topk(tmp_path / "one.parquet", truths, renormalised)
    summary, again = imported(source, tmp_path / "one", tokens=str(tokens))
    assert again.spec.normaliser == "kept" and "sums to 1 over its entries" in summary.format()
    whole_sums = write_topk(tmp_path / "two.parquet", truths)
    with pytest.raises(UserError, match=r"normaliser=kept: the probabilities of a position sum to 0\.\d+ on average"):
        imported(whole_sums, tmp_path / "no", tokens=str(tokens), normaliser="kept")
    assert not (tmp_path / "no").exists()


def broken_source(folder: Path, truths: list[Truth]) -> Path:
    """Record 10 has tokens of another vocabulary, record 6 a byte string that is too short."""
    tokens = [one.row.tokens.tolist() for one in truths]
    tokens[10] = [*tokens[10][:-1], 4000]
    values = [[list(value.astype("<f4").tobytes()) for value in one.logprobs[:-1]] for one in truths]
    values[6] = [value[:-1] for value in values[6]]
    return write_distillkit(folder, truths, input_ids=tokens, compressed_logprobs=values)


def test_broken_records(truths: list[Truth], tokenizer_folder: Path, tmp_path: Path) -> None:
    source = broken_source(tmp_path / "in", truths)
    options = {"tokenizer": str(tokenizer_folder), "rows_per_unit": 2}
    with pytest.raises(
        UserError, match=r"record 11: its ids reach from \d+ to 4000, the tokenizer has \d+ entries.*broken"
    ):
        imported(source, tmp_path / "out", **options)
    with pytest.raises(
        UserError, match=r"record 7 \(row 6\): compressed_logprobs has 23 bytes a position.*record 2, 1 may"
    ):
        imported(source, tmp_path / "out", max_bad_lines=1, **options)
    summary, reader = imported(source, tmp_path / "out", max_bad_lines=2, **options)
    assert (summary.rows, summary.bad_records, summary.figures.without_targets) == (NUM_ROWS - 1, 2, 1)
    assert summary.resumed_rows == 6, "the units before row 6 were there from the run that gave up"
    rows = reader.targets_rows(range(NUM_ROWS - 1))
    assert rows[6].targets.num_entries == 0 and all(row.targets.num_entries for row in rows if row.row != 6)
    assert rows[10].targets.ids[:K].tolist() == truths[11].ids[0].tolist()
    _, straight = imported(source, tmp_path / "straight", max_bad_lines=2, **options)
    assert straight.digest == reader.digest


KILLED = """
import os, signal, sys
from potstill.storage.store.writer import StoreWriter
from potstill.teacher_dump.importing.target_formats import TARGET_FORMATS, TargetFormat
from potstill.teacher_dump.importing.targets import ImportTargetsConfig, import_targets

commit, left = StoreWriter.commit_unit, [int(sys.argv[4])]

def commit_and_die(self, unit, rows, *, extra=None):
    commit(self, unit, rows, extra=extra)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

StoreWriter.commit_unit = commit_and_die
import_targets(ImportTargetsConfig(input=[sys.argv[1]], output=sys.argv[2], teacher="bigram", tokens=sys.argv[3]))
"""


def test_a_killed_import_continues_to_the_same_bytes(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    source = write_megatron(tmp_path / "in", truths, num_dp=2)  # units of 4 rows, iterations of 8: it dies inside one
    words = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), str(tokens), "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=dict(os.environ), check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    summary, reader = imported(source, tmp_path / "out", tokens=str(tokens))
    assert summary.resumed_rows == 12
    again, straight = imported(source, tmp_path / "straight", tokens=str(tokens))
    assert reader.digest == straight.digest
    assert summary.figures.to_json() == again.figures.to_json()
    assert imported(source, tmp_path / "out", tokens=str(tokens))[0].resumed_rows == NUM_ROWS


def test_other_tokens_are_refused(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    swapped = [truths[1], truths[0], *truths[2:]]
    with pytest.raises(MismatchError, match=r"record 1 is not row 0 of the tokens store: token \d+ differs"):
        imported(write_distillkit(tmp_path / "a", swapped), tmp_path / "out", tokens=str(tokens))
    whole = [[1] * len(one.row.tokens) for one in truths]
    with pytest.raises(MismatchError, match=r"record 1 is not row 0 .* its documents have \[\d+\] tokens"):
        imported(write_distillkit(tmp_path / "b", truths, attention_mask=whole), tmp_path / "out", tokens=str(tokens))
    with pytest.raises(MismatchError, match="holds 16 rows, the files 15 records"):
        imported(write_distillkit(tmp_path / "c", truths[:-1]), tmp_path / "out", tokens=str(tokens))
    with pytest.raises(UserError, match="the files end before row 8"):
        imported(write_megatron(tmp_path / "d", truths[:8]), tmp_path / "short", tokens=str(tokens))
    moved = [Truth(one.row, np.roll(one.ids, 1, 0), np.roll(one.logprobs, 1, 0)) for one in truths]
    with pytest.raises(UserError, match=r"to the next token on average.* these targets are shifted"):
        imported(write_megatron(tmp_path / "e", moved), tmp_path / "out", tokens=str(tokens))
    with pytest.raises(UserError, match="hold no tokens: name the store"):
        imported(write_megatron(tmp_path / "f", truths), tmp_path / "out", tokenizer=str(tokens))
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_told_is_asked_for(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    source = write_distillkit(tmp_path / "in", truths)
    (source / "compression_config.yaml").rename(tmp_path / "away.yaml")
    with pytest.raises(UserError, match=r"compression_config .*cannot be read.*nothing in the files says how"):
        imported(source, tmp_path / "out", tokens=str(tokens))
    (tmp_path / "new.yaml").write_text((tmp_path / "away.yaml").read_text() + "zigzag: true\n")
    with pytest.raises(UserError, match=r"new.yaml: 1 problem.*\n  line 11: zigzag: unknown key"):
        imported(source, tmp_path / "out", tokens=str(tokens), compression_config=str(tmp_path / "new.yaml"))
    named = write_topk(
        tmp_path / "b.parquet", truths, topk_logprobs=[], surprise=[(-one.logprobs).tolist() for one in truths]
    )
    with pytest.raises(UserError, match=r"cannot tell the columns apart \(found .*surprise.*set values_column"):
        imported(named, tmp_path / "out", tokens=str(tokens))
    (tmp_path / "c.txt").write_text("words")
    with pytest.raises(UserError, match="is of no known format"):
        imported(tmp_path / "c.txt", tmp_path / "out", tokens=str(tokens))
    probabilities = write_topk(
        tmp_path / "d.parquet", truths, topk_logprobs=[], p=[np.exp(one.logprobs).tolist() for one in truths]
    )
    options = {"values_column": "p", "values": "probabilities"}
    _, reader = imported(probabilities, tmp_path / "probs", tokens=str(tokens), **options)
    check_stored(reader, truths)


def test_a_format_is_one_entry_of_a_table(
    truths: list[Truth], tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.npz"
    arrays = {"ids": [one.ids for one in truths], "logprobs": [one.logprobs for one in truths]}
    np.savez(source, tokens=[one.row.tokens for one in truths], **{name: np.stack(x) for name, x in arrays.items()})
    with pytest.raises(UserError, match="is of no known format"):
        imported(source, tmp_path / "out", tokens=str(tokens))
    entry = TargetFormat(module="tests.teacher_dump.made_up_targets", description="made up")
    monkeypatch.setitem(TARGET_FORMATS, "npz", entry)
    check_stored(imported(source, tmp_path / "out", tokens=str(tokens))[1], truths)
    check_stored(imported(source, tmp_path / "named", tokens=str(tokens), format="npz")[1], truths)


class Planted:
    """Unpickled by pickle itself, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_tensors_are_read_without_torch() -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    whole = {
        "values": [base.half(), base.bfloat16(), base, base.permute(2, 0, 1)[1:]],
        "ids": [base.to(torch.uint16), base > 3, base.long(), torch.zeros(0, 3)],
        "words": ["a", 1, 2.5, None],
    }
    found = load_tensors(foreign_files.torch_bytes(whole))
    for name in ("values", "ids"):
        for mine, theirs in zip(found[name], whole[name], strict=True):
            np.testing.assert_array_equal(
                mine, theirs.float().numpy() if theirs.dtype == torch.bfloat16 else theirs.numpy()
            )
    assert found["words"] == whole["words"]


def test_planted_code_does_not_run(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    victim = tmp_path / "made"
    payload = foreign_files.torch_bytes({"values": [Planted(victim)], "indices_low": [], "bit_17": []})
    pickle.loads(pickle.dumps(Planted(victim)))
    assert victim.exists(), "the file that is planted does what it should be kept from"
    victim.unlink()
    folder = write_megatron(tmp_path / "in", truths)
    meta = {"hash": "0", "saver": {"k": K, "p": None}}
    foreign_files.write_tar(folder / "cp0_dp0__3.tar", {0: payload}, meta)
    with pytest.raises(UserError, match=r"iteration 0: not read, because it asks for .*; nothing of it was run"):
        imported(folder, tmp_path / "out", tokens=str(tokens))
    assert not victim.exists() and not (tmp_path / "out").exists()


def test_tensors_outside_of_their_storage_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    path.write_bytes(foreign_files.torch_bytes({"values": [torch.zeros(100)]}))
    short = tmp_path / "b.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(short, "w") as changed:
        for name in source.namelist():
            data = source.read(name)
            changed.writestr(name, data[:40] if name.endswith("data/0") else data)
    with pytest.raises(UnsafeFileError, match="in a storage of 10 items"):
        load_tensors(short.read_bytes())
    for cut in (0, 10, 500):
        with pytest.raises(UnsafeFileError):
            load_tensors(path.read_bytes()[:cut])


def test_damaged_tensors_are_never_read_otherwise() -> None:
    """Any byte changed: the same arrays, or a refusal; in the list of tensors also other sizes of the same bytes."""
    torch = pytest.importorskip("torch")
    data = foreign_files.torch_bytes({"values": [torch.arange(24.0).reshape(2, 3, 4).half()], "bit_17": []})
    wanted = load_tensors(data)["values"][0]
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            found = load_tensors(bytes(damaged))
        except UnsafeFileError:
            continue
        assert np.array_equal(found["values"][0], wanted), "the zip's checksums cover every member"
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in parts if name.endswith("data.pkl")]
    for _ in range(300):
        listing = bytearray(parts[name])
        listing[rng.integers(len(listing))] = rng.integers(256)
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for other, content in (parts | {name: bytes(listing)}).items():
                archive.writestr(other, content)
        with contextlib.suppress(UnsafeFileError):
            load_tensors(whole.getvalue())


def test_ranks_of_one_run_and_all_of_them(truths: list[Truth], tokens: Path, tmp_path: Path) -> None:
    folder = write_megatron(tmp_path / "in", truths, num_dp=2)
    (folder / "cp0_dp0__1.tar").rename(tmp_path / "cp0_dp0__1.tar")
    with pytest.raises(UserError, match="the tars of cp0_dp0 are missing"):
        imported(folder, tmp_path / "out", tokens=str(tokens))
    other = foreign_files.write_tar(folder / "cp0_dp0__1.tar", {0: b"", 1: b""}, {"hash": "1", "saver": {"k": K}})
    with pytest.raises(UserError, match="they are of other runs"):
        imported(folder, tmp_path / "out", tokens=str(tokens))
    other.unlink()
    meta = {"hash": "0" * 32, "identifiers": {"seed": 1}}
    meta["saver"] = {"k": K, "p": None, "min_k": 1, "save_dtype": "float16"}  # type: ignore[assignment]
    foreign_files.write_tar(other, {0: b"", 7: b""}, meta)
    with pytest.raises(UserError, match="iteration 1 is in cp0_dp0 or cp0_dp1 and not in both"):
        imported(folder, tmp_path / "out", tokens=str(tokens))
