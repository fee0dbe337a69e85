"""The student's head: its output projection, the loss next to its own weight, and the choice of positions.

It takes the place of `lm_head`, keeps its parameter names, and without a request still gives logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.kernels.loss import TokenStatistics, linear_sparse_loss, self_check, token_statistics
from potstill.kernels.settings import LossSettings
from potstill.kernels.soft_cap import scale_and_cap_
from potstill.kernels.types import IGNORE_LABEL, LossSums
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.curriculum.token_selector import choose
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.model.requests import HeadRequest
from potstill.student_train.model.term import LossTerm, TermInput

# Labelled positions, those with weight > 0, those whose KD counts, sum of squared weights, those measured to choose.
SELECTION_NAMES = ("labelled", "positions", "kd_positions", "squared_weight", "measured")


class DistillationHead(nn.Module):
    """Output projection that computes the loss next to its own weight; logits are never kept as [N, V]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any, *, soft_cap: float | None, logit_scale: float, loss_backend: str = "auto") -> None:
        """`linear`: whose parameters this takes over; loss_backend: CallOptions.backend of its losses."""
        super().__init__()
        self.weight = linear.weight  # the same parameter, so that tied embeddings stay tied
        self.bias = getattr(linear, "bias", None)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.soft_cap = soft_cap
        self.logit_scale = logit_scale
        self.loss_backend = loss_backend

    def finish(self, raw: Tensor) -> Tensor:
        """The logits [..., V] that the loss works on, in place of the raw ones that this head has just given."""
        return scale_and_cap_(raw, logit_scale=self.logit_scale, soft_cap=self.soft_cap)

    def settings(self, step: LossSettings) -> LossSettings:
        """A step's settings with this head's cap and scale."""
        return step.for_head(soft_cap=self.soft_cap, logit_scale=self.logit_scale)

    def forward(self, hidden: Tensor, request: HeadRequest[Any] | None = None) -> Any:
        """Logits [..., V] without a request (unscaled, uncapped: the model does that), else the request's result."""
        if request is not None:
            return request.run(self, hidden)
        return F.linear(hidden, self.weight, self.bias)

    def statistics(self, hidden: Tensor, micro: MicroBatch, objective: StepObjective | None) -> TokenStatistics:
        """Figures of every position [N] without gradients; those against the targets where an objective is given."""
        return token_statistics(
            hidden=hidden.detach(),
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            labels=micro.labels,
            targets=None if objective is None else micro.targets,
            settings=self.settings(LossSettings() if objective is None else objective.settings),
            backend=self.loss_backend,
        )

    @torch.no_grad()
    def choice(self, hidden: Tensor, micro: MicroBatch, objective: StepObjective) -> tuple[Tensor, Tensor | None]:
        """Weights [N] of the positions for the whole loss and for its KD term; unlabelled positions weigh 0."""
        labelled = micro.labels != IGNORE_LABEL
        token_weights = labelled.float() if micro.token_weights is None else micro.token_weights
        choice = objective.tokens
        if choice is None or not choice.uses_student:
            return token_weights, micro.kd_weights
        needs_targets = choice.selector.entry.needs_targets
        figures = self.statistics(hidden, micro, objective if needs_targets else None)
        columns = {"loss": -figures.label_logprob, "entropy": figures.entropy, **micro.columns}
        if needs_targets:
            columns["divergence"] = figures.divergence
        weights = choose(choice, columns, labelled=labelled, row=micro.row, num_rows=micro.num_rows)
        if choice.selector.applies_to == "kd":
            return token_weights, weights if micro.kd_weights is None else weights * micro.kd_weights
        return (weights if micro.token_weights is None else weights * token_weights), micro.kd_weights


