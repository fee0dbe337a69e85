"""The planner: costs counted from shapes, sizes near those measured, and a calibrated plan near what a dump does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.common.options import read_config
from potstill.launch.calibrate import calibrate, steady_rate
from potstill.launch.plan import PLAN, PlanConfig, compare, make_plan, model_costs, store_bytes_per_token, with_rows
from potstill.launch.plan_limits import LOADER_TOKENS, host_tokens_per_second
from potstill.launch.plan_units import (
    LEAST_UNITS_PER_WORKER,
    MOST_FILE_BYTES,
    MOST_UNIT_SECONDS,
    Requests,
    UnitPlan,
    dump_requests,
    epoch_requests,
    puts_of_file,
    recommend_unit,
)
from potstill.storage import StoreReader, StoreWriter, seal_store, store_status
from potstill.teacher_dump.config import DumpConfig, SelectionConfig
from tests.teacher_dump.tiny import make_tokens, save_llama

RESULTS = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"


def test_costs_are_counted_from_shapes(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    costs = model_costs(str(folder), row_length=16)
    per_layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert costs.parameters == 2 * per_layer + 2 * 64 * 32 + 32
    assert costs.active_parameters == costs.parameters
    assert costs.forward_flops == 2 * (2 * per_layer + 64 * 32 + 32) + 2 * 4 * 32 * 8
    tied = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    assert model_costs(str(tied), row_length=16).parameters == costs.parameters - 64 * 32


def test_of_a_mixture_of_experts_a_token_meets_a_share(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = MixtralConfig(
        **shape, num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2
    )
    config.save_pretrained(tmp_path)
    costs = model_costs(str(tmp_path), row_length=16)
    experts = 2 * 8 * 3 * 32 * 48
    assert costs.parameters - costs.active_parameters == pytest.approx(experts * 6 / 8)


# Bytes per token, entropy and selection of stores that were measured with the real codec.
MEASURED = [
    ({"mode": "top_k", "k": 64}, 128_256, 2.1, 134.0),
    ({"mode": "top_k", "k": 32}, 32_000, 2.1, 69.0),
    ({"mode": "top_p_k", "k": 100, "p": 0.95}, 128_256, 2.1, 90.0),
    ({"mode": "top_p_k", "k": 100, "p": 0.95}, 128_256, 1.38, 43.5),
    ({"mode": "top_p_k", "k": 100, "p": 0.90}, 128_256, 2.1, 67.5),
    ({"mode": "sample", "num_draws": 50}, 128_256, 2.1, 28.0),
    ({"mode": "sample", "num_draws": 12}, 128_256, 2.1, 13.4),
    ({"mode": "sample", "num_draws": 50, "power": 0.5}, 8_000, 1.875, 71.6),
    ({"mode": "sample", "num_draws": 50, "power": 0.8}, 8_000, 1.875, 41.1),
    ({"mode": "sample", "num_draws": 50, "power": 1.2}, 8_000, 1.875, 19.5),
]


@pytest.mark.parametrize(("selection", "vocab_size", "entropy", "expected"), MEASURED)
def test_sizes_are_near_those_measured(selection: Any, vocab_size: int, entropy: float, expected: float) -> None:
    chosen = SelectionConfig(**selection)
    found = store_bytes_per_token(chosen, vocab_size=vocab_size, entropy=entropy, num_temperatures=0)
    assert found == pytest.approx(expected, rel=0.15)


def middle_model(folder: Path) -> Path:
    """A configuration of 1.2 G parameters: its forward pass, and not the host, ends the speed of a dump."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    LlamaConfig(**shape, vocab_size=32_000, max_position_embeddings=8192).save_pretrained(folder)
    return folder


def test_a_plan_scales_and_warns(tmp_path: Path) -> None:
    folder = middle_model(tmp_path / "model")
    one = make_plan(PlanConfig(teacher=folder, tokens=10**9, student=folder))
    eight = make_plan(PlanConfig(teacher=folder, tokens=10**9, student=folder, num_gpus=8))
    assert eight.dump_seconds - eight.startup_seconds == pytest.approx((one.dump_seconds - one.startup_seconds) / 8)
    assert eight.dump_worker_seconds == pytest.approx(one.dump_worker_seconds)
    assert one.student_seconds == pytest.approx(one.dump_worker_seconds * 3 * 0.45 / 0.4)
    assert "forward pass" in one.dump_limit and "step" in str(one.student_limit)
    assert "store" in one.format() and not one.notes
    from transformers import LlamaConfig

    large = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    large.save_pretrained(tmp_path / "large")
    text = make_plan(PlanConfig(teacher=tmp_path / "large", tokens=10**9)).format()
    assert "engine zero3" in text and "reads at most 2048 positions, so dump refuses rows of 4096" in text
    with pytest.raises(UserError, match=r"gpu 'abacus' is not known; use one of .* cpu"):
        make_plan(PlanConfig(teacher=folder, tokens=1, gpu="abacus"))
    with pytest.raises(UserError, match="this folder does not exist"):
        make_plan(PlanConfig(teacher=tmp_path / "nothing", tokens=1))


