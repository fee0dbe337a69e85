"""Which channels, neurons, heads and layers stay, and a smaller model made of their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.student_train.pruning.importance import Importance, norms_of
from potstill.student_train.pruning.shape import Axis, Shape, axes_of


@dataclass(frozen=True)
class Kept:
    """Numbers of what stays, rising, int64: channels [H']; neurons [layers, I'], heads [layers, query heads'] and
    kv_heads [layers, kv heads'] of all layers of the whole model; layers [layers']."""

    channels: Tensor
    neurons: Tensor
    heads: Tensor
    kv_heads: Tensor
    layers: Tensor


def choose(importance: Importance, whole: Shape, wanted: Shape) -> Kept:
    """The most important of each kind; of equals the first. A key head stays with its best queries, and its
    importance is the sum of theirs."""
    groups = importance.heads.unflatten(1, (whole.num_kv_heads, whole.queries_per_key))  # [layers, keys, queries]
    best = groups.sort(dim=-1, descending=True, stable=True)
    num_queries = wanted.queries_per_key
    kv_heads = _largest(best.values[..., :num_queries].sum(-1), wanted.num_kv_heads)
    own = best.indices[..., :num_queries].sort(-1).values  # within the group
    queries = own + torch.arange(whole.num_kv_heads)[:, None] * whole.queries_per_key
    heads = queries.gather(1, kv_heads[..., None].expand(-1, -1, num_queries)).flatten(1)
    return Kept(
        channels=_largest(importance.channels, wanted.hidden_size),
        neurons=_largest(importance.neurons, wanted.intermediate_size),
        heads=heads,
        kv_heads=kv_heads,
        layers=_largest(importance.layers, wanted.num_layers),
    )


def _largest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` largest along the last axis, rising."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values


def norm_factors(importance: Importance, kept: Kept) -> dict[str, float]:
    """What each norm's gains are multiplied by, by name: its output on the kept channels stays as large as it was.

    A norm divides by the root of the mean square over its channels, which changes when channels go: here by as much as
    the rows say. Where what is cut was 0 everywhere, nothing changes at all.
    """
    return {
        name: float((energy[kept.channels].mean() / energy.mean()).sqrt()) if float(energy.mean()) > 0 else 1.0
        for name, energy in importance.energy.items()
    }


def pruned_config(config: Any, wanted: Shape, layers: Tensor) -> Any:
    """The transformers configuration of the smaller model."""
    new = copy.deepcopy(config)
    new.hidden_size, new.intermediate_size = wanted.hidden_size, wanted.intermediate_size
    new.num_attention_heads, new.num_key_value_heads = wanted.num_heads, wanted.num_kv_heads
    new.head_dim = wanted.head_dim  # no longer hidden_size / heads
    new.num_hidden_layers = wanted.num_layers
    if getattr(config, "layer_types", None) is not None:
        new.layer_types = [config.layer_types[number] for number in layers.tolist()]
    return new


@torch.no_grad()
def cut(model: Any, kept: Kept, whole: Shape, wanted: Shape, factors: Mapping[str, float]) -> Any:
    """A new model of the `wanted` shape with the kept weights of `model`, of its dtype, on the CPU, in eval mode."""
    from transformers import AutoModelForCausalLM

    config = pruned_config(model.config, wanted, kept.layers)
    smaller = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    ).eval()
    places = {int(old): new for new, old in enumerate(kept.layers)}
    norms, state = norms_of(model), {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[:2] == ["model", "layers"] else None
        if layer is not None and layer not in places:
            continue
        chosen = _indices(kept, layer, whole.head_dim)
        value = tensor.cpu()
        for axis, what in enumerate(axes_of(name)):
            if what is not None:
                value = value.index_select(axis, chosen[what])
        if (norm := name.rpartition(".")[0]) in norms:
            value = value * factors[norm]
        if layer is not None:
            parts[2] = str(places[layer])
        state[".".join(parts)] = value.clone()
    missing, unexpected = smaller.load_state_dict(state, strict=False)
    missing = [name for name in missing if name not in (getattr(smaller, "_tied_weights_keys", None) or ())]
    if missing or unexpected:
        raise UserError(
            f"the cut weights do not fill a {config.model_type}: missing {missing}, unexpected {unexpected}; take a "
            "plain architecture"
        )
    smaller.tie_weights()
    if model.generation_config is not None:
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller


def _indices(kept: Kept, layer: int | None, head_dim: int) -> dict[Axis, Tensor]:
    """Rows or columns that stay along each axis, in the parameters of a layer (None: outside the layers)."""
    found: dict[Axis, Tensor] = {"channels": kept.channels}
    if layer is not None:
        inner = torch.arange(head_dim)
        for what, heads in (("queries", kept.heads[layer]), ("keys", kept.kv_heads[layer])):
            found[what] = (heads[:, None] * head_dim + inner).flatten()
        found["neurons"] = kept.neurons[layer]
    return found
