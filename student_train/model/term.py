"""What a loss term is: a part of the loss with its own sums, in one object (the table of all is loss_terms.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from potstill.storage import LoadedBatch
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import MicroBatch

if TYPE_CHECKING:
    from potstill.student_train.model.head import DistillationHead


@dataclass(frozen=True)
class TermInput:
    """What one forward in training offers to every term. B rows of L tokens, N real tokens, width D.

    micro: the batch, with what terms took from the stores in `micro.extras`
    objective: loss settings of the step
    normalizer: 0-d; sums over tokens are divided by it, so that a step is a mean over its global batch
    num_micro_batches: micro-batches of this rank and step; a mean over micro-batches is divided by it
    hidden: [N, D] hidden states of the last layer, after its norm, before the head
    router_logits: per layer [B * L, experts] where a term `needs_router_logits`, else None; [N, experts] where padding
        did not pass the backbone (flash attention)
    head: the output projection; its weight may be read in a HeadRequest only (ZeRO-3)
    self_check: compare the term with a slow and exact path first, and raise on a mismatch
    source_sums: [sources, 14], where the figures of LossSums of each source go (micro.source); None with one source
    kd_scale: 0-d, what the micro-batch's KD weights are multiplied by to have mean 1 over the global batch; None: 1
    """

    micro: MicroBatch
    objective: StepObjective
    normalizer: Tensor
    num_micro_batches: int
    hidden: Tensor
    router_logits: tuple[Tensor, ...] | None
    head: DistillationHead
    self_check: bool
    kd_scale: Tensor | None = None
    source_sums: Tensor | None = None


class LossTerm:
    """Base of the terms. One that is off is not built, and costs nothing.

    sum_names: what `loss` adds up; names are unique over all terms
    parts: figure in the lines of metrics -> (name of its sum, name of the sum of its weights)
    needs_router_logits: whether the backbone shall return its routers' logits

    A term with parameters of its own is an `nn.Module` too. The student registers it, so its parameters are in
    `student.parameters()`: the optimizer groups them by shape as any others, checkpoints hold them, and exports leave
    them out. Under ZeRO-3 a module's weights are whole inside its own forward only, so use them through submodules.
    """

    sum_names: ClassVar[tuple[str, ...]]
    parts: ClassVar[Mapping[str, tuple[str, str]]]
    needs_router_logits: ClassVar[bool] = False

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> LossTerm | None:
        """The term of a student with this configuration (`config`: Hugging Face's); None where it is off."""
        raise NotImplementedError

    @classmethod
    def stores(cls, model: ModelConfig) -> frozenset[str]:
        """Names of stores (data.targets, data.scores) whose rows `columns` reads, at every step."""
        return frozenset()

    def columns(self, batch: LoadedBatch, part: slice) -> Mapping[str, Tensor]:
        """What the term takes from the rows `part` of a batch, by names of its own; found in `micro.extras`.

        Called on the CPU where micro-batches are made, maybe in another thread than the forward.
        """
        return MappingProxyType({})

    def loss(self, given: TermInput) -> tuple[Tensor, Tensor]:
        """The term's share of the step's loss (0-d, differentiable), and its detached sums float32 [len(sum_names)]."""
        raise NotImplementedError
