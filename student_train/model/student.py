"""The student: Hugging Face backbone, distillation head and loss inside one module that DeepSpeed wraps.

The loss is computed inside the wrapped forward, so that ZeRO-3 has gathered the head's weight where the fused op reads
it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from potstill.common.causal_lm import backbone, soft_cap_and_scale
from potstill.common.errors import UserError
from potstill.common.packed import as_lines
from potstill.kernels.types import LossSums
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.model.head import SELECTION_NAMES, DistillationHead, LossRequest
from potstill.student_train.model.initial_weights import initial_weights, residual_projections
from potstill.student_train.model.parameters import check_initial_std, draw_weights
from potstill.student_train.model.router import RouterBalance, router_balance

log = logging.getLogger(__name__)
ROUTER_NAMES = ("router_aux", "router_batches")  # load balancing loss, and the micro-batches that had one
SUM_NAMES = (*ROUTER_NAMES, *LossSums.names(), *SELECTION_NAMES)


class StudentModel(nn.Module):
    """Backbone + head + loss: tokens of a micro-batch in, (loss, sums [S]) out, sums named by SUM_NAMES."""

    hf: Any

    def __init__(self, hf: Any, *, balance: RouterBalance | None = None) -> None:
        super().__init__()
        self.balance = balance
        if not isinstance(getattr(hf, "lm_head", None), nn.Linear) or backbone(hf) is hf:
            raise UserError(
                f"model.config: {type(hf).__name__} is not a backbone and a linear layer named lm_head, which the loss "
                "takes the place of; use another architecture (llama, qwen3, gemma2, mixtral, ... are)"
            )
        soft_cap, scale = soft_cap_and_scale(hf.config.get_text_config())
        hf.lm_head = DistillationHead(hf.lm_head, soft_cap=soft_cap, logit_scale=scale)
        self.hf = hf

    def forward(
        self,
        micro: MicroBatch,
        objective: StepObjective,
        normalizer: Tensor,
        *,
        num_micro_batches: int | None = None,
        self_check: bool = False,
        calibrate: bool = False,
        probe: bool = False,
        next_after: Tensor | None = None,
    ) -> Any:
        """loss = (sum over positions of weight * loss) / normalizer, differentiable; sums are detached.

        `num_micro_batches` is how many micro-batches this rank adds up to a step; a mixture of experts then adds its
        share of the load balancing loss (see router.py for the weight). None leaves it out, as evaluation does.
        `self_check` first compares the loss path with float64 on this batch and raises SelfCheckError on a mismatch.
        `calibrate` appends the calibration bins to the sums. `probe` returns, in place of the two, the logits that the
        loss works on and those of the Hugging Face model (model_checks.py). `next_after` int64 [B] returns the logits
        [B, V] of the token behind that place of each row (samples.py). Both stand here because ZeRO-3 gathers weights
        only inside the wrapped forward.
        """
        if probe:
            return self.both_logits(micro)
        if next_after is not None:
            return self.next_logits(micro, next_after)
        balance = None if num_micro_batches is None else self.balance
        hidden, router_logits = self._backbone(micro, with_routers=balance is not None)
        request = LossRequest(micro, objective, normalizer, self_check=self_check, calibrate=calibrate)
        loss, sums = self.hf.lm_head(hidden, request)
        figures = sums.new_zeros(len(ROUTER_NAMES))
        if balance is not None and num_micro_batches is not None:
            aux = balance.loss(router_logits, micro.token_index)
            loss = loss + balance.coefficient / num_micro_batches * aux
            figures = torch.stack([aux.detach(), torch.ones_like(aux)]).to(sums.dtype)
        return loss, torch.cat([figures, sums])

    def both_logits(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of a micro-batch of full rows: as the loss computes them, and as the Hugging Face model."""
        ours = self.hf.lm_head.finish(self.hf.lm_head(self.hidden_states(micro)))
        out = self.hf(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False)
        return ours, out.logits.flatten(0, 1)

    def next_logits(self, micro: MicroBatch, after: Tensor) -> Tensor:
        """Logits [B, V] float32, as the loss has them, of the token behind place `after` [B] of each full row."""
        hidden = self.hidden_states(micro).view(*micro.input_ids.shape, -1)  # [B, L, D]
        last = hidden[torch.arange(len(after), device=after.device), after]
        logits: Tensor = self.hf.lm_head.finish(self.hf.lm_head(last))
        return logits.float()

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """Hidden states before the head [N, D] of the real tokens."""
        return self._backbone(micro, with_routers=False)[0]

    def _backbone(self, micro: MicroBatch, *, with_routers: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states [N, D] of the real tokens, and the router logits of each layer [B * L, experts] if wanted."""
        input_ids, position_ids = as_lines(self.hf.config, micro.input_ids, micro.position_ids)
        wanted = {"output_router_logits": True} if with_routers else {}
        out = backbone(self.hf)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **wanted)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1)  # [B * L, D]
        hidden = hidden if micro.token_index is None else hidden[micro.token_index]
        return hidden, out.router_logits if with_routers else None


def build_student(model: ModelConfig, config: Any, *, seed: int) -> StudentModel:
    """Random weights from `seed`, or the weights of `model.path`; in float32 (DeepSpeed makes the bfloat16 copy).

    Under ZeRO-3 an HfDeepSpeedConfig must be alive: transformers then initialises and partitions layer by layer. Any
    other way leaves torch's default initialisation in place without an error, so the std is checked.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = {"attn_implementation": model.attention, "dtype": torch.float32}
    try:
        if model.path is not None:
            hf = AutoModelForCausalLM.from_pretrained(model.path, config=config, local_files_only=True, **options)
        else:
            hf = AutoModelForCausalLM.from_config(config, **options)
    except (ValueError, ImportError) as error:  # an attention that the architecture or this machine lacks
        raise UserError(f"the student cannot be built with model.attention {model.attention}: {error}") from error
    if model.path is None:
        rule = initial_weights(model, config)
        draw_weights(hf, seed=seed, residual_std=rule.residual_std)
        check_initial_std(hf, config.get_text_config(), residual_std=rule.residual_std)
        log.info("initial weights: %s", rule.describe())
        if rule.residual_std is not None and not any(True for _ in residual_projections(hf)):
            log.warning("initial weights: no projection of a %s into the residual stream is known", config.model_type)
    if model.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.compile:
        backbone(hf).compile()
    return StudentModel(hf, balance=router_balance(model.router_aux_loss, config))