def test_a_small_teacher_is_not_faster_than_the_host(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    plan = make_plan(PlanConfig(teacher=folder, student=folder, tokens=20_000_000, row_length=64))
    measured = json.loads((RESULTS / "dump_cpu.json").read_text())["encode_tokens_per_core_s"]
    assert host_tokens_per_second(64, threads=1) == measured  # the figure it stands on, at 64 entries a token
    rate = 20_000_000 / plan.dump_worker_seconds
    assert rate <= host_tokens_per_second(1, threads=2) and "selecting and encoding on the host" in plan.dump_limit
    assert plan.dump_seconds > 20_000_000 / rate > 0 and plan.startup_seconds >= 10
    assert plan.student_seconds is not None and 20_000_000 / plan.student_seconds == pytest.approx(LOADER_TOKENS)
    assert f'"warm_tokens_per_s": {round(LOADER_TOKENS)}' in (RESULTS / "storage_loader.txt").read_text()
    assert "reading rows" in str(plan.student_limit)
    assert " 0.0s" not in plan.format() and "hours      0\n" not in plan.format()
    # More entries cost the host more.
    wide = make_plan(PlanConfig(teacher=folder, tokens=10**6, row_length=64, selection={"mode": "top_k", "k": 64}))
    narrow = make_plan(PlanConfig(teacher=folder, tokens=10**6, row_length=64, selection={"mode": "top_k", "k": 8}))
    assert wide.dump_worker_seconds > 2 * narrow.dump_worker_seconds


@pytest.mark.parametrize("name", ["cpu", "none"])
def test_a_machine_without_a_gpu_is_measured(name: str, tmp_path: Path) -> None:
    folder = middle_model(tmp_path / "model")
    plan = make_plan(PlanConfig(teacher=folder, tokens=10**6, gpu=name, student=folder))
    fast = make_plan(PlanConfig(teacher=folder, tokens=10**6))
    assert plan.dump_worker_seconds > 10 * fast.dump_worker_seconds
    assert "machine hours" in plan.format() and "GPU" not in plan.format()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("100B", 10**11), ("100e9", 10**11), ("20M", 2 * 10**7), ("1.5T", 15 * 10**11), ("3k", 3000), ("7_000", 7000)],
)
def test_tokens_are_a_number_as_people_write_it(text: str, tokens: int) -> None:
    assert PlanConfig(teacher="x", tokens=text, student_tokens=text).tokens == tokens
    parser = argparse.ArgumentParser()
    PLAN.add_arguments(parser)
    parsed = parser.parse_args(["--teacher", "x", "--tokens", text, "--student-tokens", text])
    config = read_config(PlanConfig, parsed)
    assert (config.tokens, config.student_tokens) == (tokens, tokens)


@pytest.mark.parametrize("wrong", ["0", 0, -5, "1.5", 1.5])
def test_tokens_are_a_whole_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a whole number of tokens|neither|no number") as caught:
        with_rows(PlanConfig(teacher="x", tokens=wrong), None)
    assert str(wrong) in str(caught.value)
    with pytest.raises(ValueError, match="is no number"):
        PlanConfig(teacher="x", tokens=1, student_tokens="many")


