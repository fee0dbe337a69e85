"""What a student is asked for: requests, each of which runs inside the module that DeepSpeed wraps.

Under ZeRO-3 a module's weights are whole only while its own forward runs. So everything that needs them, from a
training loss to a sample of text, is an object with a `run` method, and the forward of the student (and of its head)
has one meaning: run this. A result is a tensor or a tuple of tensors, because DeepSpeed looks for tensors in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from potstill.student_train.model.head import DistillationHead
    from potstill.student_train.model.student import StudentModel

Result_co = TypeVar("Result_co", covariant=True)
Result = TypeVar("Result")


class Request(Protocol[Result_co]):
    """Something to do with a whole student."""

    def run(self, student: StudentModel) -> Result_co:
        """Called inside the forward of the student; all ranks must ask for the same."""
        ...


class HeadRequest(Protocol[Result_co]):
    """Something to do with hidden states [N, D] and the whole output projection."""

    def run(self, head: DistillationHead, hidden: Tensor) -> Result_co:
        """Called inside the forward of the head."""
        ...


class RunsRequests(Protocol):
    """A StudentModel, or the engine around one, for which each call is collective."""

    def __call__(self, request: Request[Result]) -> Result: ...
