"""Files that other projects' own writers made: what they hold is the truth that lies beside them, token for token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from potstill.storage import StoreReader
from potstill.teacher_dump import ImportTokensConfig, import_tokens
from potstill.teacher_dump.importing.token_file import Reading
from potstill.teacher_dump.importing.token_search import find_token_files
from potstill.teacher_dump.importing.token_source import TokenDocument, TokenSource
from tests.teacher_dump.tiny import token_rows

VOCAB, END = 8192, 0  # of demo-bpe-8k


@pytest.fixture(scope="module")
def foreign(shared_data: Path) -> Path:
    folder = shared_data / "foreign"
    if not folder.is_dir():
        pytest.skip(f"no files of other writers: {folder} does not exist")
    return folder


def read(*paths: Path, **reading: object) -> list[TokenDocument]:
    found = find_token_files([str(path) for path in paths], None)
    options = {"vocab_size": VOCAB, "end_token": END} | reading
    source = TokenSource(found, Reading(**options), longest=None, max_bad_lines=0)  # type: ignore[arg-type]
    return list(source.read())


def parted(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def ids_of(documents: list[TokenDocument]) -> list[list[int]]:
    return [document.ids.tolist() for document in documents]


@pytest.mark.parametrize("name", ["novels_int32", "novels_uint16"])
def test_megatron_core(foreign: Path, name: str) -> None:
    truth = np.load(foreign / "megatron_indexed" / "truth.npz")
    documents = read(foreign / "megatron_indexed" / name)
    assert ids_of(documents) == parted(truth["tokens"], truth["doc_lengths"])
    assert len(documents) == 60 < len(truth["sequence_lengths"])


def test_token_streams(foreign: Path) -> None:
    folder = foreign / "token_streams"
    truth = np.load(folder / "truth.npz")
    cut = parted(truth["tokens"], truth["doc_lengths"])
    texts = parted(truth["datatrove_tokens"], truth["datatrove_doc_lengths"])
    assert ids_of(read(folder / "olmo_core")) == cut
    assert ids_of(read(folder / "olmo_core", bounds="end_token")) == cut, "the end tokens say the same"
    owt = folder / "nanogpt_openwebtext"
    assert ids_of(read(owt / "train.bin")) == [cut[number] for number in truth["nanogpt_owt_train_docs"]]
    assert ids_of(read(owt / "val.bin")) == [cut[number] for number in truth["nanogpt_owt_val_docs"]]
    for part in ("train", "val"):
        [stream] = read(folder / "nanogpt_shakespeare" / f"{part}.bin")
        assert np.array_equal(stream.ids, truth[f"nanogpt_shakespeare_{part}"])
    assert ids_of(read(folder / "datatrove_megatron")) == texts
    documents = read(folder / "datatrove_ds")
    assert ids_of(documents) == texts
    masks = np.concatenate([document.mask for document in documents])  # type: ignore[misc]
    assert np.array_equal(masks, truth["datatrove_loss"].astype(bool)) and not masks.all()
    for name, order in (("datatrove_ds_shuffled", "datatrove_shuffled_order"), ("dolma", "dolma_order")):
        found = ids_of(read(folder / name))
        assert found == [texts[number] for number in truth[order]]
        assert found == ids_of(read(folder / name, bounds="end_token"))


def test_hugging_face_data_sets(foreign: Path) -> None:
    folder = foreign / "hf_datasets"
    tokens = np.load(folder / "truth.npz")["tokens"].tolist()
    assert ids_of(read(folder / "save_to_disk")) == tokens[:3]
    assert ids_of(read(folder / "parquet")) == tokens
    assert ids_of(read(folder / "llamakd_layout_k8")) == [*tokens, *tokens[:2]]
    assert ids_of(read(folder / "arcee405b_layout")) == tokens[:2]


def test_documents_of_a_packed_set_come_from_its_attention_mask(foreign: Path) -> None:
    truth = np.load(foreign / "distillkit" / "truth.npz")
    rows, places = truth["packed_source"].reshape(-1, 2).T
    documents = read(foreign / "distillkit" / "packed")
    assert np.array_equal(np.concatenate([one.ids for one in documents]), truth["tokens"][rows, places][rows >= 0])
    # A document begins where the packer took another row of the truth.
    begins = np.flatnonzero(np.diff(rows[rows >= 0]) != 0) + 1
    assert np.cumsum([len(one.ids) for one in documents])[:-1].tolist() == begins.tolist()


def test_a_megatron_corpus_becomes_rows(foreign: Path, shared_data: Path, tmp_path: Path) -> None:
    config = ImportTokensConfig(
        input=[foreign / "megatron_indexed" / "novels_uint16.idx"],
        output=tmp_path,
        tokenizer=shared_data / "tokenizers" / "demo-bpe-8k",
        row_length=128,
    )
    summary = import_tokens(config)
    truth = np.load(foreign / "megatron_indexed" / "truth.npz")
    rows = token_rows(tmp_path / "train")
    assert np.array_equal(np.concatenate([row.tokens for row in rows]), truth["tokens"])
    ends = np.cumsum(np.concatenate([row.doc_lens for row in rows]))
    assert set(np.cumsum(truth["doc_lengths"]).tolist()) <= set(ends.tolist())
    assert summary.stores[0].documents == 60 and StoreReader(tmp_path / "train").spec.vocab_size == VOCAB
