"""Import of targets on files that other projects' own writers made: decoded values have the errors that were measured.

The files, the truth and the figures below (mean and largest error in nats, of DistillKit's and Megatron-LM's formats)
come with the folder of real data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import RunSpec, StoreReader, StoreWriter, TokensRow, seal_store, verify_store
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.importing.foreign_records import Entries, ForeignRecord
from potstill.teacher_dump.importing.import_targets_run import open_source
from potstill.teacher_dump.importing.targets import ImportTargetsConfig, import_targets

VOCAB = 8192
GRID = 1 / 32 + 2e-3


@dataclass(frozen=True)
class Truth:
    """tokens int32 [R, n], ids int32 [R, n, k] and logprobs float32 [R, n, k] of the teacher itself."""

    tokens: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray


@pytest.fixture(scope="module")
def foreign(shared_data: Path) -> Path:
    folder = shared_data / "foreign"
    if not folder.is_dir():
        pytest.skip(f"no files of other writers: {folder} does not exist")
    return folder


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> str:
    return str(shared_data / "models" / "teacher-7m")


def truth(folder: Path, prefix: str = "") -> Truth:
    with np.load(folder / "truth.npz") as arrays:
        return Truth(arrays["tokens"], arrays[f"{prefix}topk_ids"], arrays[f"{prefix}topk_logprobs"])


def read_all(source: Path, **options: Any) -> list[ForeignRecord]:
    config = ImportTargetsConfig(input=[str(source)], output="unused", teacher="t", tokenizer="unused", **options)
    records = [found.record for found in open_source(config).read(Place(0, 0), entries=True)]
    assert all(isinstance(record, ForeignRecord) for record in records)
    return records  # type: ignore[return-value]


def tables(record: ForeignRecord) -> tuple[np.ndarray, np.ndarray]:
    """ids and values [P, k]."""
    assert isinstance(record.entries, Entries)
    shape = (record.entries.num_positions, -1)
    return record.entries.ids.reshape(shape), record.entries.values.reshape(shape)


def errors(record: ForeignRecord, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Absolute errors [P, k] of a record's values; its ids must be the truth's."""
    found_ids, values = tables(record)
    num, k = found_ids.shape
    assert np.array_equal(found_ids, ids[:num, :k])
    difference: np.ndarray = np.abs(values - logprobs[:num, :k])
    return difference


