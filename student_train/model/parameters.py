"""Parameters of a student: drawn by the architecture's own rule, checked, counted; under ZeRO-3 in parts too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from potstill.student_train.model.initial_weights import STD_KEY, residual_projections
from potstill.student_train.model.router import expert_counts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters while open, changes kept; does nothing for parameters that ZeRO-3 has not cut."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


@contextmanager
def on_cpu(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters as tensors of the CPU while open; what they then hold goes back to their own device."""
    homes = [(parameter, parameter.data) for parameter in parameters if parameter.device.type != "cpu"]
    for parameter, home in homes:
        parameter.data = home.cpu()
    try:
        yield
    finally:
        for parameter, home in homes:
            home.copy_(parameter.data)
            parameter.data = home


@torch.no_grad()
def draw_weights(hf: Any, *, seed: int, residual_std: float | None = None) -> None:
    """Draw the initial weights again, module by module in a fixed order, by the architecture's own rule.

    While ZeRO-3 builds a model its constructors take random numbers that they do not take elsewhere, and on a GPU they
    take them from the GPU; drawing once more, on the CPU, makes a seed mean the same weights for every stage, number of
    ranks and device.
    `residual_std` is that of the projections into the residual stream, which some architectures scale by themselves;
    None leaves them as drawn.
    """
    torch.manual_seed(seed)
    owners = {id(module): hf for module in hf.modules()}
    for inner in hf.modules():
        if hasattr(inner, "_init_weights"):
            owners |= {id(module): inner for module in inner.modules()}
    for module in children_first(hf):
        # An attention or MLP may draw the weights of its own children once more (GPT-2, from which others have it).
        weights = [weight for part in (module, *module.children()) for weight in part.parameters(recurse=False)]
        with gathered(weights), on_cpu(weights):
            owners[id(module)]._init_weights(module)
    if residual_std is not None:
        for _, parameter in residual_projections(hf):
            with gathered([parameter]), on_cpu([parameter]):
                parameter.normal_(0.0, residual_std)


def children_first(module: nn.Module) -> Iterator[nn.Module]:
    """Every module below, each after its children: the order of transformers' own initialisation."""
    for child in module.children():
        yield from children_first(child)
    yield module


def check_initial_std(hf: Any, config: Any, *, residual_std: float | None = None) -> None:
    """Refuse weights whose std is not the configured one (the silent ZeRO-3 trap). Raises RuntimeError."""
    expected = {"embedding": (hf.get_input_embeddings().weight, getattr(config, STD_KEY, None))}
    if residual_std is not None:
        expected |= {name: (parameter, residual_std) for name, parameter in residual_projections(hf)}
    for name, (weight, std) in expected.items():
        if not std:
            continue
        with gathered([weight]):
            found = float(weight.detach().float().std())
            number = weight.numel()
        # Of n draws the standard deviation itself has a relative one of 1/sqrt(2 n): a matrix of 64 is off by a fifth.
        slack = max(0.2, 5.0 / math.sqrt(2 * number))
        if not (1 - slack) * std < found < (1 + slack) * std:
            raise RuntimeError(
                f"{name} has std {found:.4g} after initialisation, expected {std:.4g} (initializer_range): the model "
                "was not initialised by transformers; the run would train from wrong weights"
            )


def count_parameters(module: nn.Module) -> int:
    """Parameters of the whole model, also when ZeRO-3 holds them in parts; tied ones once."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters())


def active_parameters(module: nn.Module, config: Any) -> int | None:
    """Parameters that one token passes through: all of a dense model, the chosen share of the experts of a mixture.

    transformers holds the experts of a layer in parameters of a module named `experts`, and the router chooses
    `num_experts_per_tok` of them. None when there are experts and the configuration does not say how many count.
    """
    experts = sum(
        int(getattr(p, "ds_numel", p.numel())) for name, p in module.named_parameters() if ".experts." in name
    )
    if not experts:
        return count_parameters(module)
    counts = expert_counts(config)
    if counts is None:
        return None
    available, chosen = counts
    return count_parameters(module) - experts + experts * chosen // available
