"""Figures by source, from the loss of a micro-batch to the report; and a run of several on one rank and on two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.kernels.types import LossSums
from potstill.storage import StoreReader, TokensRow
from potstill.student_train.report.build import write_report
from potstill.student_train.run.metrics import Meter, read_metrics
from potstill.student_train.run.run_folder import read_done
from potstill.student_train.run.source_figures import source_figures, source_sum_names, source_text, source_totals
from potstill.student_train.run.summary import TrainSummary
from potstill.student_train.run.trackers import flat_numbers
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers

SOURCES = ("novels", "maths")


def masked_rows(num_rows: int) -> list[TokensRow]:
    """Rows whose first tokens of each document are not trained on."""
    found = []
    for row in tiny.token_rows(num_rows, seed=5, last_length=27):
        place = np.arange(len(row.tokens)) - np.repeat(np.cumsum(row.doc_lens) - row.doc_lens, row.doc_lens)
        found.append(replace(row, mask=place >= 2))
    return found


@pytest.fixture(scope="module")
def maths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tokens store with masks, and targets over it."""
    folder, rows = tmp_path_factory.mktemp("maths"), masked_rows(12)
    tokens = tiny.write_store(folder / "tokens", tiny.spec_of("tokens", num_rows=None, columns=("mask",)), rows)
    tiny.write_targets(folder / "teacher", tokens, rows, tiny.transition(5))
    return {name: str(folder / name) for name in ("tokens", "teacher")}


def two_sources(stores: dict[str, Path], maths: dict[str, str], run: Path, **changes: Any) -> dict[str, Any]:
    """A run over both, in equal shares, whose documents weigh by what their own teacher says of them."""
    weights = {"of": "document", "store": "teacher", "column": "probability", "form": "beta", "applies_to": "kd"}
    tree = tiny.config_tree(stores, run, objective={"alpha": 0.7, "off_kd": "ce"}, **changes)
    tree["run"] |= {"max_steps": 4}
    tree["logging"] = {"every_steps": 1}
    novels = {"tokens": str(stores["tokens"]), "targets": {"teacher": str(stores["teacher"])}}
    own = {"tokens": maths["tokens"], "targets": {"teacher": maths["teacher"]}}
    for name in ("tokens", "targets", "scores"):
        tree["data"].pop(name)
    tree["data"]["sources"] = {"novels": novels, "maths": own}
    tree["curriculum"] = [{"targets": "teacher", "mix": {"novels": 0.5, "maths": 0.5}, "weights": weights}]
    return tree


def test_two_sources_with_masks_and_weights_are_the_same_run_on_one_and_two_ranks(
    stores: dict[str, Path], maths: dict[str, str], tmp_path: Path
) -> None:
    lines = []
    for world in (1, 2):
        tree = two_sources(stores, maths, tmp_path / str(world))
        assert run_ranks(workers.train_run, tree, world=world)[0]["status"] == "done"
        lines.append([record for record in read_metrics(tmp_path / str(world)) if record["kind"] == "train"])
    one, two = lines
    for a, b in zip(one, two, strict=True):
        assert a["row_digests"] == b["row_digests"]
        assert a["step_losses"] == pytest.approx(b["step_losses"], rel=1e-5)
        assert list(a["sources"]) == list(SOURCES)
        for name in SOURCES:
            assert a["sources"][name] == pytest.approx(b["sources"][name], rel=1e-5)
        parts = a["sources"].values()
        assert sum(part["rows"] for part in parts) == 4
        for part in parts:
            assert 0 < part["positions"] < part["tokens"] and part["ce"] > 0 and part["kd"] > 0
        labels = sum(part["ce"] * part["positions"] for part in parts) / sum(part["positions"] for part in parts)
        assert a["ce"] == pytest.approx(labels, rel=1e-5), "every label weighs 1: the weights are of KD"
        assert a["loss"] == pytest.approx(0.7 * a["kd"] + 0.3 * a["ce"], rel=1e-4), "weights of KD have mean 1"
    totals = source_totals(one)
    assert totals["novels"]["rows"] == totals["maths"]["rows"] == 8, "shares of the mix"
    assert sum(own["tokens"] for own in totals.values()) == one[-1]["tokens"]
    assert read_done(tmp_path / "1") is not None
    page = write_report([tmp_path / "1", tmp_path / "2"], tmp_path / "report.html").read_text()
    assert page.count("<h2>Sources</h2>") == 1 and page.count("<td>positions trained on</td>") == 2
    maths_tokens = f"{int(totals['maths']['tokens']):,}"
    assert "<td>tokens</td>" in page and f">{maths_tokens}</td>" in page