def test_tokens_may_be_a_store(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens", [(16,), (9, 7)] * 4)
    folder = save_llama(tmp_path / "model")
    config = with_rows(PlanConfig(teacher=folder, tokens=str(tokens)), None)
    assert (config.tokens, config.row_length) == (StoreReader(tokens).num_tokens, 16)
    assert make_plan(PlanConfig(teacher=folder, tokens=str(tokens))).dump_bytes > 0
    assert with_rows(PlanConfig(teacher=folder), str(tokens)) == config
    with pytest.raises(UserError, match="have 16 tokens; leave it out"):
        with_rows(PlanConfig(teacher=folder, tokens=str(tokens), row_length=32), None)
    with pytest.raises(UserError, match=r"neither a number \(100000000, .*\) nor a tokens store: .*did you mean"):
        with_rows(PlanConfig(teacher=folder, tokens=str(tmp_path / "tokns")), None)


def test_a_calibrated_plan_is_near_the_dump(tmp_path: Path) -> None:
    """Two workers at once, as the command starts them. Of time only the arithmetic is checked here."""
    from potstill.teacher_dump import dump

    model = save_llama(tmp_path / "model")
    tokens = make_tokens(tmp_path / "tokens", [(16,), (9, 7)] * 200, rows_per_unit=50)
    teacher = {"model": model, "check_tokenizer": False}
    config = DumpConfig(tokens=tokens, output=tmp_path / "out", teacher=teacher, selection={"mode": "top_k", "k": 8})
    (tmp_path / "calibration").mkdir()
    measured = calibrate(config, num_rows=400, folder=tmp_path / "calibration", num_workers=2)
    assert not (tmp_path / "out").exists()
    sample = store_status(tmp_path / "calibration" / "targets")
    assert sample.num_units == 8 and sample.rows_committed == 400 and measured.num_workers == 2
    # All units but the first of either worker make the rate.
    output = tmp_path / "calibration" / "targets"
    records = StoreWriter.create(output, StoreReader(output).spec).committed()
    later = [record for unit, record in records.items() if unit > 1]
    tokens_later = sum(sum(record.num_tokens) for record in later)
    assert measured.tokens_per_second == pytest.approx(tokens_later / sum(r.extra["seconds"] for r in later))
    assert steady_rate({0: records[0]}, 2) == pytest.approx(sum(records[0].num_tokens) / records[0].extra["seconds"])

    for worker in (1, 0):
        dump(config, worker=worker, num_workers=2)
    seal_store(tmp_path / "out")
    reader, status = StoreReader(tmp_path / "out"), store_status(tmp_path / "out")
    plan = make_plan(PlanConfig(teacher=model, tokens=reader.num_tokens, num_gpus=2), measured=measured)
    assert reader.manifest is not None and status.worker_seconds
    assert plan.dump_bytes == pytest.approx(reader.manifest.num_bytes, rel=0.1)
    assert plan.dump_worker_seconds == pytest.approx(reader.num_tokens / measured.tokens_per_second)
    assert plan.dump_seconds == pytest.approx(plan.dump_worker_seconds / 2 + measured.startup_seconds)
    rows = compare(plan, str(tmp_path / "out"))
    assert [row[0] for row in rows] == ["bytes per token", "store, bytes", "worker seconds", "wall time"]
    assert rows[2][2] == f"{status.worker_seconds:,.1f}"
    assert rows[2][3] == f"{status.worker_seconds / plan.dump_worker_seconds:.3f}"


def test_a_calibration_that_fails_says_why(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 8)
    config = DumpConfig(tokens=tokens, output=tmp_path / "out", teacher={"model": model, "attention": "no_such"})
    with pytest.raises(UserError, match=r"worker 0 ended with code 1: (.|\n)*no_such"):
        calibrate(config, num_rows=8, folder=tmp_path)


@pytest.mark.slow
def test_the_command_calibrates_and_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from potstill.teacher_dump import dump

    model = save_llama(tmp_path / "model")
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 40)
    teacher = {"model": model, "check_tokenizer": False}
    dump(DumpConfig(tokens=tokens, output=tmp_path / "out", teacher=teacher))
    parser = argparse.ArgumentParser()
    PLAN.add_arguments(parser)
    command = ["--teacher", str(model), "--student", str(model), "--row-length", "16"]
    measure = ["--calibrate", str(tokens), "--beside", str(tmp_path / "out")]
    assert PLAN.run(parser.parse_args(command + measure)) == 0
    printed = capsys.readouterr().out
    assert "measured on this machine" in printed and "actual / planned" in printed and "student, GPU hours" in printed
    # The plan is for the whole store, and the calibration read all of it: the same bytes but for the ids of its run.
    planned, actual = printed.split("store, bytes")[1].split()[:2]
    assert int(planned.replace(",", "")) == pytest.approx(int(actual.replace(",", "")), rel=0.02)
    with pytest.raises(UserError, match="--tokens"):
        PLAN.run(parser.parse_args(command))