@dataclass(frozen=True)
class SparseLossRequest:
    """The loss of the sparse targets and labels of this batch, divided by this number, inside the head.

    `self_check` first compares the loss path with float64 on this batch and raises SelfCheckError on a mismatch.
    `kd_scale`, 0-d, multiplies the KD weights; `source_sums` [sources, 14] gets the figures by source. A batch without
    targets (of sources that have none) has labels alone.
    """

    micro: MicroBatch
    objective: StepObjective
    normalizer: Tensor
    self_check: bool = False
    kd_scale: Tensor | None = None
    source_sums: Tensor | None = None

    def run(self, head: DistillationHead, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss 0-d, differentiable in hidden [N, D] and the head, and the sums float32 [S] of SparseLoss."""
        micro, objective = self.micro, self.objective
        token_weights, kd_weights = head.choice(hidden, micro, objective)
        if kd_weights is not None and self.kd_scale is not None:
            kd_weights = kd_weights * self.kd_scale
        distils = objective.settings.alpha > 0.0 and micro.targets is not None
        options: dict[str, Any] = {
            "settings": head.settings(objective.settings if distils else objective.settings.without_kd()),
            "token_weights": token_weights,
            "kd_weights": kd_weights,
            "normalizer": self.normalizer,
            "num_active": micro.num_active,
            "backend": head.loss_backend,
        }
        tensors = {"hidden": hidden, "weight": head.weight, "bias": head.bias, "labels": micro.labels}
        targets = micro.targets if distils else None
        if self.self_check:
            check_num_active(micro.num_active, token_weights)
            detached = {name: None if value is None else value.detach() for name, value in tensors.items()}
            self_check(**detached, targets=targets, **options)
        if self.source_sums is not None:
            options |= {"groups": micro.source, "group_sums": self.source_sums}
        loss, sums = linear_sparse_loss(**tensors, targets=targets, **options)
        measured = hidden.shape[0] if objective.tokens is not None and objective.tokens.uses_student else 0
        selection = selection_figures(micro, token_weights, kd_weights, measured=measured)
        return loss, torch.cat([sums.stack().float(), selection])


class SparseLoss(LossTerm):
    """Distillation from sparse targets, cross-entropy of the labels and z-loss: the loss family of kernels/loss.py."""

    sum_names = (*LossSums.names(), *SELECTION_NAMES)
    parts = MappingProxyType({"ce": ("ce", "label_weight"), "kd": ("kd", "kd_weight"), "z": ("z", "weight")})

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> SparseLoss:
        """Always on."""
        return cls()

    def loss(self, given: TermInput) -> tuple[Tensor, Tensor]:
        """alpha T^2 KD + ce_weight CE + z_loss lse^2, summed over the chosen positions."""
        request = SparseLossRequest(
            given.micro,
            given.objective,
            given.normalizer,
            given.self_check,
            kd_scale=given.kd_scale,
            source_sums=given.source_sums,
        )
        loss: Tensor
        sums: Tensor
        loss, sums = given.head(given.hidden, request)
        return loss, sums


def check_num_active(num_active: int | None, token_weights: Tensor) -> None:
    """Raise RuntimeError where the host's count is not that of the weights: positions would be left out unseen."""
    found = int((token_weights != 0).sum())
    if num_active is not None and num_active != found:
        raise RuntimeError(
            f"{found} positions of the batch have a weight, the collation counted {num_active}; this is a defect of "
            "potstill, please report it with the stage's token selector"
        )


def selection_figures(micro: MicroBatch, token_weights: Tensor, kd_weights: Tensor | None, *, measured: int) -> Tensor:
    """[5] float32, see SELECTION_NAMES; `measured`: positions that went through the head for the choice itself."""
    labelled = (micro.labels != IGNORE_LABEL).sum()
    kd = token_weights if kd_weights is None else token_weights * kd_weights
    kd = torch.zeros_like(kd) if micro.targets is None else kd * (micro.targets.offsets.diff() > 0)
    figures = [labelled, (token_weights > 0).sum(), (kd > 0).sum(), token_weights.square().sum()]
    # The host's number is filled in on the device: a copy of it would wait for all that runs there.
    host = torch.full((), float(measured), device=token_weights.device)
    return torch.stack([*(figure.float() for figure in figures), host])
