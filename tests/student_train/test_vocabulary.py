"""Students whose vocabulary is not the teacher's: what is read, what is trained, what is refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.config import build_config
from potstill.common.errors import UserError
from potstill.kernels.loss import sparse_loss
from potstill.kernels.types import IGNORE_LABEL, SparseTargetTensors
from potstill.launch.inspect.student import student_part
from potstill.storage import Loader, StoreReader, TargetsRow, TokensRow
from potstill.student_train import evaluate, export
from potstill.student_train.config.train import EvalConfig, ExportConfig
from potstill.student_train.data.stores import Stores, build_plan, open_stores
from potstill.student_train.evaluation.row_figures import load_student, row_figures
from potstill.student_train.hf_export.weights import find_source
from potstill.student_train.run.checkpoint import ResumeError
from potstill.student_train.run.dry_run import dry_run
from potstill.student_train.run.dry_run_text import format_dry_run
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.preflight import check_run, check_start
from tests.dist_harness import run_ranks
from tests.storage import vocabularies as dense
from tests.student_train import tiny, workers
from tests.student_train import vocabularies as made

Places = dict[str, Path]
SIZED = {"config": {**tiny.STUDENT, "vocab_size": made.VOCAB + made.NUM_NEW}}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """The stores, and tokenizers made from theirs by name."""
    place = tmp_path_factory.mktemp("vocabularies")
    stores = made.write_stores(place)
    source, reader = place / "data" / "tokenizer", StoreReader(stores["tokens"])
    used = np.unique(np.concatenate([row.tokens for row in reader.tokens_rows(range(reader.num_rows))]))
    text_of = {number: text for text, number in vocabulary(source).items()}
    words = {number: text for number, text in text_of.items() if not text.startswith("<|")}
    letters = set("".join(words.get(int(number), "") for number in used))

    def more_elsewhere(whole: dict[str, Any]) -> None:
        made.add_tokens(whole)
        made.renumber(whole)

    changes = {
        "same": lambda whole: None,
        "superset": made.add_tokens,
        "moved": more_elsewhere,
        "subset": made.without({text for text in words.values() if not letters & set(text)}),
        "used_lost": made.without({max((words.get(int(number), "") for number in used), key=len)}),
        "other_merges": made.halve_merges,
    }
    found = {name: made.changed_tokenizer(source, place / name, change) for name, change in changes.items()}
    return {**stores, **found, "source": source}


def vocabulary(folder: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    found: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def tree_of(places: Places, output: Path, student: str | None, *, data: dict[str, Any] | None = None, **changes: Any):
    """A configuration with the tokenizer `student`; no scores."""
    own = {} if student is None else {"vocabulary": {"tokenizer": str(places[student]), **(data or {})}}
    return tiny.config_tree({**places, "scores": Path("none")}, output, data={"scores": {}, **own}, **changes)


def opened(places: Places, student: str | None, **data: Any) -> Stores:
    return open_stores(workers.config_of(tree_of(places, Path("run"), student, data=data)))


@pytest.mark.parametrize(
    ("student", "subset", "line"),
    [
        ("same", False, "the teacher's"),
        ("superset", False, "superset, 3 new ids"),
        ("moved", False, "superset, 3 new ids, in another order"),
        ("subset", True, r"subset: \d+ ids dropped"),
    ],
)
def test_tokens_are_matched_by_their_text(places: Places, student: str, subset: bool, line: str) -> None:
    found, teacher, own = (
        opened(places, student, subset=subset),
        vocabulary(places["source"]),
        vocabulary(places[student]),
    )
    assert found.vocabulary is not None
    assert re.fullmatch(line, found.vocabulary.line())
    assert found.vocabulary.mapping.new_id.tolist() == [own.get(text, -1) for text in sorted(teacher, key=teacher.get)]
    assert found.vocab_size == len(own)
    stored, row = StoreReader(places["tokens"]).tokens_rows([1])[0], found.tokens.tokens_rows([1])[0]
    text_of = {number: text for text, number in own.items()}
    of_teacher = {number: text for text, number in teacher.items()}
    assert [text_of[int(n)] for n in row.tokens] == [of_teacher[int(n)] for n in stored.tokens]


def test_a_subset_costs_what_the_dry_run_says(places: Places, tmp_path: Path) -> None:
    """A third of the table is dropped, so that some positions keep no entry; counted by hand from the stored rows."""
    start = check_start(
        workers.config_of(tree_of(places, tmp_path / "run", "subset", data={"subset": True})), num_ranks=1
    )
    found = start.run.stores
    assert found.vocabulary is not None and start.run.student_config.vocab_size == found.vocab_size < made.VOCAB
    reader, mass, lost, positions = StoreReader(places["teacher"]), 0.0, 0, 0
    chosen = sorted({number * reader.num_rows // 16 for number in range(16)})
    for row in reader.targets_rows(chosen):
        assert row.targets.logprobs is not None
        gone = found.vocabulary.mapping.new_id[row.targets.ids] < 0
        mass += float(np.exp(row.targets.logprobs[gone].astype(np.float64)).sum())
        counts = np.diff(row.targets.offsets)
        kept = np.add.reduceat(~gone, row.targets.offsets[:-1][counts > 0])
        lost, positions = lost + int((kept == 0).sum()), positions + int((counts > 0).sum())
    said = dry_run(start).vocabulary
    assert said == (
        f"subset: {found.vocabulary.num_lacking} ids dropped, mass of sampled rows going to the tail: teacher "
        f"{mass / positions:.2%}" + (f", {lost:,} of {positions:,} positions without a target" if lost else "")
    )
    assert f"  vocabulary: {said}" in format_dry_run(dry_run(start))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_on_a_subset_is_that_of_merged_ids(temperature: float) -> None:
    """The kernel's loss on mapped targets, against the dense teacher with one bucket for the rest."""
    logits, mapping = dense.teacher_logits(), dense.trimmed()
    targets = SparseTargetTensors.from_arrays(mapping.map_targets(dense.sparse(logits, 5)))
    student = np.random.default_rng(1).normal(size=(len(logits), mapping.vocab_size))
    given = torch.tensor(student, dtype=torch.float64)
    labels = torch.full((len(logits),), IGNORE_LABEL)
    loss, _ = sparse_loss(
        logits=given, targets=targets, labels=labels, alpha=1.0, temperature=temperature, normalizer=torch.tensor(1.0)
    )
    wanted = dense.merged_kl(logits, student, mapping.new_id, 5, temperature=temperature) * temperature**2
    assert float(loss) == pytest.approx(wanted.sum(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_superset_trains_as_the_teachers_vocabulary_does(places: Places, tmp_path: Path, temperature: float) -> None:
    """Other ids and three more tokens: the gradients are those of the plain run whose head has three rows to spare."""
    from transformers import AutoConfig, AutoModelForCausalLM

    table = opened(places, "moved").vocabulary
    assert table is not None
    new_id = table.mapping.new_id
    rest = np.setdiff1d(np.arange(made.VOCAB + made.NUM_NEW), new_id)
    order = np.concatenate([new_id, rest])  # the student's id of each row of the plain head
    torch.manual_seed(5)
    values = {key: value for key, value in tiny.STUDENT.items() if key != "model_type"}
    config = AutoConfig.for_model("llama", vocab_size=len(order), initializer_range=0.1, **values)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        turned = torch.empty_like(weight)
        turned[order] = weight
        weight.copy_(turned)
    model.save_pretrained(tmp_path / "moved")
    stage = [{"targets": "teacher", "temperature": temperature}]
    plain, moved = (
        workers.plain_gradients(
            tree_of(
                places,
                tmp_path / "run",
                student,
                model={"path": str(tmp_path / name), "config": None},
                curriculum=stage,
            )
        )
        for name, student in (("plain", None), ("moved", "moved"))
    )
    for name, gradient in plain.items():
        found = moved[name][order] if len(gradient) == len(order) else moved[name]
        np.testing.assert_allclose(found, gradient, atol=1e-6, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("student", "data", "words"),
    [
        ("subset", {}, r"lacks \d+ of the 300 tokens .*: \d+ is '.' \(the student's \d+: '.+'\); .*subset: true"),
        ("used_lost", {"subset": True}, r"row \d+, position \d+: token id \d+ of the text .*\(that id is '.+'\)"),
        ("other_merges", {}, r"row \d+, document 0: the two tokenizers cut its text differently from token \d+ on"),
        ("superset", {"teacher_tokenizer": "moved"}, r"data.vocabulary.teacher_tokenizer: .* has the digest"),
        ("tokens", {}, r"cannot be loaded|no folder"),
    ],
)
def test_other_tokenizers_are_refused(places: Places, student: str, data: dict[str, Any], words: str) -> None:
    if "teacher_tokenizer" in data:
        data = {"teacher_tokenizer": str(places[data["teacher_tokenizer"]])}
    with pytest.raises(UserError, match=words):
        opened(places, student, **data)


def test_another_way_of_writing_bytes_is_refused(places: Places, tmp_path: Path) -> None:
    """A sentencepiece tokenizer writes the same piece of text in another way: nothing could be matched."""

    def metaspace(whole: dict[str, Any]) -> None:
        whole["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}

    made.changed_tokenizer(places["source"], tmp_path / "pieces", metaspace)
    with pytest.raises(UserError, match="is of kind sentencepiece, the tokenizer of the stores byte_level"):
        opened({**places, "pieces": tmp_path / "pieces"}, "pieces")


def test_another_way_of_cutting_may_be_meant(places: Places) -> None:
    found = opened(places, "other_merges", check_rows=0)
    assert found.vocabulary is not None and found.vocabulary.mapping.is_identity


def test_a_head_that_is_too_small_is_refused(places: Places, tmp_path: Path) -> None:
    tree = tree_of(places, tmp_path / "run", "superset", model={"config": {**tiny.STUDENT, "vocab_size": made.VOCAB}})
    with pytest.raises(UserError, match=r"vocab_size is 300, but its rows hold ids below 303 .*data.vocabulary"):
        check_run(workers.config_of(tree), world_size=1)


@pytest.fixture(scope="module")
def finished(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in a vocabulary of its own."""
    run = tmp_path_factory.mktemp("moved") / "run"
    tree = tree_of(places, run, "moved", run={"max_steps": 2}, eval={"samples": 1, "sample_tokens": 4}, model=SIZED)
    run_ranks(workers.train_run, tree, world=1)
    return run


def test_a_resume_with_another_map_is_refused(places: Places, finished: Path) -> None:
    check_start(workers.config_of(tree_of(places, finished, "moved", model=SIZED)), num_ranks=1)
    for other in ("superset", None):  # with as many ids: it is the map that differs
        with pytest.raises(ResumeError, match=r"stores differs \(vocabulary: saved '\w+', now"):
            check_start(workers.config_of(tree_of(places, finished, other, model=SIZED)), num_ranks=1)


def test_its_export_is_measured_in_its_own_ids(places: Places, finished: Path, tmp_path: Path) -> None:
    """The run knows its vocabulary; its export comes with the tokenizer, and is refused without being told of it."""
    out = tmp_path / "out"
    export(build_config(ExportConfig, {"run": str(finished), "output_dir": str(out), "check": False}, source="test"))
    assert vocabulary(out) == vocabulary(places["moved"])

    def measured(model: Path, **values: Any) -> dict[str, Any]:
        given = {"model": str(model), "heldout": str(places["heldout"]), "targets": str(places["heldout_teacher"])}
        return evaluate(build_config(EvalConfig, {**given, "num_threads": 1, **values}, source="test")).to_json()

    of_run, of_export = measured(finished), measured(out, vocabulary={"tokenizer": str(out)})
    named = ("heldout_loss", "teacher_kl", "bits_per_byte", "text_bytes")
    assert [of_run[name] for name in named] == pytest.approx([of_export[name] for name in named])
    assert of_run["text_bytes"] > 0
    with pytest.raises(UserError, match=rf"vocabulary of its own .*vocabulary.tokenizer={out}"):
        measured(out)


def test_inspect_shows_the_student_its_own_ids(places: Places, finished: Path, tmp_path: Path) -> None:
    """The losses on the page of a row are those of the rows in the student's ids, with the curriculum or without."""
    reader, mapped = StoreReader(places["heldout"]), opened(places, "moved").heldout
    assert mapped is not None
    student = load_student(find_source(finished), mapped)
    row = mapped.tokens_rows([0])[0]
    wanted = row_figures([0], mapped, at=None, student=student)[0].student
    flags = {"run_folder": None, "config": None, "step": None, "model": finished}
    part = student_part(argparse.Namespace(**flags), reader, [0])
    assert wanted is not None and part is not None
    np.testing.assert_array_equal(part.extras[0].figures["st_loss"], wanted.loss)
    assert len(wanted.loss) == len(row.tokens) and wanted.loss.std() > 0
    tokens = StoreReader(places["tokens"])
    of_run = student_part(argparse.Namespace(**{**flags, "run_folder": finished, "model": None}), tokens, [0])
    alone = student_part(argparse.Namespace(**flags), tokens, [0])
    assert of_run is not None and alone is not None
    np.testing.assert_array_equal(of_run.extras[0].figures["st_loss"], alone.extras[0].figures["st_loss"])


def test_sources_are_read_in_one_vocabulary(places: Places) -> None:
    """Every source's rows and targets come in the student's ids, and the text of each is looked at."""
    sources = {
        name: {"tokens": str(places[tokens]), "targets": {"teacher": str(places[targets])}}
        for name, tokens, targets in (("one", "tokens", "teacher"), ("two", "heldout", "heldout_teacher"))
    }
    given = {"tokens": None, "targets": {}, "sources": sources, "heldout": None, "heldout_targets": None}
    tree = tree_of(places, Path("run"), "moved")
    config = workers.config_of({**tree, "data": {**tree["data"], **given}})
    found = open_stores(config)
    assert found.vocabulary is not None and set(found.targets()) == {"one.teacher", "two.teacher"}
    with Loader(build_plan(config, found), found.sources) as loader:
        batch = next(loader)
    assert batch.source is not None and set(batch.source.tolist()) == {0, 1}
    first = found.sources[0].tokens.num_rows
    for row, said, source in zip(batch.tokens, batch.targets("teacher"), batch.source, strict=True):
        inner, names = row.row - first * int(source), [("tokens", "teacher"), ("heldout", "heldout_teacher")][source]
        stored, told = (StoreReader(places[name]).row(inner) for name in names)
        assert isinstance(stored, TokensRow) and isinstance(told, TargetsRow)
        np.testing.assert_array_equal(row.tokens, found.vocabulary.mapping.new_id[stored.tokens])
        np.testing.assert_array_equal(said.targets.ids, found.vocabulary.mapping.new_id[told.targets.ids])


def test_samples_are_written_in_its_own_ids(places: Places, finished: Path) -> None:
    """The prompt of a sample is the text of the held-out row, whatever its ids are."""
    (sample,) = [line["samples"] for line in read_metrics(finished) if line["kind"] == "sample"][-1]
    row, tokenizer = StoreReader(places["heldout"]).tokens_rows([0])[0], places["source"]
    text_of = {number: text for text, number in vocabulary(tokenizer).items()}
    whole = "".join(text_of[int(number)] for number in row.tokens).replace("\u0120", " ")
    assert sample["prompt"] in whole and len(sample["prompt"]) > 5
