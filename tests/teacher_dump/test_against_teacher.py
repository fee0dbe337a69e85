"""A store is held against its teacher: the right one passes, another one and an altered row are caught and named."""

from __future__ import annotations

import itertools
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.kernels.topk import TopK
from potstill.launch.cli import main
from potstill.storage import Row, StoreReader, StoreWriter, read_spec, seal_store
from potstill.storage.store import writer as store_writer
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.against_teacher.config import AgainstTeacherConfig
from potstill.teacher_dump.against_teacher.measures import MEASURES
from potstill.teacher_dump.against_teacher.pairs import Pair
from potstill.teacher_dump.against_teacher.report import TeacherReport
from potstill.teacher_dump.against_teacher.run import hold_against_teacher
from potstill.teacher_dump.against_teacher.sample import sampled_rows
from potstill.teacher_dump.engines.table import ENGINES
from tests.dist_harness import run_ranks
from tests.teacher_dump import topk_engine
from tests.teacher_dump.tiny import make_tokens, save_llama

PREFIX = {"selection": {"mode": "top_p_k", "p": 0.9, "k": 20}, "temperatures": [2.0]}
DRAWS = {"selection": {"mode": "sample", "num_draws": 50, "seed": 5}}
WEIGHTS = {"selection": {"mode": "sample", "num_draws": 50, "power": 0.8}}
STORES: dict[str, dict[str, Any]] = {
    "prefix": PREFIX,
    "prefix_in_bfloat16": PREFIX | {"dtype": "bfloat16"},
    "top_k_by_rank": {"selection": {"mode": "top_k", "k": 8}, "frequency_ids": True, "documents": "apart"},
    "draws": DRAWS,
    "weights": WEIGHTS,
}
CHECK = {"check_tokenizer": False, "batch_rows": 4}


def dump_config(tokens: Path, output: Path, model: Path, **options: Any) -> DumpConfig:
    teacher = {"model": model, "check_tokenizer": False}
    teacher |= {key: options.pop(key) for key in ("dtype", "documents", "engine", "batch_rows") if key in options}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, **options)


def held(store: Path, model: Path, **options: Any) -> TeacherReport:
    teacher = {"model": model, **CHECK, **options.pop("teacher", {})}
    report = hold_against_teacher(str(store), AgainstTeacherConfig(teacher=teacher, **options))
    assert report is not None
    return report