# Name: rows, exact entries, mean error, largest error of the exact part and of the fitted one, as measured.
VARIANTS = {
    "recommended": (24, 16, 0.0139, 0.0312, 0.337),
    "normalize_t": (6, 16, 0.0138, 0.0309, 0.336),
    "bf16_exact": (6, 32, 0.0071, 0.0312, 0.0),
    "fp32_exact_k8": (6, 8, 0.0, 0.0, 0.0),
    "delta": (6, 8, 0.0437, 0.0, 0.768),
    "residual_bins": (6, 8, 0.0124, 0.0280, 0.558),
    "legacy": (6, 16, 0.0102, 0.0039, 0.348),
    "recommended_k128": (1, 16, 0.5396, 0.0299, 3.410),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_distillkit_decodes_as_its_own_reader(foreign: Path, name: str) -> None:
    rows, exact_k, mean, exact, fitted = VARIANTS[name]
    wanted = truth(foreign / "distillkit", "k128_" if name == "recommended_k128" else "")
    records = read_all(foreign / "distillkit" / name)
    assert len(records) == rows
    found = []
    for number, record in enumerate(records):
        assert record.tokens is not None
        assert np.array_equal(record.tokens, wanted.tokens[number, : len(record.tokens)])
        assert len(tables(record)[0]) == len(record.tokens) - 1
        found.append(errors(record, wanted.ids[number], wanted.logprobs[number]))
    every = np.concatenate(found)
    assert every.mean() == pytest.approx(mean, abs=6e-5)
    assert every[:, :exact_k].max() == pytest.approx(exact, abs=6e-5)
    assert every[:, exact_k:].max(initial=0.0) == pytest.approx(fitted, abs=1.5e-3)


def test_a_packed_set(foreign: Path, tokenizer: str, tmp_path: Path) -> None:
    folder = foreign / "distillkit"
    with pytest.raises(UserError, match="nothing in the files says how"):
        read_all(folder / "packed")
    settings = str(folder / "recommended" / "compression_config.yaml")
    records = read_all(folder / "packed", compression_config=settings)
    wanted = truth(folder)
    with np.load(folder / "truth.npz") as arrays:
        sources = arrays["packed_source"]
    found = []
    for record, source in zip(records, sources, strict=True):
        assert record.tokens is not None and record.segments is not None
        rows, positions = source[: len(record.tokens)].T
        assert np.array_equal(record.tokens, wanted.tokens[rows, positions])
        found.append(errors(record, wanted.ids[rows, positions], wanted.logprobs[rows, positions]))
    every = np.concatenate(found)
    assert len(every) == 727 and every.mean() == pytest.approx(0.0138, abs=6e-5)
    config = ImportTargetsConfig(
        input=[folder / "packed"],
        output=tmp_path / "out",
        teacher="t",
        tokenizer=tokenizer,
        compression_config=settings,
    )
    summary = import_targets(config)
    made = StoreReader(tmp_path / "out" / "tokens").tokens_rows(range(3))
    for row, source in zip(made, sources, strict=True):
        begins = np.flatnonzero(np.append(True, np.diff(source[: len(row.tokens), 0]) != 0))
        assert np.cumsum(row.doc_lens)[:-1].tolist() == begins[1:].tolist()
    # A document's last position predicts a token that is not in the row.
    assert summary.figures.positions == 727 - sum(len(row.doc_lens) for row in made)


def test_a_store_of_distillkit_files(foreign: Path, tokenizer: str, tmp_path: Path) -> None:
    folder = foreign / "distillkit" / "fp32_exact_k8"
    config = ImportTargetsConfig(
        input=[folder], output=tmp_path, teacher="teacher-7m", tokenizer=tokenizer, rows_per_unit=4
    )
    summary = import_targets(config)
    assert verify_store(tmp_path / "targets", deep=True).ok and verify_store(tmp_path / "tokens", deep=True).ok
    wanted, reader = truth(foreign / "distillkit"), StoreReader(tmp_path / "targets")
    for number, row in enumerate(reader.targets_rows(range(6))):
        num = row.targets.num_tokens - 1
        logprobs = wanted.logprobs[number, :num, :8]
        assert row.targets.ids.tolist() == wanted.ids[number, :num, :8].reshape(-1).tolist()
        np.testing.assert_allclose(row.targets.logprobs, logprobs.reshape(-1), atol=GRID)
        tail = 1 - np.exp(logprobs.astype(np.float64)).sum(1)
        np.testing.assert_allclose(np.exp(row.targets.log_tail[:-1]), tail, rtol=0.04, atol=1e-4)
    assert summary.figures.labels_kept / summary.figures.positions > 0.6 and not summary.notes
    assert (summary.figures.rescaled, summary.figures.reordered, summary.bad_records) == (0, 0, 0)


def test_a_fit_that_is_off_is_said(foreign: Path, tokenizer: str, tmp_path: Path) -> None:
    """The recommended settings at their own k: off by half a nat through the writer's own fit."""
    said = {}
    for name in ("recommended", "recommended_k128"):
        config = ImportTargetsConfig(
            input=[foreign / "distillkit" / name], output=tmp_path / name, teacher="t", tokenizer=tokenizer
        )
        summary = import_targets(config)
        said[name] = summary.notes
        assert "a fit: what it missed is lost" in summary.format()
    assert said["recommended"] == ()
    assert (
        len(said["recommended_k128"]) == 1
        and "off, as of a fit that failed: at 7 of 127" in said["recommended_k128"][0]
    )


@pytest.mark.parametrize("name", ["parquet", "save_to_disk", "llamakd_layout_k8"])
def test_plain_columns_are_exact(foreign: Path, name: str) -> None:
    wanted = truth(foreign / "hf_datasets")
    rows = [0, 1, 2, 3, 0, 1] if name == "llamakd_layout_k8" else range(len(read_all(foreign / "hf_datasets" / name)))
    records = read_all(foreign / "hf_datasets" / name)
    assert len(records) == len(rows)
    for number, record in zip(rows, records, strict=True):
        assert record.tokens is not None and np.array_equal(record.tokens, wanted.tokens[number])
        assert errors(record, wanted.ids[number], wanted.logprobs[number]).max() == 0.0


def test_renormalised_logits(foreign: Path, tokenizer: str, tmp_path: Path) -> None:
    """The Arcee 405B layout: raw logits, and probabilities over the k."""
    source = foreign / "hf_datasets" / "arcee405b_layout"
    wanted = truth(foreign / "hf_datasets")
    logprobs = wanted.logprobs[:2].astype(np.float64)
    logprobs -= np.log(np.exp(logprobs).sum(2, keepdims=True))
    for name, options in {"logits": {}, "probabilities": {"values_column": "normalized_logits"}}.items():
        values = {"values": name} if options else {}
        config = ImportTargetsConfig(
            input=[source], output=tmp_path / name, teacher="t", tokenizer=tokenizer, **options, **values
        )
        summary = import_targets(config)
        reader = StoreReader(tmp_path / name / "targets")
        assert (reader.spec.normaliser, summary.normaliser) == ("kept", "kept")
        assert "missing_mass to renorm or support" in summary.notes[0]
        for number, row in enumerate(reader.targets_rows(range(2))):
            order = np.argsort(row.targets.ids.reshape(127, 32), axis=1)
            theirs = np.argsort(wanted.ids[number, :127], axis=1)
            found = np.take_along_axis(row.targets.logprobs.reshape(127, 32), order, 1)
            np.testing.assert_allclose(found, np.take_along_axis(logprobs[number, :127], theirs, 1), atol=GRID)


MEGATRON = {"fp16_k32": 0.0039, "fp16_k32_topp": 0.0019, "fp16_k8_dp2": 0.0037, "bf16_k8": 0.0302}


@pytest.fixture(scope="module")
def megatron_tokens(foreign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron") / "tokens"
    spec = RunSpec(
        kind="tokens", row_length=128, rows_per_unit=4, num_rows=None, vocab_size=VOCAB, tokenizer_digest="8k"
    )
    rows = [
        TokensRow(number, tokens, np.array([128], np.int32))
        for number, tokens in enumerate(truth(foreign / "megatron_logits").tokens)
    ]
    writer = StoreWriter.create(path, spec)
    for unit in range(2):
        writer.commit_unit(unit, rows[4 * unit : 4 * unit + 4])
    seal_store(path)
    return path


@pytest.mark.parametrize("name", MEGATRON)
def test_megatron_logits(foreign: Path, megatron_tokens: Path, tmp_path: Path, name: str) -> None:
    wanted = truth(foreign / "megatron_logits")
    records = read_all(foreign / "megatron_logits" / name)
    largest, others = 0.0, 0
    for number, record in enumerate(records):
        ids, values = tables(record)
        num, k = ids.shape
        there = values != -np.inf
        assert num == 128 and k <= wanted.ids.shape[2]
        # Equal logits may come in either order: one pair does.
        others += int((there & (ids != wanted.ids[number, :, :k])).sum())
        largest = max(largest, float(np.abs(values - wanted.logprobs[number, :, :k])[there].max()))
    assert len(records) == 8 and others in (0, 2)
    assert largest == pytest.approx(MEGATRON[name], abs=6e-5)
    config = ImportTargetsConfig(
        input=[foreign / "megatron_logits" / name], output=tmp_path / "out", teacher="t", tokens=str(megatron_tokens)
    )
    summary = import_targets(config)
    reader = StoreReader(tmp_path / "out" / "targets")
    assert summary.figures.positions == 8 * 127 and summary.bad_records == 0
    selection = {"mode": "top_p_k", "k": 32, "p": 0.15} if name.endswith("topp") else {"mode": "top_k"}
    assert selection.items() <= (reader.spec.selection or {}).items()
    assert reader.spec.info["input"]["settings"]["meta"]["identifiers"]["sequence_length"] == 128
    assert "nothing in the files proves" in summary.format() and "where documents end" in summary.format()
