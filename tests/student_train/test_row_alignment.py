"""No row whose targets stand beside its tokens reaches a loss: few rows of a store, whole stores, and right ones."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from potstill.common.errors import UserError
from potstill.common.exit_codes import ERROR
from potstill.storage import LoadedBatch, Loader, MismatchError, Source, SourceRows, StoreReader, TargetsRow, TokensRow
from potstill.storage import concatenate as joined_targets
from potstill.student_train.data.alignment import check_aligned
from potstill.student_train.data.opening import check_targets
from potstill.student_train.data.step_batch import BatchFinisher
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.metrics import METRICS_FILE
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

NUM_ROWS = 89
SHIFTED = (13, 29, 54, 76)  # none of them in the sample that is looked at before the run
Make = Callable[[TokensRow], TargetsRow]


def shifted(tokens: TokensRow, row: TargetsRow, by: int = 1) -> TargetsRow:
    """The row with the distributions of each document moved by so many positions, at the same places."""
    order, ends = np.arange(len(tokens.tokens)), np.cumsum(tokens.doc_lens)
    for start, end in zip(ends - tokens.doc_lens, ends, strict=True):
        order[start : end - 1] = np.roll(order[start : end - 1], by)
    return replace(row, targets=joined_targets([row.targets.slice(int(at), int(at) + 1) for at in order]))


def without_labels(row: TargetsRow) -> TargetsRow:
    targets = replace(row.targets, label_logprob=None, label_rank=None, entropy=None)
    return replace(row, targets=targets, stats={})


@pytest.fixture(scope="module")
def rows() -> list[TokensRow]:
    return tiny.token_rows(NUM_ROWS)


@pytest.fixture(scope="module")
def tokens(rows: list[TokensRow], tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    return tiny.write_store(tmp_path_factory.mktemp("tokens") / "store", tiny.spec_of("tokens", num_rows=None), rows)


@pytest.fixture
def targets(tokens: StoreReader, rows: list[TokensRow], tmp_path: Path) -> Callable[..., StoreReader]:
    """Writes a store of what `make` gives of each row, some of them shifted."""

    def write(make: Make, *, moved: Sequence[int] = (), by: int = 1, **options: Any) -> StoreReader:
        spec = tiny.spec_of(
            "targets",
            num_rows=NUM_ROWS,
            input_digest=tokens.digest,
            teacher={"id": "bigram", "weights_digest": "0" * 64, "dtype": "float32", "engine": "table"},
            **({"selection": {"mode": "top_k", "k": tiny.TOP_K}} | options),
        )
        made = [make(row) for row in rows]
        for number in moved:
            made[number] = shifted(rows[number], made[number], by)
        return tiny.write_store(tmp_path / "targets", spec, made)

    return write


def taught(row: TokensRow) -> TargetsRow:
    return replace(tiny.targets_row(row, tiny.transition(), temperatures=()), stats={})


def drawn(row: TokensRow) -> TargetsRow:
    return tiny.sampled_row(row, tiny.transition(), num_draws=20)


DRAWS = {"selection": {"mode": "sample", "num_draws": 20, "power": 1.0}}


def refused_rows(tokens: StoreReader, targets: StoreReader) -> list[int]:
    """Rows that are refused, each read alone."""
    reader = SourceRows([Source("tokens", tokens, {"teacher": targets})])
    said: list[str] = []
    for number in range(tokens.num_rows):
        ids = np.array([number])
        of_tokens, joined = reader.read(ids, frozenset({"teacher"}))
        try:
            check_aligned(LoadedBatch(batch=0, rows=ids, tokens=of_tokens, joined=joined))
        except MismatchError as error:
            said.append(str(error))
    return [int(re.findall(r"targets store 'teacher': row (\d+): .* shifted", text)[0]) for text in said]


@pytest.mark.parametrize(("make", "options", "by"), [(taught, {}, 1), (drawn, DRAWS, -1)])
def test_four_shifted_rows_of_89_are_refused_when_they_are_read(
    tokens: StoreReader, targets: Callable[..., StoreReader], make: Make, options: dict[str, Any], by: int
) -> None:
    store = targets(make, moved=SHIFTED, by=by, **options)
    check_targets(store, tokens, key="data.targets.teacher")  # the sample has none of them
    assert refused_rows(tokens, store) == list(SHIFTED)


def run_tree(stores: dict[str, Path], tokens: StoreReader, targets: StoreReader, folder: Path) -> dict[str, Any]:
    """A run of one epoch of 89 rows."""
    data = {"tokens": tokens.url, "targets": {"teacher": targets.url}, "scores": {}}
    return tiny.config_tree(stores, folder / "run", data=data, run={"max_steps": 23})


def test_the_loader_of_a_run_ends_at_the_first_shifted_row(
    stores: dict[str, Path], tokens: StoreReader, targets: Callable[..., StoreReader], tmp_path: Path
) -> None:
    config = workers.config_of(run_tree(stores, tokens, targets(taught, moved=SHIFTED), tmp_path))
    opened = open_stores(config)
    plan = build_plan(config, opened)
    sizes = {"micro_batch_rows": 2, "row_length": tiny.ROW_LENGTH}
    finisher = BatchFinisher(plan=plan, **sizes, terms=(), device=torch.device("cpu"))
    first = next(step for step in range(23) if set(SHIFTED) & set(plan.rows(step).tolist()))
    with Loader(plan, opened.sources, finish=finisher) as loader:
        for step in range(first):
            assert next(loader).batch == step
        with pytest.raises(MismatchError, match=r"targets store 'teacher': row (13|29|54|76): .*shifted"):
            next(loader)


@pytest.mark.slow
def test_a_run_ends_at_the_first_shifted_row(
    stores: dict[str, Path],
    tokens: StoreReader,
    targets: Callable[..., StoreReader],
    tmp_path: Path,
) -> None:
    tree = run_tree(stores, tokens, targets(taught, moved=SHIFTED), tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    # In a process of its own: a run forms a process group, and says so in the environment.
    command = [sys.executable, "-m", "potstill.launch", "train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    errors = done.stderr
    assert done.returncode == ERROR, errors
    assert "Traceback" not in errors and "targets store 'teacher': row " in errors and "shifted" in errors, errors
    steps = [line for line in (tmp_path / "run" / METRICS_FILE).read_text().splitlines() if '"step"' in line]
    assert len(steps) < 23


@pytest.mark.parametrize(
    ("make", "labelled", "by"), [(taught, True, 1), (taught, False, 1), (taught, False, -1), (drawn, False, -1)]
)
def test_a_whole_store_shifted_is_refused_before_the_run(
    tokens: StoreReader, targets: Callable[..., StoreReader], make: Make, labelled: bool, by: int
) -> None:
    def change(row: TokensRow) -> TargetsRow:
        return make(row) if labelled else without_labels(make(row))

    store = targets(change, moved=range(NUM_ROWS), by=by, **(DRAWS if make is drawn else {}))
    with pytest.raises(UserError, match=r"data\.targets\.teacher: .* shifted or belong to other tokens"):
        check_targets(store, tokens, key="data.targets.teacher")


def test_right_stores_are_taken_without_a_word(
    stores: dict[str, Path],
    tokens: StoreReader,
    targets: Callable[..., StoreReader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("teacher", "early_teacher", "sampled"):
        of_tokens, store = StoreReader(stores["tokens"]), StoreReader(stores[name])
        check_targets(store, of_tokens, key=name)
        assert refused_rows(of_tokens, store) == []
    held = StoreReader(stores["heldout"]), StoreReader(stores["heldout_teacher"])
    check_targets(held[1], held[0], key="heldout")
    check_targets(targets(lambda row: without_labels(taught(row))), tokens, key="bare")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("teacher", ["near chance", "one token everywhere", "copies what it reads"])
def test_a_teacher_that_cannot_tell_is_taken_on_trust(
    tokens: StoreReader, targets: Callable[..., StoreReader], teacher: str, caplog: pytest.LogCaptureFixture
) -> None:
    logits = np.random.default_rng(3).normal(size=(tiny.VOCAB, tiny.VOCAB)) * 0.05
    if teacher == "one token everywhere":
        logits[:, 7] += 3.0
    if teacher == "copies what it reads":
        logits += 6.0 * np.eye(tiny.VOCAB)
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    store = targets(lambda row: without_labels(tiny.targets_row(row, table, temperatures=())))
    check_targets(store, tokens, key="data.targets.teacher")
    assert refused_rows(tokens, store) == []
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "data.targets.teacher is taken on trust" in record.getMessage()
    assert "cannot tell" in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.slow
def test_two_ranks_end_at_the_first_shifted_row(
    stores: dict[str, Path], tokens: StoreReader, targets: Callable[..., StoreReader], tmp_path: Path
) -> None:
    tree = run_tree(stores, tokens, targets(taught, moved=SHIFTED), tmp_path)
    with pytest.raises(AssertionError, match=r"targets store 'teacher': row \d+"):
        run_ranks(workers.train_run, tree, world=2)


def test_held_out_rows_are_looked_at_as_well(
    stores: dict[str, Path], tokens: StoreReader, targets: Callable[..., StoreReader], tmp_path: Path
) -> None:
    data = {"heldout": tokens.url, "heldout_targets": targets(taught, moved=range(NUM_ROWS)).url}
    with pytest.raises(UserError, match=r"data\.heldout_targets: .*shifted"):
        open_stores(workers.config_of(tiny.config_tree(stores, tmp_path / "run", data=data)))