@pytest.fixture(scope="module")
def long_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows: enough positions that a mean says something."""
    lengths = [(32,), (20, 12), (1, 31), (7, 5, 20)] * 6
    return make_tokens(tmp_path_factory.mktemp("against") / "tokens", lengths, row_length=32, rows_per_unit=4)


@pytest.fixture(scope="module")
def stores(long_tokens: Path, llama: Path) -> dict[str, Path]:
    """Places for a store of each kind, beside the tokens; those of daily tests are made."""
    found = {name: long_tokens.parent / name for name in STORES}
    for name in ("prefix", "prefix_in_bfloat16", "draws"):
        dump(dump_config(long_tokens, found[name], llama, **STORES[name]))
    found["scores"] = long_tokens.parent / "scores"
    score(ScoreConfig(tokens=long_tokens, output=found["scores"], model={"model": llama, "check_tokenizer": False}))
    return found


@pytest.fixture(scope="module")
def changed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with one tensor a fifth larger."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("changed") / "model"
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.2)
    model.save_pretrained(folder)
    return folder


SLOW = ("top_k_by_rank", "weights")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in [*STORES, "scores"]]
)
def test_the_right_teacher_passes_and_one_changed_tensor_is_caught(
    stores: dict[str, Path], long_tokens: Path, llama: Path, changed: Path, name: str
) -> None:
    if name in SLOW:
        dump(dump_config(long_tokens, stores[name], llama, **STORES[name]))
    right = held(stores[name], llama)
    assert right.ok and right.words.startswith("the store says what this teacher says"), right.format()
    assert not right.differing and len(right.rows) == 24 and right.positions == 24 * 31 - 6 * 4
    judged = {key for key, one in right.verdict.overall.items() if one.bound is not None}
    entries = {"draws": "draws", "weights": "draws", "scores": "label"}.get(name, "entries")
    assert {entries, "label", "entropy", "label_rank"} <= judged
    assert ("tails_at" in judged) == name.startswith("prefix")
    wrong = held(stores[name], changed)
    assert not wrong.ok and "it is further from it than that is from itself" in wrong.words
    assert "weights_digest" in wrong.differing and "not the files of weights that run.json names" in wrong.format()
    worse = wrong.verdict.overall[entries]
    assert worse.bound is not None and worse.stored > worse.bound.value > worse.control


def again(store: Path, output: Path, change: Callable[[Row], Row]) -> Path:
    """The store once more, each row as `change` makes it, with checksums that fit: nothing else tells."""
    reader, writer = StoreReader(store), StoreWriter.create(output, read_spec(store))
    with pytest.MonkeyPatch.context() as unchecked:
        # Values that were rounded to the grid once do not pass as a teacher's, whose masses add up to 1.
        unchecked.setattr(store_writer, "check_rows", lambda rows, **options: None)
        for unit in range(writer.num_units or 0):
            writer.commit_unit(unit, [change(row) for row in reader.rows(writer.unit_rows(unit))])
    seal_store(output)
    return output


def at_one_token(name: str, value: Callable[[Any], Any]) -> Callable[[Row], Row]:
    """One value of a column is another, at token 3 of row 9; of entries the id of the first."""

    def change(row: Any) -> Row:
        if row.row != 9:
            return row
        targets = row.targets
        array = (targets.log_tail_at[2.0] if name == "log_tail_at" else getattr(targets, name)).copy()
        place = int(targets.offsets[3]) if name == "ids" else 3
        array[place] = value(array[place : int(targets.offsets[4])] if name == "ids" else array[place])
        columns = {**targets.columns, name: {2.0: array} if name == "log_tail_at" else array}
        made = targets.__class__(offsets=targets.offsets, columns=columns, num_draws=targets.num_draws)
        return replace(row, targets=made)

    return change


@pytest.mark.parametrize(
    ("name", "value", "measure"),
    [
        ("ids", lambda kept: min(set(range(64)) - set(kept.tolist())), "entries"),
        ("entropy", lambda kept: kept + 0.25, "entropy"),
        ("log_tail_at", lambda kept: kept - 0.5, "tails_at"),
        ("label_logprob", lambda kept: -0.1 if kept < -1 else -5.0, "label"),
    ],
)
def test_a_single_altered_value_is_caught_and_its_place_named(
    stores: dict[str, Path], tmp_path: Path, long_tokens: Path, llama: Path, name: str, value: Any, measure: str
) -> None:
    bad = again(stores["prefix"], tmp_path / "bad", at_one_token(name, value))
    report = held(bad, llama, tokens=long_tokens)
    assert {(one.measure, one.row, one.token) for one in report.verdict.excesses if one.token is not None} == {
        (measure, 9, 3)
    }, report.format()
    assert "row 9 stands out, and the others agree" in report.words and "row 9, token 3" in report.format()


def test_a_row_of_draws_that_another_row_has_lost_is_named(
    stores: dict[str, Path], tmp_path: Path, long_tokens: Path, llama: Path
) -> None:
    taken: Any = StoreReader(stores["draws"]).row(4)  # of the same lengths as row 8
    bad = again(
        stores["draws"], tmp_path / "bad", lambda row: row if row.row != 8 else replace(row, targets=taken.targets)
    )
    report = held(bad, llama, tokens=long_tokens)
    assert {one.row for one in report.verdict.excesses if one.measure == "draws"} - {None} == {8}
    assert not report.ok and "row 8" in report.format()


def test_the_command_ends_with_0_or_3_and_prints_one_object(
    stores: dict[str, Path], llama: Path, changed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["verify", str(stores["prefix"]), "--set", "teacher.check_tokenizer=false", "--rows", "8"]
    assert main([*words, "--teacher", str(llama), "--deep"]) == 0
    out = capsys.readouterr().out
    assert "every row decoded" in out and "8 of 24 rows" in out and "verdict: the store says what this" in out
    assert main([*words, "--teacher", str(changed), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and not found["against_teacher"]["ok"] and not found["against_teacher"]["same_weights"]
    rows = found["against_teacher"]["rows"]
    assert len(rows) == 8 and all({"kl", "other_choice", "log_tail", "entries"} <= row.keys() for row in rows)
    overall = found["against_teacher"]["overall"]["kl"]
    total = sum(row["kl"]["stored"] * row["positions"] for row in rows)
    assert overall["stored"] == pytest.approx(total / found["against_teacher"]["positions"]) and overall["stored"] > 0


def test_a_damaged_store_is_not_held_against_anything(
    stores: dict[str, Path], tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(stores["draws"], tmp_path / "store")
    next((tmp_path / "store" / "units").glob("u0000002-*.arrow")).unlink()
    assert main(["verify", str(tmp_path / "store"), "--teacher", str(llama)]) == 3
    assert "not held against the teacher: the store is not sound" in capsys.readouterr().out


def test_without_a_teacher_no_model_library_is_imported(stores: dict[str, Path]) -> None:
    code = (
        "import sys\nfrom potstill.launch.cli import main\n"
        f"assert main(['verify', {str(stores['draws'])!r}]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})


def test_what_cannot_be_compared_is_refused_in_words(
    stores: dict[str, Path], tokens: Path, tmp_path: Path, long_tokens: Path, llama: Path
) -> None:
    with pytest.raises(UserError, match="was made of the tokens store with digest"):
        held(stores["draws"], llama, tokens=tokens)
    shutil.copytree(stores["draws"], tmp_path / "alone")
    with pytest.raises(UserError, match="none of that digest stands beside it; name it with --tokens"):
        held(tmp_path / "alone", llama)
    with pytest.raises(UserError, match="a store of tokens, which no teacher has made"):
        held(long_tokens, llama)
    foreign = replace(read_spec(stores["prefix"]), teacher={"id": "x", "engine": "import"})
    StoreWriter.create(tmp_path / "foreign", foreign)
    with pytest.raises(UserError, match="was not made by dump or score"):
        held(tmp_path / "foreign", llama, tokens=long_tokens)
    with pytest.raises(ValueError, match="one checkpoint"):
        held(stores["draws"], llama, teacher={"checkpoints": ["a"]})


def test_rows_left_out_masked_rows_and_a_store_that_is_not_complete(tmp_path: Path, llama: Path) -> None:
    masks = [np.arange(16) % 3 > 0, None, np.zeros(16, bool), None, None, np.arange(16) > 12]
    tokens = make_tokens(tmp_path / "tokens", [(16,), (3, 13), (16,), (1, 15), (5, 11), (16,)], masks=masks)
    dump(dump_config(tokens, tmp_path / "few", llama, **PREFIX), only_rows=lambda config: np.array([0, 2, 3, 5]))
    report = held(tmp_path / "few", llama)
    assert report.ok and [row.row for row in report.rows] == [0, 3, 5] and report.silent == (2,)
    assert [row.positions for row in report.rows] == [10, 14, 3]
    dump(dump_config(tokens, tmp_path / "part", llama, worker=0, num_workers=2, **PREFIX))
    part = held(tmp_path / "part", llama)
    assert part.ok and [row.row for row in part.rows] == [0, 1] and "2 of the first 2 rows, which are" in part.format()


def test_rows_refused_at_the_dump_or_now(
    stores: dict[str, Path], long_tokens: Path, tmp_path: Path, llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokens: Any = StoreReader(long_tokens)
    token = int(tokens.row(5).tokens[4])
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
    model.save_pretrained(tmp_path / "ill")
    hit = [row.row for row in tokens.rows(range(24)) if (row.tokens[:-1][row.has_target()[:-1]] == token).any()]
    apart = {"documents": "apart"}  # the probe of packing would refuse the model
    report = held(stores["prefix"], tmp_path / "ill", teacher=apart)
    assert 0 < len(hit) < 24 and [row for row, _ in report.refused] == hit and not report.ok
    assert f"row {hit[0]}: the live teacher gives none" in report.format()
    dump(dump_config(long_tokens, tmp_path / "store", tmp_path / "ill", max_rejected_fraction=1.0, **apart, **PREFIX))
    report = held(tmp_path / "store", llama, tokens=long_tokens)
    assert report.ok and list(report.silent) == hit and "weights_digest" in report.differing


@pytest.mark.slow
def test_a_mixture_asks_for_its_other_members(tmp_path: Path, long_tokens: Path, llama: Path) -> None:
    second = save_llama(tmp_path / "second", seed=2)
    teacher = {"model": llama, "ensemble": [{"model": second, "weight": 2.0}], "check_tokenizer": False}
    store = tmp_path / "mixed"
    dump(DumpConfig(tokens=long_tokens, output=store, teacher=teacher))
    with pytest.raises(UserError, match=r"a mixture of 2 teachers .*teacher\.ensemble=\[{model: second, weight: 2.0}"):
        held(store, llama, tokens=long_tokens)
    assert held(store, llama, tokens=long_tokens, teacher={"ensemble": teacher["ensemble"]}).ok
    other = held(store, llama, tokens=long_tokens, teacher={"ensemble": [{"model": second, "weight": 1.0}]})
    assert not other.ok and "ensemble" in other.differing


def test_the_control_excuses_what_the_batch_does_and_no_more(
    tmp_path: Path, long_tokens: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose figures depend on how many positions a batch has, as a GPU's do, only more."""

    def by_batch(topk: TopK) -> TopK:
        lower = 0.02 + 0.1 * (len(topk.logprobs) % 7) / 7
        kept = topk.logprobs - lower
        tail = torch.log1p(-kept.double().exp().sum(1)).float()
        return replace(topk, logprobs=kept, log_tail=tail, label_logprob=topk.label_logprob - lower)

    monkeypatch.setitem(ENGINES, "torch_topk", topk_engine.ENTRY)
    monkeypatch.setattr(topk_engine, "SPOIL", [by_batch])
    options = {"selection": {"mode": "top_k", "k": 8}, "engine": "torch_topk"}
    dump(dump_config(long_tokens, tmp_path / "store", llama, batch_rows=3, **options))
    noisy = held(tmp_path / "store", llama, tokens=long_tokens)
    entries = noisy.verdict.overall["entries"]
    assert noisy.ok and entries.bound is not None and entries.bound.because == "control", noisy.format()
    assert "as near as the live teacher is to itself" in noisy.words
    # The same store against a calm engine: nothing excuses it.
    calm = held(tmp_path / "store", llama, tokens=long_tokens, teacher={"engine": "hf"})
    assert not calm.ok and calm.differing["engine"] == ("torch_topk", "hf")


