"""Batches made ahead: finished in the loader's threads, handed out in order, and no step that waits for the device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.storage import CorruptError, Loader
from potstill.student_train.data.batch import collate, map_tensors
from potstill.student_train.data.step_batch import BatchFinisher, StepBatch
from potstill.student_train.data.stores import build_plan, open_stores
from potstill.student_train.run.device_batches import DeviceBatches
from potstill.student_train.run.late_read import LateRead
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.host_reads import host_reads

CPU = torch.device("cpu")


def tensors(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a micro-batch by its path, found without `map_tensors`."""
    found: dict[str, torch.Tensor] = {}
    parts = value if isinstance(value, dict) else {field.name: getattr(value, field.name) for field in fields(value)}
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            found[str(name)] = part
        elif isinstance(part, dict) or is_dataclass(part):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors(part).items()}
    return found


def open_loader(stores: dict[str, Path], run: Path, **changes: Any) -> tuple[Loader[StepBatch], Any]:
    config = workers.config_of(tiny.config_tree(stores, run, **changes))
    opened = open_stores(config)
    plan = build_plan(config, opened)
    finisher = BatchFinisher(
        plan=plan,
        micro_batch_rows=config.data.micro_batch_rows,
        row_length=opened.tokens.spec.row_length,
        terms=(),
        device=CPU,
    )
    return Loader(plan, opened.tokens, dict(opened.joined), finish=finisher), plan


SELECTED = {"curriculum": [{"targets": "teacher", "tokens": {"policy": "random", "share": 0.5}}]}


FALLING = {"objective": {"alpha": {"kind": "linear", "start": 0.9, "end": 0.1}}}  # each step has settings of its own


