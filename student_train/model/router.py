"""Load balancing loss of a mixture of experts: transformers' own formula, weighted for this trainer's loss.

Without it a mixture that starts from random weights tends to send all tokens to a few experts (Switch Transformer,
arXiv 2101.03961, equations 4 to 6).

How it is weighted. Let aux(r, a) be the loss of micro-batch a of rank r, R the number of ranks, A the micro-batches
per rank and step. It is a product of two means over tokens, so it is not linear in the batch: the aux of the global
batch would need all ranks' routing before any backward pass. As in every trainer that accumulates, a step is
therefore given the mean over its micro-batches and ranks,

    coefficient / (R * A) * sum over r, a of aux(r, a).

The train loop sums gradients over the micro-batches of a rank (`scale_wrt_gas=False`), and DeepSpeed then averages
over ranks. So micro-batch (r, a) must add s * aux(r, a) with (1 / R) * sum over r, a of s * aux(r, a) equal to the
line above: s = coefficient / A, whatever R is. (The rest of the loss is divided by W / R for the same reason.)
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model.term import LossTerm, TermInput

log = logging.getLogger(__name__)

# What this module hands to transformers' function; an architecture whose function takes something else is left alone.
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


def expert_counts(config: Any) -> tuple[int, int] | None:
    """(experts per layer, experts per token) by the text configuration; None when it does not say."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    available = next((getattr(config, name) for name in names if getattr(config, name, None)), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return (int(available), int(chosen)) if available and chosen else None


@dataclass(frozen=True)
class RouterBalance(LossTerm):
    """The load balancing loss of one architecture. `coefficient` is its weight in the loss, above 0."""

    function: Callable[..., Tensor]
    num_experts: int
    top_k: int
    coefficient: float
    # load balancing loss, and the micro-batches that had one
    sum_names = ("router_aux", "router_batches")
    parts = MappingProxyType({"router_aux": ("router_aux", "router_batches")})
    needs_router_logits = True

    @classmethod
    def build(cls, model: ModelConfig, config: Any) -> RouterBalance | None:
        """By `model.router_aux_loss` and the architecture, see `router_balance`."""
        return router_balance(model.router_aux_loss, config)

    def loss(self, given: TermInput) -> tuple[Tensor, Tensor]:
        """coefficient / A * aux of the micro-batch (see above for the weight); sums [2]: aux, 1."""
        aux = self.aux(given.router_logits, given.micro.token_index)
        return self.coefficient / given.num_micro_batches * aux, torch.stack([aux.detach(), torch.ones_like(aux)])

    def aux(self, router_logits: tuple[Tensor, ...] | None, token_index: Tensor | None) -> Tensor:
        """aux of one micro-batch, 0-d float32: experts * sum over experts e of f_e * P_e; `top_k` when balanced.

        f_e is the mean count of tokens that chose e, P_e the mean router probability of e, both over the real tokens
        of all layers. router_logits: per layer [B * L, experts], or [N, experts] where no padding passed the routers;
        token_index int64 [N]: places of the real tokens in the B * L grid, None when all are real (padding that passes
        the router must not count). Raises UserError when no layer has a router.
        """
        if not router_logits:
            raise UserError(
                "model.router_aux_loss: no layer of this student has a router, though its configuration names experts; "
                "set model.router_aux_loss to 0, or correct the configuration (mlp_only_layers, decoder_sparse_step)"
            )
        mask = None
        if token_index is not None and len(token_index) < router_logits[0].shape[0]:
            mask = torch.zeros(router_logits[0].shape[0], device=token_index.device)  # [B * L]
            mask[token_index] = 1.0
        # The routers choose by float32 probabilities; bfloat16 ones have ties, and would count other experts.
        logits = tuple(layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in router_logits)
        return self.function(logits, self.num_experts, self.top_k, mask)


def router_balance(setting: float | None, config: Any) -> RouterBalance | None:
    """The load balancing loss that a student of this configuration gets; None for dense students and a weight of 0.

    `setting` is model.router_aux_loss: null takes `router_aux_loss_coef` of the configuration. Raises UserError when
    it asks for a loss that transformers does not expose for this architecture.
    """
    text = config.get_text_config()
    default = getattr(text, "router_aux_loss_coef", None)
    counts = expert_counts(text)
    function = _function(config)
    if function is None or counts is None:
        if setting:
            raise UserError(
                f"model.router_aux_loss is {setting}, but transformers has no load balancing loss over the routers of "
                f"{config.model_type!r} students; remove the key, or take a mixture of experts that has one (mixtral, "
                "qwen2_moe, qwen3_moe, olmoe, ...)"
            )
        if setting is None and (default or counts is not None):
            log.warning(
                "%s is a mixture of experts for which transformers exposes no load balancing loss: none is part of "
                "this loss, so experts may fall idle (model.router_aux_loss: 0 silences this)",
                config.model_type,
            )
        return None
    coefficient = float(default or 0.0) if setting is None else setting
    return RouterBalance(function, *counts, coefficient) if coefficient else None


def _function(config: Any) -> Callable[..., Tensor] | None:
    """`load_balancing_loss_func` beside the architecture's class, if the class also gives its router logits."""
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if not isinstance(kind, type) or "router_logits" not in (getattr(kind, "_can_record_outputs", None) or {}):
        return None
    function = getattr(sys.modules[kind.__module__], "load_balancing_loss_func", None)
    if function is None or list(inspect.signature(function).parameters) != _ARGUMENTS:
        return None
    found: Callable[..., Tensor] = function
    return found