def test_rounding_on_another_machine_is_no_excuse_unless_it_is_said(stores: dict[str, Path], llama: Path) -> None:
    """Attention that adds in another order stands for other hardware."""
    elsewhere = {"attention": "eager"}
    strict = held(stores["prefix_in_bfloat16"], llama, teacher=elsewhere)
    assert not strict.ok and strict.within_rounding and "say --other-machine" in strict.words
    told = held(stores["prefix_in_bfloat16"], llama, teacher=elsewhere, other_machine=True)
    assert told.ok and told.words.endswith("within what rounding makes on other hardware")
    # In float32 there is next to nothing to excuse.
    assert held(stores["prefix"], llama, teacher=elsewhere).ok
    coarse = held(stores["prefix"], llama, teacher={"dtype": "bfloat16"})
    assert not coarse.ok and coarse.differing["dtype"] == ("float32", "bfloat16")


def test_rows_are_spread_over_the_store(stores: dict[str, Path]) -> None:
    store = StoreReader(stores["draws"])
    for seed in range(3):
        rows = sampled_rows(store, 6, seed=seed)
        assert (rows // 4).tolist() == list(range(6))
    assert sampled_rows(store, 6, seed=0).tolist() != sampled_rows(store, 6, seed=1).tolist()
    assert sampled_rows(store, 40, seed=0).tolist() == list(range(24))


def test_distances_of_known_distributions(long_tokens: Path, tmp_path: Path, llama: Path) -> None:
    """Total variation and KL against dense ones where both name the same ids; prefixes of one distribution are near."""
    dump(dump_config(long_tokens, tmp_path / "store", llama, selection={"mode": "top_k", "k": 8}))
    row: Any = StoreReader(tmp_path / "store").row(0)
    places = np.arange(31)
    lower = np.array(row.targets.logprobs) - 0.25
    tail = np.log1p(-np.add.reduceat(np.exp(lower.astype(np.float64)), row.targets.offsets[:31]))
    other = replace(row, targets=row.targets.__class__(
        offsets=row.targets.offsets,
        columns={**row.targets.columns, "logprobs": lower, "log_tail": np.append(tail, 0.0)},
        num_draws=None,
    ))  # fmt: skip
    pair = Pair(row, other, places)
    for token in places:
        span = slice(row.targets.offsets[token], row.targets.offsets[token + 1])
        p = np.exp(np.append(row.targets.logprobs[span], row.targets.log_tail[token]).astype(np.float64))
        q = np.exp(np.append(lower[span], tail[token]).astype(np.float64))
        assert MEASURES["entries"].of(pair)[token] == pytest.approx(np.abs(p - q).sum() / 2, rel=1e-6)  # type: ignore[index]
        assert MEASURES["kl"].of(pair)[token] == pytest.approx((p * np.log(p / q) - p + q).sum(), abs=1e-6)  # type: ignore[index]
    # The last entry of each token in the tail instead: a prefix that ends one earlier.
    keep = np.ones(row.targets.num_entries, bool)
    keep[row.targets.offsets[1:32] - 1] = False
    last = row.targets.logprobs[~keep].astype(np.float64)
    short = row.targets.keep_entries(keep)
    whole = np.append(np.logaddexp(row.targets.log_tail[:31].astype(np.float64), last), 0.0)
    shorter = replace(row, targets=short.__class__(
        offsets=short.offsets, columns={**short.columns, "log_tail": whole}, num_draws=None
    ))  # fmt: skip
    assert np.abs(MEASURES["entries"].of(Pair(row, shorter, places))).max() < 1e-6  # type: ignore[arg-type]
    # Other ids with the same masses: far, although neither names what the other does.
    swapped = replace(row, targets=row.targets.each(lambda name, a: (a + 32) % 64 if name == "ids" else a))
    assert MEASURES["entries"].of(Pair(row, swapped, places)).min() > 0.05  # type: ignore[union-attr]


def verify_as_group(store: str, model: str, engine: dict[str, Any]) -> bool | None:
    """In a process of its own: whether the store agrees; None of a rank that only held a part of the teacher."""
    teacher = {"model": model, **CHECK, **engine}
    report = hold_against_teacher(store, AgainstTeacherConfig(teacher=teacher, rows=6))
    return None if report is None else report.ok


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("engine", "told"), [({"engine": "zero3"}, [True, True]), ({"tensor_parallel": 2}, [True, None])]
)
def test_ranks_that_hold_one_teacher_run_the_rows_together(
    stores: dict[str, Path], llama: Path, changed: Path, engine: dict[str, Any], told: list[bool | None]
) -> None:
    arguments = str(stores["prefix"]), str(llama), engine
    assert run_ranks(verify_as_group, *arguments, world=2) == told
    arguments = str(stores["prefix"]), str(changed), engine
    assert run_ranks(verify_as_group, *arguments, world=2) == [told[0] and False, told[1] and False]


