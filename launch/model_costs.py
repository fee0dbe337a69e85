"""What a model weighs and what a token of it costs, counted from its configuration on torch's meta device."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from potstill.common.errors import UserError
from potstill.common.model_place import find_model, one_line

# Keys under which configurations say how many experts a layer has, and how many of them the router chooses.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_BIT_16 = 16.0
# Microscaling formats (OCP MX specification 1.0): a scale of 8 bits for each 32 values.
_MX_SCALE_BITS = 8 / 32
_FP8 = ("fp8", "fbgemm_fp8")
# What no quantisation touches: a router decides, and a head or an embedding is left as it is by those who publish.
_LEFT_ALONE = ("*lm_head*", "*embed*", "*router*", "*.gate.weight", "*norm*", "*bias")


@dataclass(frozen=True)
class Quantised:
    """How a checkpoint's matrices are stored. `fp8`: they are multiplied in FP8, where the GPU has it."""

    method: str
    bits: float = _BIT_16
    fp8: bool = False
    known: bool = True
    left_alone: tuple[str, ...] = _LEFT_ALONE

    def holds(self, name: str, *, dimensions: int) -> bool:
        """Whether this parameter is one of those that are stored so."""
        return dimensions > 1 and not any(_fits(name, pattern) for pattern in self.left_alone)


@dataclass(frozen=True)
class ModelCosts:
    """Size of a model: parameters, those that a token meets, and what one token of a forward pass costs."""

    parameters: int
    active_parameters: int
    forward_flops: float  # per token, attention included
    vocab_size: int
    context: int | None  # positions that it reads at most
    weight_bytes: float = 0.0  # as the checkpoint stores them, 16 bits where it is not quantised
    fp8_flops: float = 0.0  # those of forward_flops that are FP8 products
    experts: tuple[int, int] | None = None  # chosen for a token, of so many in a layer
    quantised: Quantised | None = None

    def flops_at(self, fp8_speed: float) -> float:
        """Operations of a token's forward pass, FP8 products counted as so many times faster ones of 16 bits."""
        return self.forward_flops - self.fp8_flops * (1 - 1 / fp8_speed)

    def describe(self) -> str:
        """`671.0 B parameters, 37.6 B active (8 of 256 experts), fp8`."""
        text = f"{format_count(self.parameters)} parameters"
        if self.experts is not None:
            chosen, number = self.experts
            text += f", {format_count(self.active_parameters)} active ({chosen} of {number} experts)"
        return text if self.quantised is None else f"{text}, {self.quantised.method}"


def format_count(number: float) -> str:
    """Parameters as papers write them: `671.0 B`, `46.7 M`, `820`."""
    for unit, factor in (("B", 1e9), ("M", 1e6)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number:,.0f}"


def model_costs(source: str, *, row_length: int, what: str = "teacher") -> ModelCosts:
    """Costs of a model from its configuration; raises UserError when there is none.

    A token costs two operations per parameter it meets in a matrix product, and per layer two products with on
    average half a row of keys and values. Of a mixture of experts it meets the share that the router chooses. Layers
    that predict further tokens (DeepSeek-V3 has one) are no part of the model that transformers builds.
    """
    local_only = find_model(source, what=what)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{what} {source!r}: no configuration that transformers can build: {one_line(error)}"
        ) from error
    text = config.get_text_config()
    named = list(model.named_parameters())
    routed = _routed(text, named)
    experts = _experts(text, source, what) if routed else None
    share = 1.0 if experts is None else experts[0] / experts[1]
    met = {name: p.numel() * (share if name in routed else 1.0) for name, p in named}
    total, active = sum(p.numel() for _, p in named), sum(met.values())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    multiplied = active - (0 if tied else embedding.numel())
    quantised = read_quantised(config)
    small = {n: p.numel() for n, p in named if quantised is not None and quantised.holds(n, dimensions=p.dim())}
    num_small = sum(small.values())
    bits = _BIT_16 if quantised is None else quantised.bits
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return ModelCosts(
        parameters=total,
        active_parameters=round(active),
        forward_flops=2.0 * multiplied + _attention_flops(text, row_length),
        vocab_size=text.vocab_size,
        context=context,
        weight_bytes=(num_small * bits + (total - num_small) * _BIT_16) / 8,
        fp8_flops=2.0 * sum(met[name] for name in small) if quantised is not None and quantised.fp8 else 0.0,
        experts=experts,
        quantised=quantised,
    )


def read_quantised(config: Any) -> Quantised | None:
    """What `quantization_config` of a model's configuration says; None where its weights are plain numbers."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    said: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    method = str(said.get("quant_method") or "not named")
    alone = (*_LEFT_ALONE, *(said.get("modules_to_not_convert") or said.get("ignore") or ()))
    if method in _FP8:
        return Quantised(method, 8.0, fp8=True, left_alone=alone)
    if method == "mxfp4":
        return Quantised(method, 4 + _MX_SCALE_BITS, left_alone=(*alone, "*self_attn*"))
    if method == "compressed-tensors":
        return _compressed(said, alone)
    if method == "modelopt" and said.get("quant_algo") == "FP8":
        return Quantised(method, 8.0, fp8=True, left_alone=alone)
    bits = said.get("bits") or (4 if said.get("load_in_4bit") else 8 if said.get("load_in_8bit") else None)
    if bits is None:
        return Quantised(method, known=False, left_alone=alone)
    group = said.get("group_size") or 0
    return Quantised(method, bits + (_BIT_16 / group if group > 0 else 0.0), left_alone=alone)


def _compressed(said: Mapping[str, Any], alone: tuple[str, ...]) -> Quantised:
    groups = list((said.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if groups else {}
    bits, group = weights.get("num_bits"), weights.get("group_size") or 0
    if bits is None:
        return Quantised("compressed-tensors", known=False, left_alone=alone)
    # Weights of 8 bits beside activations of 16 are multiplied in 16.
    fp8 = bits == 8 and weights.get("type") == "float" and bool(groups[0].get("input_activations"))
    method = f"compressed-tensors, {'fp' if weights.get('type') == 'float' else 'int'}{bits}"
    return Quantised(method, bits + (_BIT_16 / group if group > 0 else 0.0), fp8=fp8, left_alone=alone)


def _routed(text: Any, named: Sequence[tuple[str, Any]]) -> frozenset[str]:
    """Parameters of the experts among which a router chooses, not those of shared ones.

    They are called so, or (JetMoE, Granite) are one tensor of as many slices as there are experts.
    """
    number = _first(text, _EXPERTS)
    return frozenset(n for n, p in named if ".experts." in n or (p.dim() == 3 and number and p.shape[0] == number))


def _first(text: Any, keys: Sequence[str]) -> int | None:
    return next((number for key in keys if (number := getattr(text, key, None))), None)


def _experts(text: Any, source: str, what: str) -> tuple[int, int]:
    number, chosen = _first(text, _EXPERTS), _first(text, _CHOSEN)
    if number is None or chosen is None:
        raise UserError(
            f"{what} {source!r} has experts, but its configuration does not say how many a token meets: expected one "
            f"of {', '.join(_EXPERTS)} and one of {', '.join(_CHOSEN)}"
        )
    return chosen, number


def _attention_flops(text: Any, row_length: int) -> float:
    """Of one token: products with the keys, and with the values, of half a row in each layer."""
    heads = getattr(text, "num_attention_heads", 1)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = values = width
    if getattr(text, "kv_lora_rank", None):  # latent attention: `head_dim` is that of the rotary part alone
        keys, values = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    return float(text.num_hidden_layers * 2.0 * heads * (keys + values) * row_length / 2)


def _fits(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*{pattern}.*")
