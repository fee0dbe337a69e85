"""A current device that is not there, for tests of where kernels are launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


class Current:
    """The current device, and what it was at each launch."""

    def __init__(self) -> None:
        self.index = 0
        self.launches: list[tuple[str, int]] = []

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.index = self.index, torch.device(device).index
        try:
            yield
        finally:
            self.index = before

    def kernel(self, name: str) -> Any:
        class Kernel:
            def __getitem__(_, grid: Any) -> Any:
                return lambda *arguments, **options: self.launches.append((name, self.index))

        return Kernel()

    def stands_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the current device of torch.cuda."""
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "device", self.device)