@pytest.mark.parametrize("changes", [{}, SELECTED, FALLING], ids=["all", "selected", "falling"])
def test_the_threads_finish_what_the_driving_thread_would(stores, tmp_path: Path, changes: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    loader, plan = open_loader(stores, tmp_path / "run", **changes)
    config = workers.config_of(tiny.config_tree(stores, tmp_path / "run", **changes))
    opened = open_stores(config)
    with loader, Loader(plan, opened.tokens, dict(opened.joined)) as plain:
        for number in range(3):
            batch, loaded = next(loader), next(plain)
            micro_rows, length = config.data.micro_batch_rows, opened.tokens.spec.row_length
            expected = collate(loaded, plan.objective(number), micro_batch_rows=micro_rows, row_length=length)
            assert (batch.batch, batch.objective, len(batch.micros)) == (number, plan.objective(number), len(expected))
            assert batch.weight_sum == sum(micro.weight_sum for micro in expected) > 0
            for micro, other in zip(batch.micros, expected, strict=True):
                found, wanted = tensors(micro), tensors(other)
                assert found.keys() == wanted.keys() and "targets.columns.ids" in found
                assert all(torch.equal(found[name], wanted[name]) for name in found)
    now = torch.get_num_threads()
    torch.set_num_threads(before)
    assert now == 2, "the loader's threads have a number of their own"


def test_every_tensor_of_a_micro_batch_is_mapped(stores, tmp_path: Path) -> None:
    loader, _ = open_loader(stores, tmp_path / "run", **SELECTED, objective={"temperature": 2.0})
    with loader:
        [micro, *_] = next(loader).micros
    seen: list[int] = []
    copy = map_tensors(micro, lambda tensor: seen.append(tensor.data_ptr()) or tensor.clone())
    before, after = tensors(micro), tensors(copy)
    columns = {f"targets.columns.{name}" for name in ("ids", "logprobs", "log_tail", "log_tail_at.2.0")}
    assert {"token_weights", "targets.offsets", *columns} <= before.keys()
    assert sorted(seen) == sorted(tensor.data_ptr() for tensor in before.values())
    assert all(after[name].data_ptr() != before[name].data_ptr() for name in before)
    assert (copy.weight_sum, copy.num_active) == (micro.weight_sum, micro.num_active)


def made(batches: Iterator[StepBatch | Exception], taken: list[int]) -> Iterator[StepBatch]:
    """The loader's end of the line: notes what was taken; an error in place of a batch is raised."""
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        taken.append(batch.batch)
        yield batch


def test_batches_are_taken_one_ahead_and_never_beyond_the_end(stores, tmp_path: Path) -> None:
    loader, _ = open_loader(stores, tmp_path / "run", data={"micro_batch_rows": 1})
    taken: list[int] = []
    with loader:
        real = [next(loader) for _ in range(3)]
    batches = DeviceBatches(made(iter(real), taken), device=CPU, end=3)
    order = []
    for number in range(3):
        batch = next(batches)
        assert batch is real[number]
        for place, micro in enumerate(batches.on_device(batch)):
            assert micro is batch.micros[place], "on a CPU nothing is copied"
            is_last = place + 1 == len(batch.micros)
            # Only when nothing but the last micro-batch is left to compute on is the next batch asked for.
            assert taken == list(range(min(number + 1 + is_last, 3)))
            order.append((batch.batch, place))
    assert order == [(number, place) for number in range(3) for place in range(len(real[0].micros))]
    assert len(real[0].micros) > 1 and batches.wait_seconds > 0


def test_what_the_loader_raises_ahead_is_raised_in_its_turn(stores, tmp_path: Path) -> None:
    loader, _ = open_loader(stores, tmp_path / "run")
    with loader:
        real = [next(loader) for _ in range(2)]
    damage = CorruptError("row 7 cannot be read")
    batches = DeviceBatches(made(iter([*real, damage]), []), device=CPU, end=9)
    for number in range(2):
        batch = next(batches)
        assert batch.batch == number and len(list(batches.on_device(batch))) == len(batch.micros)
    with pytest.raises(CorruptError, match="row 7 cannot be read"):
        next(batches)


def test_a_late_read_gives_the_numbers_of_its_start() -> None:
    read = LateRead(3, CPU)
    values = torch.tensor([1.0, float("nan"), 1e300], dtype=torch.float64)
    read.start(values)
    values.zero_()  # which the device may do with its memory as soon as the copy is enqueued
    first, second, third = read.finish()
    assert (first, third) == (1.0, 1e300) and second != second
    read.start(values)
    assert read.finish() == [0.0, 0.0, 0.0]


def test_no_step_makes_the_host_wait(stores, tmp_path: Path) -> None:
    tree = tiny.config_tree(stores, tmp_path / "run", logging={"every_steps": 4}, spike_policy="warn")
    tree["run"] |= {"max_steps": 12, "self_check": False}
    tree["checkpoint"], tree["eval"] = {"every_steps": None}, {"every_steps": None}
    [seen] = run_ranks(host_reads, tree, world=1)
    values = [(step, what) for step, what in seen if what not in ("ask", "read", "forward")]
    # Lines of metrics are due behind the steps 4, 8 and 12, and the run ends with an evaluation and a save.
    assert {step for step, _ in values} == {4, 8, 12}, values
    assert any(what == "metrics.py tolist" for _, what in values), "a line of metrics brings its sums to the host"
    # Without a line the answer to the question before a step is read when the next step begins: behind the forward.
    for step in (2, 3, 6, 7, 10, 11):
        happened = [what for at, what in seen if at == step]
        assert happened[:2] == ["read", "ask"] and set(happened[2:]) == {"forward"}, happened
    asked = [step for step, what in seen if what == "ask"]
    assert asked[:2] == [0, 0] and set(range(12)) <= set(asked), "before the first step the ranks are asked at once"


def test_the_loaders_threads_end_with_the_run(stores, tmp_path: Path) -> None:
    loader, _ = open_loader(stores, tmp_path / "run")
    with loader:
        next(loader)
        names = [thread.name for thread in threading.enumerate() if thread.name.startswith("potstill-loader")]
        assert len(names) == 2
    left = [thread for thread in threading.enumerate() if thread.name.startswith("potstill-loader")]
    for thread in left:
        thread.join(20)
    assert not [thread.name for thread in left if thread.is_alive()]
