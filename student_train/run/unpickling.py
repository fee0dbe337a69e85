"""Loading that executes nothing: torch.load limited to tensors, plain values and the classes that DeepSpeed saves.

A pickle can name any function and have it called. DeepSpeed 0.19 loads its own files with `weights_only=False`; while
`only_allowed` is in force each torch.load of this process is one with `weights_only=True`, for which torch reads the
pickle with an interpreter of its own that knows tensors, containers and what is on a list.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from potstill.common.errors import UserError


class UnpicklingRefusedError(UserError):
    """A file holds something that is neither a tensor, nor a plain value, nor of a class on the list."""


def allowed_classes() -> list[Any]:
    """What DeepSpeed's checkpoints hold besides tensors and plain values: records without behaviour of their own."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(owner: Any, name: Any) -> ZeroStageEnum:
        """What stands in the place of getattr: Python 3.11.0 to 3.11.3 pickle a member of an Enum as a call of it."""
        if owner is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"GLOBAL getattr of {owner!r}, {name!r}")
        return ZeroStageEnum[name]

    return [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler, (member, "builtins.getattr")]


@contextmanager
def only_allowed(where: Path) -> Iterator[None]:
    """While open, torch.load loads tensors, plain values and the classes on the list, whatever it is asked for.

    `where` is the checkpoint, for the message. Raises UnpicklingRefusedError that names the class. Not for several
    threads at once: torch.load is replaced for the whole process meanwhile.
    """
    load = torch.load

    def load_allowed(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "weights_only": True})

    with torch.serialization.safe_globals(allowed_classes()):
        torch.load = load_allowed
        try:
            yield
        except pickle.UnpicklingError as error:
            raise UnpicklingRefusedError(
                f"{where} holds what no checkpoint of this project holds, and was not loaded: {_cause(error)}. Load "
                "only checkpoints that you trust; this one is damaged, or made to run code"
            ) from error
        finally:
            torch.load = load


def _cause(error: pickle.UnpicklingError) -> str:
    """What was refused, without torch's advice to load it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return f"it names {named[1]}" if named else " ".join(str(error).split())[-200:]
