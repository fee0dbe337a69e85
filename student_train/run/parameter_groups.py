"""The student's parameters in the groups that optimizers take, and where DeepSpeed puts them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from potstill.student_train.run.muon import FlatPart, MuonWithAdamW, places_of

if TYPE_CHECKING:
    from potstill.student_train.config.optimizers import OptimizerConfig


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, also where ZeRO-3 holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def adamw_options(options: OptimizerConfig, device: torch.device) -> dict[str, Any]:
    """Further options of torch.optim.AdamW; its fused form needs no compiler, unlike DeepSpeed's own."""
    on_gpu = device.type == "cuda"
    return {"lr": options.lr, "betas": options.betas, "eps": options.eps, "fused": on_gpu, "foreach": not on_gpu}


def decayed_groups(parameters: list[nn.Parameter], options: OptimizerConfig, **common: Any) -> list[dict[str, Any]]:
    """Weight decay on matrices only."""
    matrices = [p for p in parameters if len(shape_of(p)) >= 2]
    vectors = [p for p in parameters if len(shape_of(p)) < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [{**group, **common} for group in groups if group["params"]]


def hidden_matrices(hf: Any) -> list[nn.Parameter]:
    """The matrices between hidden layers of a Hugging Face model, of experts too [E, m, n], in its order.

    Not embeddings and the head, whose rows belong to single tokens; nor convolutions.
    """
    tables = {id(part.weight) for part in hf.modules() if isinstance(part, nn.Embedding)} | {id(hf.lm_head.weight)}
    return [
        parameter
        for name, parameter in hf.named_parameters()
        if id(parameter) not in tables
        and (len(shape_of(parameter)) == 2 or (len(shape_of(parameter)) == 3 and ".experts." in name))
    ]


def tell_layout(optimizer: torch.optim.Optimizer, groups: list[list[nn.Parameter]], *, rank: int, cut: bool) -> None:
    """Tell Muon which matrices lie in the flat tensors that DeepSpeed has put in place of its parameters.

    groups: the parameters of each group of `optimizer` before that; cut: whether ranks hold a part each (ZeRO 1, 2).
    The values are compared, so a DeepSpeed that lays them out otherwise is refused (RuntimeError).
    """
    if not isinstance(optimizer, MuonWithAdamW):
        return
    num_ranks = torch.distributed.get_world_size() if cut else 1
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        if group["kind"] != "muon" or all(p.dim() >= 2 for p in group["params"]):
            continue
        [flat] = group["params"]
        start = rank * flat.numel() if cut else 0
        if flat.numel() * num_ranks < sum(p.numel() for p in before) or not holds(flat, start, before):
            raise RuntimeError(
                "DeepSpeed lays out the flat parameters otherwise than Muon expects (one after another, cut in equal "
                "parts by rank); take optimizer.kind: adamw, or the version of DeepSpeed that potstill names"
            )
        optimizer.parts[flat] = FlatPart(tuple(places_of([shape_of(p) for p in before])), start, num_ranks)


def holds(flat: Tensor, start: int, parameters: list[nn.Parameter]) -> bool:
    """Whether `flat` [n] holds the elements from `start` on of parameters laid end to end, in float32."""
    offset, end = 0, start + flat.numel()
    for parameter in parameters:
        first, last = max(start, offset), min(end, offset + parameter.numel())
        if first < last:
            expected = parameter.detach().reshape(-1)[first - offset : last - offset].float()
            if not torch.equal(flat.detach()[first - start : last - start], expected):
                return False
        offset += parameter.numel()
    return True
