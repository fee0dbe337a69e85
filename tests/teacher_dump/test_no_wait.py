"""From a teacher's output to copies on their way: nothing on that way waits for the GPU, and all is on its device.

Without a GPU: fake tensors have a device and no values, so whatever would wait for one raises. Pinned memory, events
and the current device are stood in for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from potstill.kernels import teacher_triton
from potstill.teacher_dump import on_device
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.engines import hf
from potstill.teacher_dump.engines.base import FinishedTopK, Head, HiddenStates, Logits
from tests.kernels.current_device import Current

DEVICE = torch.device("cuda", 1)
M, D, V = 9, 16, 500


class Event:
    """Notes on which device it is recorded."""

    current: Current
    recorded: list[int] = []  # noqa: RUF012

    def record(self) -> None:
        self.recorded.append(self.current.index)


class Engine:
    """Gives the output that it was made with."""

    name, device, dtype, vocab_size = "fake", DEVICE, "bfloat16", V

    def __init__(self, output: Any) -> None:
        self._output = output

    def idle_pass(self) -> None:
        """No group."""

    def forward(self, batch: TeacherBatch) -> Any:
        return self._output


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[Current]:
    state = Current()
    state.stands_in(monkeypatch)
    for name in ("tile_kernel", "select_kernel"):
        monkeypatch.setattr(teacher_triton, name, state.kernel(name))
    monkeypatch.setattr(Event, "current", state, raising=False)
    monkeypatch.setattr(Event, "recorded", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(on_device, "to_device", lambda array, device: torch.empty(array.shape, device=device).long())
    monkeypatch.setattr(on_device, "pinned_like", lambda value: torch.empty(value.shape, dtype=value.dtype))
    teacher_triton.inverse_temperatures.cache_clear()
    yield state
    teacher_triton.inverse_temperatures.cache_clear()


def outputs() -> dict[str, Any]:
    place: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    head = Head(torch.empty(V, D, **place), torch.empty(V, **place))
    return {"hidden": HiddenStates(torch.empty(M, D, **place), head), "logits": Logits(torch.empty(M, V, **place))}


@pytest.mark.parametrize("kind", ["hidden", "logits", "finished"])
def test_nothing_waits_between_the_model_and_the_copies(current: Current, kind: str) -> None:
    numbers = np.zeros(M, dtype=np.int64)
    batch = TeacherBatch((), numbers, numbers, numbers, numbers)
    with FakeTensorMode():
        options: dict[str, Any] = {"k": 4, "vocab_size": V - 3, "temperatures": (2.0,), "chunk_bytes": None}
        if kind == "finished":
            found = on_device.batch_topk(Engine(outputs()["logits"]), batch, **options).result
            options["k"] = 4
            on_its_way = on_device.batch_topk(Engine(FinishedTopK(on_gpu(found))), batch, **options)
        else:
            on_its_way = on_device.batch_topk(Engine(outputs()[kind]), batch, **options)
    assert on_its_way.result.ids.device.type == "cpu" and list(on_its_way.result.ids.shape) == [M, 4]
    assert {where for _, where in current.launches} == {1}
    assert set(Event.recorded) == {1} and current.index == 0


def on_gpu(topk: Any) -> Any:
    """The same shapes on the device."""

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return torch.empty(value.shape, dtype=value.dtype, device=DEVICE)

    return type(topk)(**{name: moved(value) for name, value in vars(topk).items()})


def test_a_worker_makes_its_gpu_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    hf.make_current(torch.device("cpu"))
    hf.make_current(torch.device("cuda"))  # without an index torch refuses to set it
    hf.make_current(DEVICE)
    assert made == [DEVICE]
