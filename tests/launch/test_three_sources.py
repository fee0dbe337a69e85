"""One run over three real corpora: novels, maths prompts with answers, and noisy text with a teacher of its own.

Everything goes through the doors that a user has (prepare, dump, train), with models that nobody trained for this.
"""

from __future__ import annotations

import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.storage import StoreReader, TokensRow
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.metrics import read_metrics
from potstill.teacher_dump import DumpConfig, PrepareConfig, dump, prepare
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.test_resume import kill_after, steps_of

STEPS, BATCH, ROW_LENGTH = 16, 10, 192
DOCUMENTS = {"novels": 6, "maths": 30, "noisy": 6}
MIXES = ({"novels": 0.5, "maths": 0.3, "noisy": 0.2}, {"maths": 0.6, "noisy": 0.4})


def texts(shared: Path, name: str) -> list[dict[str, Any]]:
    folder = {"maths": "math-gsm8k"}.get(name, name)
    with lzma.open(shared / folder / "valid.jsonl.xz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for _, line in zip(range(DOCUMENTS[name]), stream, strict=False)]


def records(shared: Path, name: str) -> list[dict[str, str]]:
    """Short texts, and for maths the question apart from the answer, which alone is trained on."""
    found = texts(shared, name)
    if name != "maths":
        return [{"text": document["text"][:900]} for document in found]
    cut = [document["text"].partition("Answer:") for document in found]
    return [{"question": question + word, "answer": answer} for question, word, answer in cut]


@pytest.fixture(scope="module")
def corpora(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The sources of the configuration: prepared rows, and targets of each source's teacher."""
    folder = tmp_path_factory.mktemp("sources")
    sources: dict[str, dict[str, Any]] = {}
    for name in DOCUMENTS:
        lines = [json.dumps(record) + "\n" for record in records(shared_data, name)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        fields: dict[str, Any] = {}
        if name == "maths":
            fields = {"prompt_field": "question", "response_field": "answer", "packing": "whole", "too_long": "drop"}
        prepare(
            PrepareConfig(
                input=[str(folder / f"{name}.jsonl")],
                output=folder / name,
                tokenizer=str(shared_data / "tokenizers" / "demo-bpe-8k"),
                row_length=ROW_LENGTH,
                rows_per_unit=8,
                **fields,
            )
        )
        teacher = shared_data / "models" / ("teacher-7m" if name == "noisy" else "slm-2m")
        tokens, targets = folder / name / "train", folder / f"{name}_targets"
        selection = {"mode": "top_k", "k": 8}
        dump(DumpConfig(tokens=str(tokens), output=str(targets), teacher={"model": str(teacher)}, selection=selection))
        sources[name] = {"tokens": str(tokens), "targets": {"teacher": str(targets)}}
    return sources


def tree_of(sources: dict[str, Any], output: Path, **changes: Any) -> dict[str, Any]:
    """Two stages with shares of their own, saved each 4 steps."""
    # The tree of the tiny stores, whose data are replaced.
    places = dict.fromkeys(("tokens", "heldout", "heldout_teacher", "teacher", "scores"), output)
    tree = tiny.config_tree(places, output)
    tree["model"]["config"]["max_position_embeddings"] = ROW_LENGTH
    tree["data"] = {"sources": sources, "global_batch_rows": BATCH, "micro_batch_rows": 5}
    first, second = MIXES
    tree["curriculum"] = [
        {"name": "broad", "until": 0.5, "mix": first, "targets": "teacher"},
        {"name": "narrow", "mix": second, "targets": "teacher", "off_kd": "ce"},
    ]
    tree["run"] |= {"max_steps": STEPS}
    return {**tree, "checkpoint": {"every_steps": 4}, "zero_stage": 1, **changes}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def test_three_sources_train_and_resume_on_any_number_of_ranks(corpora: dict[str, Any], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(workers.train_run, tree_of(corpora, whole), world=2)
    losses, rows = steps_of(whole)
    assert len(losses) == STEPS and np.isfinite(losses).all()

    kill_after(tree_of(corpora, killed), killed, step=6, world=1)
    run_ranks(workers.train_run, tree_of(corpora, killed), world=2)
    again, same_rows = steps_of(killed)
    assert same_rows == rows
    # Sums in another order; a wrong row, weight or optimizer state would show in the second digit.
    assert again == pytest.approx(losses, rel=1e-4)

    assert totals(whole) == expected_totals(corpora, whole)
    for name in corpora:
        figures = [line["sources"][name] for line in lines_of(killed)]
        read = [figure for figure in figures if figure["rows"]]
        assert read and all(np.isfinite([figure["ce"], figure["kd"]]).all() for figure in read)


def totals(run: Path) -> dict[str, tuple[int, int, int]]:
    """Rows, tokens and trained positions by source over a run, as its lines of metrics say."""
    found: dict[str, np.ndarray] = {}
    for line in lines_of(run):
        for name, figures in line["sources"].items():
            counts = np.array([figures["rows"], figures["tokens"], figures["positions"]])
            found[name] = found.get(name, 0) + counts
    return {name: tuple(int(count) for count in counts) for name, counts in found.items()}


def expected_totals(corpora: dict[str, Any], run: Path) -> dict[str, tuple[int, int, int]]:
    """The same, counted from the plan and the stores, after a look at the shares of rows."""
    config = workers.config_of(tree_of(corpora, run))
    stores = open_stores(config)
    plan = build_plan(config, stores)
    readers = {name: StoreReader(source["tokens"]) for name, source in corpora.items()}
    owners = [(name, row) for name, reader in readers.items() for row in range(reader.num_rows)]
    counted = {name: np.zeros(3, np.int64) for name in corpora}
    for number, (first, mix) in enumerate(zip((0, STEPS // 2), MIXES, strict=True)):
        drawn = [owners[int(row)] for step in range(first, first + STEPS // 2) for row in plan.rows(step)]
        by_source = Counter(name for name, _ in drawn)
        for name, share in mix.items():
            assert abs(by_source[name] - share * len(drawn)) <= 1.5, (number, name, by_source)
        assert set(by_source) == set(mix)
        for name, row in drawn:
            tokens = readers[name].tokens_rows([row])[0]
            counted[name] += (1, len(tokens.tokens), int(tokens.has_target().sum()))
    return {name: tuple(int(count) for count in counts) for name, counts in counted.items()}


def test_only_answers_are_trained_on(shared_data: Path, corpora: dict[str, Any]) -> None:
    from potstill.teacher_dump.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "demo-bpe-8k"))
    tokens, targets = (
        StoreReader(path) for path in (corpora["maths"]["tokens"], corpora["maths"]["targets"]["teacher"])
    )
    known = {record["answer"].strip() for record in records(shared_data, "maths")}
    rows = tokens.tokens_rows(range(tokens.num_rows))
    found = [answer for row in rows for answer in answers_of(row, tokenizer)]
    assert len(found) >= 15 and set(found) <= known
    for row, target in zip(rows, targets.targets_rows(range(tokens.num_rows)), strict=True):
        assert ((np.diff(target.targets.offsets) > 0) == row.has_target()).all()


def answers_of(row: TokensRow, tokenizer: Any) -> list[str]:
    """The trained tokens of each document as text."""
    assert row.mask is not None
    ends = np.cumsum(row.doc_lens)
    spans = [slice(end - size, end) for end, size in zip(ends, row.doc_lens, strict=True)]
    return [tokenizer.decode(row.tokens[span][row.mask[span]], skip_special_tokens=True).strip() for span in spans]