@pytest.mark.slow
def test_one_element_of_a_real_teacher_is_seen(shared_data: Path, tmp_path: Path) -> None:
    """Text and a model that are not made for the test; in float32, over 8 rows."""
    from safetensors.torch import load_file, save_file

    from potstill.teacher_dump import PrepareConfig, prepare

    teacher, text = shared_data / "models" / "teacher-7m", tmp_path / "text.jsonl"
    with lzma.open(shared_data / "novels" / "valid.jsonl.xz", "rt", encoding="utf-8") as stream:
        text.write_text("".join(itertools.islice(stream, 40)), encoding="utf-8")
    prepare(PrepareConfig(input=[str(text)], output=tmp_path, tokenizer=str(teacher), row_length=256))
    tokens, store = tmp_path / "train", tmp_path / "targets"
    few = np.arange(0, StoreReader(tokens).num_rows, 5)
    dump(dump_config(tokens, store, teacher, dtype="float32", **PREFIX), only_rows=lambda config: few)
    assert held(store, teacher, rows=8).ok
    shutil.copytree(teacher, tmp_path / "changed")
    weights = load_file(teacher / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][5, 7] += 1.0
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    report = held(store, tmp_path / "changed", rows=8)
    assert not report.ok and report.verdict.overall["kl"].stored < 1e-3, report.format()
