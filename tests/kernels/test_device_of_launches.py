"""Two GPUs in one process, without one: every launch on the device of its tensors, and no value is waited for.

Fake tensors have a device and a shape, and no values: an operation that would wait for one raises. The kernels and
torch.cuda are stood in for, as far as the current device goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton")

from potstill.kernels import teacher_triton
from potstill.kernels.device_guard import on_device
from potstill.kernels.topk import teacher_topk
from tests.kernels.current_device import Current


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> Iterator[Current]:
    state = Current()
    state.stands_in(monkeypatch)
    for name in ("tile_kernel", "select_kernel"):
        monkeypatch.setattr(teacher_triton, name, state.kernel(name))
    teacher_triton.inverse_temperatures.cache_clear()
    yield state
    teacher_triton.inverse_temperatures.cache_clear()  # the fake ones must not be there for others


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("given", ["logits", "hidden"])
def test_the_teacher_s_kernels_run_where_its_logits_are_and_wait_for_no_value(
    current: Current, index: int, given: str
) -> None:
    with FakeTensorMode():
        place: dict[str, Any] = {"device": f"cuda:{index}", "dtype": torch.bfloat16}
        source: dict[str, Any] = {"logits": torch.empty(33, 1000, **place)}
        if given == "hidden":
            source = {"hidden": torch.empty(33, 16, **place), "weight": torch.empty(1000, 16, **place)}
        labels = torch.empty(33, dtype=torch.int64, device=f"cuda:{index}")
        best = teacher_topk(**source, k=5, labels=labels, temperatures=(2.0,), chunk_bytes=4 * 1024 * 20)
        assert best.ids.device == torch.device("cuda", index)
        with pytest.raises(DataDependentOutputException):  # that this is how a wait would show
            best.lse.max().item()
    assert {name for name, _ in current.launches} == {"tile_kernel", "select_kernel"}
    assert {where for _, where in current.launches} == {index} and current.index == 0


def test_the_guard_is_free_where_nothing_is_to_be_changed(current: Current) -> None:
    free = on_device(torch.device("cpu"))
    assert on_device(torch.device("cuda", 0)) is free and on_device(torch.device("cuda")) is free
    with on_device(torch.device("cuda", 1)):
        assert current.index == 1
        assert on_device(torch.device("cuda", 1)) is free and on_device(torch.device("cuda", 0)) is not free
    assert current.index == 0