def unit_for(tokens: int, **changed: Any) -> UnitPlan:
    asked = {"row_length": 4096, "bytes_per_token": 90.0, "tokens_per_second": 30_000.0, "num_workers": 64} | changed
    return recommend_unit(num_tokens=tokens, **asked)


@pytest.mark.parametrize(
    ("tokens", "changed", "rows", "why"),
    [
        (10**11, {}, 2048, "a file of 1.00 GB"),
        (10**11, {"tokens_per_second": 3_000.0}, 256, "10m00s of work"),
        (10**9, {}, 256, "8 units a worker"),
        (10**11, {"row_length": 1024}, 8192, "a file of 1.00 GB"),
        (
            10**15,
            {"row_length": 64, "bytes_per_token": 1e-3, "tokens_per_second": 1e9},
            1 << 20,
            "the most that prepare",
        ),
        (10, {}, 1, "8 units a worker"),
    ],
)
def test_a_unit_is_the_largest_that_keeps_each_bound(tokens: int, changed: dict[str, Any], rows: int, why: str) -> None:
    unit = unit_for(tokens, **changed)
    assert unit.rows == rows and why in unit.why
    assert unit.num_units == -(-unit.num_rows // rows)
    if rows > 1:
        assert unit.file_bytes <= MOST_FILE_BYTES and unit.seconds <= MOST_UNIT_SECONDS
        assert unit.num_units >= LEAST_UNITS_PER_WORKER * 64


def test_units_of_a_hundred_billion_tokens_by_the_default_and_as_recommended() -> None:
    """95,368 units and twice as many files are what 256 rows make (the default of prepare)."""
    unit = unit_for(10**11, tokens_per_second=3_000.0)
    assert (unit.rows, unit.num_units, unit.num_files) == (256, 95_368, 190_739)
    assert unit_for(10**11).num_units == 11_921


def test_requests_are_counted_by_hand() -> None:
    unit = unit_for(4096 * 1000, num_workers=1)
    assert (unit.rows, unit.num_units, unit.num_files) == (64, 16, 35)
    parts = -(-64 * 4096 * 90 // (8 << 20))
    assert puts_of_file(unit.file_bytes) == parts + 2 and puts_of_file(8 << 20) == 1
    # Data and record of each unit; of the seal a list, index, manifest; run.json. A batch holds two rows of 4096.
    assert dump_requests(unit, num_workers=3) == Requests(puts=16 * (parts + 3) + 3, lists=7, gets=32 + 500)
    assert epoch_requests(unit) == Requests(gets=2000)
    requests = Requests(puts=3000, lists=1000, gets=10_000)
    assert requests.price(per_1000_puts=0.005, per_1000_gets=0.0004) == pytest.approx(4 * 0.005 + 10 * 0.0004)
    assert requests.format(per_1000_puts=5.0, per_1000_gets=0.0) == "3,000 puts, 1,000 lists, 10,000 gets: 20.00 USD"


def test_the_plan_says_what_unit_to_prepare_and_what_requests_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_llama(tmp_path / "model"))
    plan = make_plan(PlanConfig(teacher=folder, tokens="100B", num_gpus=8))
    assert plan.unit is not None
    shown = plan.format()
    assert f"prepare --rows-per-unit {plan.unit.rows}" in shown and f"{plan.unit.num_files:,} files" in shown
    assert plan.unit.why in shown and shown.count(" USD") == 2
    free = make_plan(PlanConfig(teacher=folder, tokens="100B", price_per_1000_puts=0, price_per_1000_gets=0))
    assert free.format().count(": 0.00 USD") == 2
    # What prepare would make of the advice, and what stands there already.
    tokens = make_tokens(tmp_path / "tokens", [(16,)] * 40, rows_per_unit=2)
    parser = argparse.ArgumentParser()
    PLAN.add_arguments(parser)
    assert PLAN.run(parser.parse_args(["--teacher", folder, "--tokens", str(tokens)])) == 0
    printed = capsys.readouterr().out
    assert "prepare --rows-per-unit 4" in printed and "has 2 rows a unit, so 20 units and 43 files" in printed
    tokens = make_tokens(tmp_path / "advised", [(16,)] * 40, rows_per_unit=4)
    assert PLAN.run(parser.parse_args(["--teacher", folder, "--tokens", str(tokens)])) == 0
    assert "rows a unit, so" not in capsys.readouterr().out