def test_the_figures_of_a_micro_batch_by_source_are_those_of_its_tokens(
    stores: dict[str, Path], maths: dict[str, str], start_weights: Path
) -> None:
    from potstill.storage import LoadedBatch
    from potstill.student_train.config.stages import Objective, Stage
    from potstill.student_train.curriculum.step_objective import step_objective
    from potstill.student_train.data.batch import collate
    from potstill.student_train.model.hf_config import hf_config
    from potstill.student_train.model.student import TrainRequest, build_student

    tree = {"run": {"output_dir": "x", "max_steps": 1}, "model": {"path": str(start_weights)}}
    config = workers.config_of({**tree, "data": {"tokens": "x", "global_batch_rows": 1}}).model
    student = build_student(config, hf_config(config, vocab_size=tiny.VOCAB), seed=0).double()
    novels, others = (StoreReader(path) for path in (stores["tokens"], maths["tokens"]))
    teachers = [StoreReader(path) for path in (stores["teacher"], maths["teacher"])]
    tokens = [novels.tokens_rows([3])[0], others.tokens_rows([11])[0], novels.tokens_rows([39])[0]]
    targets = [teachers[0].targets_rows([3])[0], teachers[1].targets_rows([11])[0], teachers[0].targets_rows([39])[0]]
    objective = step_objective(Objective(), Stage.model_validate({"targets": "teacher", "alpha": 0.5}), 0.0)

    def sums_of(places: list[int], num_sources: int) -> list[float]:
        source = np.array([0, 1, 0])[places] if num_sources > 1 else None
        rows = {"tokens": [tokens[n] for n in places], "joined": {"teacher": [targets[n] for n in places]}}
        batch = LoadedBatch(0, np.array(places), source=source, **rows)
        [micro] = collate(batch, objective, micro_batch_rows=len(places), row_length=tiny.ROW_LENGTH)
        request = TrainRequest(micro, objective, torch.tensor(1.0), 1, num_sources=num_sources, self_check=True)
        return student(request)[1].tolist()

    whole, names = sums_of([0, 1, 2], 2), student.sum_names
    assert len(whole) == len(names) + len(source_sum_names(SOURCES)) == len(names) + 2 * len(LossSums.names())
    plain = sums_of([0, 1, 2], 1)
    assert whole[: len(names)] == plain, "what a run of one source has is as it was"
    by_source = dict(zip(source_sum_names(SOURCES), whole[len(names) :], strict=True))
    for name, places in (("novels", [0, 2]), ("maths", [1])):
        alone = dict(zip(names, sums_of(places, 1), strict=True))
        for figure in LossSums.names():
            assert by_source[f"{name}/{figure}"] == pytest.approx(alone[figure], rel=1e-5), figure


def test_one_source_has_no_figures_of_its_own() -> None:
    assert source_sum_names(("tokens",)) == () and source_figures({}, ("tokens",)) == {}
    assert Meter(torch.device("cpu"), ("ce",), sources=("tokens",))._names == ("ce", "tokens")


def test_lines_add_up_and_a_source_that_was_not_drawn_has_no_means() -> None:
    first = {"novels": {"rows": 4.0, "tokens": 100.0, "positions": 90.0, "ce": 3.5, "kd": 0.5}}
    first["maths"] = {"rows": 0.0, "tokens": 0.0, "positions": 0.0, "ce": None, "kd": None}
    second = {"novels": {**first["novels"], "ce": 3.25, "kd": None}, "maths": first["maths"]}
    found = source_totals([{"sources": first}, {"loss": 1.0}, {"sources": second}])
    assert found["novels"] == {"rows": 8.0, "tokens": 200.0, "positions": 180.0, "ce": 3.25, "kd": 0.5}
    assert found["maths"]["ce"] is None and found["maths"]["rows"] == 0.0
    assert source_text(first) == "novels 100.0% ce 3.5000, maths 0.0%"
    record = {"kind": "train", "step": 3, "loss": 2.0, "sources": first}
    assert flat_numbers(record) == {
        "train/loss": 2.0,
        **{f"train/sources/novels/{name}": value for name, value in first["novels"].items()},
        **{f"train/sources/maths/{name}": 0.0 for name in ("rows", "tokens", "positions")},
    }
    summary = TrainSummary("done", Path("x"), 1, 1, 200, 5, 1.0, {}, {}, found)
    assert "source novels: 8 rows, 200 tokens, 180 positions, last ce 3.2500, last kd 0.5000" in summary.format()
    assert TrainSummary.from_json(summary.to_json()) == summary
