"""The optimizers and their keys. A new one is a function that builds it and an entry in OPTIMIZERS.

torch is imported when one is built, since `potstill train --help` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from potstill.common.config import StrictModel
from potstill.common.named_entries import NameIn

if TYPE_CHECKING:
    import torch
    from torch import nn

MUON_MOMENTUM = 0.95


def adamw(module: nn.Module, options: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """torch AdamW (Loshchilov and Hutter, arXiv 1711.05101)."""
    import torch

    from potstill.student_train.run.parameter_groups import adamw_options, decayed_groups

    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(decayed_groups(parameters, options), **adamw_options(options, device))


def muon(student: nn.Module, options: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Muon for the matrices of the backbone; AdamW for embeddings, head, norms, biases and what loss terms own."""
    from potstill.student_train.run.muon import MuonWithAdamW
    from potstill.student_train.run.parameter_groups import adamw_options, decayed_groups, hidden_matrices

    chosen = [p for p in hidden_matrices(student.hf) if p.requires_grad]
    numbers = {id(p) for p in chosen}
    rest = [p for p in student.parameters() if p.requires_grad and id(p) not in numbers]
    lr = options.lr if options.muon_lr is None else options.muon_lr
    group = {"params": chosen, "kind": "muon", "lr": lr, "weight_decay": options.weight_decay}
    groups = [{**group, "lr_scale": lr / options.lr}] if chosen else []
    groups += decayed_groups(rest, options, kind="adamw", lr=options.lr)
    return MuonWithAdamW(groups, momentum=MUON_MOMENTUM, adamw=adamw_options(options, device))


# The student, the keys of its optimizer and the device -> the optimizer; groups may carry `lr_scale`, a factor on the
# scheduled learning rate.
OPTIMIZERS: dict[str, Callable[[nn.Module, OptimizerConfig, torch.device], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": muon,
}


class OptimizerConfig(StrictModel):
    """AdamW of torch, or Muon beside it; weight decay on matrices only."""

    kind: Annotated[str, NameIn(OPTIMIZERS)] = Field(
        default="adamw",
        description="adamw, or muon: Muon for the matrices of the backbone, AdamW for embeddings, head, norms and "
        "biases (zero_stage 0 to 2)",
    )
    lr: float = Field(default=3e-4, gt=0, le=1, description="Peak learning rate")
    muon_lr: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Peak learning rate of Muon, whose updates are scaled to the size of AdamW's; null takes lr",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="AdamW betas"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled weight decay of matrices")
    grad_clip: float = Field(default=1.0, ge=0, description="Largest gradient norm; 0 switches clipping off")
