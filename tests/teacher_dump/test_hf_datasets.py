"""prepare from Hugging Face data sets: the same rows as from JSON lines, resumable, pinned, in bounded memory."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.common.config import load_config
from potstill.common.errors import ConfigError, UserError
from potstill.common.options import OVERRIDES
from potstill.launch import cli
from potstill.storage import MismatchError, StoreReader, StoreWriter
from potstill.teacher_dump import DatasetInput, PrepareConfig, hf_datasets, prepare
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.hf_datasets import open_dataset
from potstill.teacher_dump.records.text import PlainText
from tests.teacher_dump.test_prepare import Killed
from tests.teacher_dump.tiny import chat_tokenizer, some_texts, token_rows, write_jsonl

datasets = pytest.importorskip("datasets")
NUM_TEXTS, NUM_SHARDS = 150, 3


@pytest.fixture(scope="module", autouse=True)
def _library_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library keeps lock files in its cache even where it streams."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def saved(folder: Path, texts: list[str]) -> Path:
    data = datasets.Dataset.from_dict({"text": texts, "number": list(range(len(texts)))})
    data.save_to_disk(folder, num_shards=NUM_SHARDS)
    return folder


def parquet(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    step = -(-len(texts) // NUM_SHARDS)
    for part in range(NUM_SHARDS):
        data = datasets.Dataset.from_dict({"text": texts[part * step : part * step + step]})
        data.to_parquet(folder / f"train-{part:05d}-of-{NUM_SHARDS:05d}.parquet")
    return folder


def jsonl(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    step = -(-len(texts) // NUM_SHARDS)
    for part in range(NUM_SHARDS):
        write_jsonl(folder / f"train-{part}.jsonl", texts[part * step : part * step + step])
    return folder


KINDS: dict[str, Callable[[Path, list[str]], Path]] = {"saved": saved, "parquet": parquet, "jsonl": jsonl}


def config(output: Path, tokenizer: Path, **changes: Any) -> PrepareConfig:
    settings = {"output": output, "tokenizer": tokenizer, "row_length": 32, "rows_per_unit": 12}
    return PrepareConfig.model_validate(settings | {"heldout_fraction": 0.2} | changes)


def rows(output: Path) -> list[list[list[int]]]:
    parts = [token_rows(output / part) for part in ("train", "heldout")]
    return [[[*row.tokens.tolist(), -1, *row.doc_lens.tolist()] for row in part] for part in parts]


def records(path: Path, **choice: Any) -> list[str]:
    source = open_dataset(DatasetInput(path=str(path), **choice), kind=PlainText("text"), max_bad_lines=0)
    return [document.record.text for document in source.read()]


@pytest.mark.parametrize(
    "keys", [{"prompt_field": "q", "response_field": "a"}, {"messages_field": "talk"}], ids=["prompts", "chat"]
)
def test_prompts_and_conversations_are_those_of_json_lines(keys: dict[str, str], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    made = [{"q": f"what is n{n}?", "a": text} for n, text in enumerate(some_texts(40)) if text]
    for one in made:
        one["talk"] = [{"role": "user", "content": one["q"]}, {"role": "assistant", "content": one["a"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    data = datasets.Dataset.from_list(made)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    inputs = [{"input": [tmp_path / name]} for name in ("a.jsonl", "a.parquet")]
    found = []
    for number, source in enumerate([*inputs, {"dataset": {"path": str(tmp_path / "saved")}}]):
        prepare(config(tmp_path / f"out{number}", tokenizer, **keys, **source, max_untrained_fraction=1.0))
        found.append([row.has_target().tolist() for row in token_rows(tmp_path / f"out{number}" / "train")])
        assert rows(tmp_path / f"out{number}") == rows(tmp_path / "out0") and found[number] == found[0]
    wrong = {"prompt_field": "q", "response_field": "b", "dataset": {"path": str(tmp_path / "saved")}}
    with pytest.raises(UserError, match=r"no column 'b'; found .*set response_field \(--response-field\)"):
        prepare(config(tmp_path / "other", tokenizer, **wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_those_of_the_same_texts(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = some_texts(NUM_TEXTS)
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    prepare(config(tmp_path / "plain", tokenizer_folder, input=[plain]))
    made = KINDS[kind](tmp_path / "data", texts)
    settings = config(tmp_path / "out", tokenizer_folder, dataset={"path": made})
    summary = prepare(settings)
    assert rows(tmp_path / "out") == rows(tmp_path / "plain")
    assert summary.num_files == (1 if kind == "saved" else NUM_SHARDS)
    assert summary.input_bytes > sum(map(len, texts)) / 3
    before = [StoreReader(tmp_path / "out" / part).digest for part in ("train", "heldout")]
    assert prepare(settings).resumed_rows == sum(store.rows for store in summary.stores)
    assert [StoreReader(tmp_path / "out" / part).digest for part in ("train", "heldout")] == before


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_a_killed_run_goes_on_to_equal_stores(
    kind: str, tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = KINDS[kind](tmp_path / "data", some_texts(NUM_TEXTS))
    prepare(config(tmp_path / "whole", tokenizer_folder, dataset={"path": made}))
    commit = StoreWriter.commit_unit
    left = 0

    def dying_commit(self: StoreWriter, *args: Any, **options: Any) -> bool:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return commit(self, *args, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", dying_commit)
    first_places: set[Place] = set()
    read = hf_datasets.DatasetSource.read

    def spied(self: Any, **options: Any) -> Any:
        first_places.add(options["start"])
        return read(self, **options)

    monkeypatch.setattr(hf_datasets.DatasetSource, "read", spied)
    kills = 0
    while True:
        left = 1
        try:
            prepare(config(tmp_path / "killed", tokenizer_folder, dataset={"path": made}))
            break
        except Killed:
            kills += 1
        shutil.move(made, tmp_path / f"moved{kills}")  # a data set may be moved between runs
        made = tmp_path / f"moved{kills}"
    assert kills >= 4 and len(first_places) >= 4
    assert {place.file for place in first_places} == ({0} if kind == "saved" else {0, 1, 2})
    for part in ("train", "heldout"):
        assert StoreReader(tmp_path / "killed" / part).digest == StoreReader(tmp_path / "whole" / part).digest


@pytest.mark.parametrize("kind", KINDS)
def test_another_data_set_does_not_go_on(kind: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = some_texts(NUM_TEXTS)
    made = KINDS[kind](tmp_path / "data", texts)
    prepare(config(tmp_path / "out", tokenizer_folder, dataset={"path": made}))
    shutil.rmtree(made)
    KINDS[kind](made, [*texts[:-1], texts[-1] + "!"])
    with pytest.raises(MismatchError, match="content of the input: the store has"):
        prepare(config(tmp_path / "out", tokenizer_folder, dataset={"path": made}))


def test_splits_are_chosen_by_name(tmp_path: Path) -> None:
    parts = {"train": ["a", "b"], "validation": ["c"], "test": ["d"]}
    dictionary = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": t}) for name, t in parts.items()})
    dictionary.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, texts in parts.items():
        write_jsonl(tmp_path / "files" / f"{name}.jsonl", texts)
    for folder in (tmp_path / "saved", tmp_path / "files"):
        assert records(folder) == ["a", "b"]
        assert records(folder, split="validation") == ["c"]
        with pytest.raises(UserError, match=r"no split 'dev'; it has \['test', 'train', 'validation'\]"):
            records(folder, split="dev")
        with pytest.raises(UserError, match=r"train\[:10%\] cannot be streamed"):
            records(folder, split="train[:1]")
    only = tmp_path / "only"
    only.mkdir()
    write_jsonl(only / "validation.jsonl", ["e"])
    assert records(only) == ["e"]
    single = saved(tmp_path / "single", ["x", "y", "z"])
    assert records(single) == ["x", "y", "z"]
    with pytest.raises(UserError, match="is one split by itself"):
        records(single, split="train")


def test_configurations_of_a_folder_are_chosen_by_name(tmp_path: Path) -> None:
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", [name])
    entries = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in ("en", "de")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(entries)}\n---\n")
    assert records(tmp_path, config="de") == ["de"]
    with pytest.raises(UserError, match=r"(?s)cannot be opened.*'en', 'de'.*--dataset-config"):
        records(tmp_path)
    with pytest.raises(UserError, match=r"(?s)'fr' not found.*--dataset-config"):
        records(tmp_path, config="fr")


def test_what_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"does not exist; give a folder or a hub name"):
        records(tmp_path / "nowhere")
    file = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(UserError, match="is a file; name it as --input"):
        records(file)
    with pytest.raises(UserError, match="which has no revisions"):
        records(jsonl(tmp_path / "files", ["a", "b", "c"]), revision="main")
    with pytest.raises(UserError, match=r"org/name cannot be opened.*check the name and the network"):
        records(Path("org/name"))
    made = saved(tmp_path / "saved", ["a", "b", "c"])
    with pytest.raises(UserError, match=r"no column 'body'; found \['number', 'text'\].*--text-field"):
        open_dataset(DatasetInput(path=str(made)), kind=PlainText("body"), max_bad_lines=0)
    (made / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00003.arrow|cannot be opened"):
        records(made)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'potstill\[datasets\]'"):
        records(tmp_path / "files")


def test_a_damaged_shard_is_named_and_what_came_before_it_is_used(tmp_path: Path) -> None:
    made = jsonl(tmp_path / "data", ["a", "b", "c"])
    source = open_dataset(DatasetInput(path=str(made)), kind=PlainText("text"), max_bad_lines=0)
    (made / "train-1.jsonl").write_text('{"text": "b"\n')
    documents = iter(source.read())
    assert next(documents).record.text == "a"
    with pytest.raises(UserError, match=r"shard 2 of 3: cannot be read after record 0: .*run the same command again"):
        next(documents)


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_records_without_a_text_are_counted(kind: str, tmp_path: Path) -> None:
    texts: list[Any] = ["a", None, "b", None, "c", "d"]
    made = KINDS[kind](tmp_path / "data", texts)
    source = open_dataset(DatasetInput(path=str(made)), kind=PlainText("text"), max_bad_lines=2)
    found = list(source.read())
    assert [document.record.text for document in found] == ["a", "b", "c", "d"]
    assert [document.bad_lines for document in found] == [0, 1, 2, 2]
    strict = open_dataset(DatasetInput(path=str(made)), kind=PlainText("text"), max_bad_lines=1)
    with pytest.raises(UserError, match=r"record \d: field 'text' is NoneType, expected a text.*broken record 2"):
        list(strict.read())


@pytest.mark.parametrize("kind", KINDS)
def test_reading_from_a_place_is_the_rest_of_reading(kind: str, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(NUM_TEXTS)]
    made = KINDS[kind](tmp_path / "data", texts)
    source = open_dataset(DatasetInput(path=str(made)), kind=PlainText("text"), max_bad_lines=0)
    everything = list(source.read())
    assert [document.record.text for document in everything] == texts
    for number in (0, 1, 49, 50, 70, 101, NUM_TEXTS - 1):
        start = everything[number].place
        assert list(source.read(start=start)) == everything[number:]
        following = Place(start.file, start.record + 1)  # what a cursor says after a document; may be a shard's end
        assert list(source.read(start=following)) == everything[number + 1 :]
    reader = source.read()
    shares = [reader.bytes_read for _ in reader]
    assert shares == sorted(shares) and reader.bytes_read == source.num_bytes > 0


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_memory_does_not_grow_with_the_data_set(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    monkeypatch.setattr(sys.modules[__name__], "NUM_SHARDS", 12)
    texts = [f"{number} " + "the copper pot runs slow and clear " * 300 for number in range(3000)]  # 31 MB
    made = KINDS[kind](tmp_path / "data", texts)
    source = open_dataset(DatasetInput(path=str(made)), kind=PlainText("text"), max_bad_lines=0)
    size = sum(map(len, texts))
    count = len(texts)
    del texts
    before, peak = pa.total_allocated_bytes(), 0
    for document in source.read():
        count -= 1
        peak = max(peak, pa.total_allocated_bytes() - before)
        del document
    assert count == 0 and size > 30_000_000
    # Streaming holds a row group (here: a shard of twelve) and its copies; of mapped files some records are held.
    assert peak < (size / 12 if kind == "saved" else size / 3), (peak, size)


def test_the_command_takes_a_data_set() -> None:
    words = "prepare --dataset org/name --dataset-config en --dataset-split train --dataset-revision v1 --output data"
    arguments = cli.parse([*words.split(), "--vocab-size", "300"])
    found = load_config(PrepareConfig, None, getattr(arguments, OVERRIDES))
    assert found.dataset == DatasetInput(path="org/name", config="en", split="train", revision="v1")
    for more in ("--input a.jsonl", ""):
        words = f"prepare --output data --vocab-size 300 {more} " + ("--dataset org/name" if more else "")
        with pytest.raises(ConfigError, match="exactly one of input and dataset"):
            load_config(PrepareConfig, None, getattr(cli.parse(words.split()), OVERRIDES))


def test_a_saved_data_set_as_plain_input_is_explained(tmp_path: Path, tokenizer_folder: Path) -> None:
    made = saved(tmp_path / "data", ["a", "b", "c"])
    with pytest.raises(UserError, match="is a data set of save_to_disk; name it as --dataset"):
        prepare(config(tmp_path / "out", tokenizer_folder, input=[made]))


def test_real_data_sets(shared_data: Path, tmp_path: Path) -> None:
    """Teacher outputs of other projects hold no text: said at once. Decoded to text, they make the same rows again."""
    foreign = shared_data / "foreign" / "hf_datasets"
    tokenizer_folder = shared_data / "tokenizers" / "demo-bpe-8k"
    if not foreign.is_dir() or not tokenizer_folder.is_dir():
        pytest.skip(f"no real data sets: {foreign} or {tokenizer_folder} does not exist")
    for folder in (foreign / "save_to_disk", foreign / "parquet"):
        with pytest.raises(UserError, match=r"no column 'text'; found \['input_ids', 'topk_ids', 'topk_logprobs'\]"):
            records(folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = datasets.load_from_disk(str(foreign / "save_to_disk"))["input_ids"]
    texts = [tokenizer.decode(list(row)) for row in ids]
    made = saved(tmp_path / "decoded", texts)
    changes = {"heldout_fraction": 0.0, "row_length": 64, "append_eos": False}
    prepare(config(tmp_path / "a", tokenizer_folder, dataset={"path": made}, **changes))
    plain = write_jsonl(tmp_path / "plain.jsonl", texts)
    prepare(config(tmp_path / "b", tokenizer_folder, input=[plain], **changes))
    a, b = (token_rows(tmp_path / name / "train") for name in ("a", "b"))
    assert [row.tokens.tolist() for row in a] == [row.tokens.tolist() for row in b] and len(a) >= 4
