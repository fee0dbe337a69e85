"""The student: Hugging Face backbone, distillation head and loss inside one module that DeepSpeed wraps.

The loss is computed inside the wrapped forward, so that ZeRO-3 has gathered the head's weight where the fused op reads
it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from potstill.common.causal_lm import backbone, soft_cap_and_scale
from potstill.common.errors import UserError
from potstill.common.packed import as_lines, takes_one_line
from potstill.kernels.types import LossSums
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.model.head import DistillationHead, SparseLoss
from potstill.student_train.model.initial_weights import initial_weights, residual_projections
from potstill.student_train.model.loss_terms import build_terms, sum_names
from potstill.student_train.model.parameters import check_initial_std, draw_weights
from potstill.student_train.model.requests import Request, Result
from potstill.student_train.model.term import LossTerm, TermInput

log = logging.getLogger(__name__)


class StudentModel(nn.Module):
    """Backbone, head and loss terms in one module, which runs requests (see requests.py)."""

    hf: Any

    def __init__(
        self,
        hf: Any,
        *,
        terms: tuple[LossTerm, ...] = (SparseLoss(),),
        loss_backend: str = "auto",
        fixed_shapes: bool = False,
    ) -> None:
        """`terms`: what TrainRequest adds up, in order; loss_backend: CallOptions.backend of the losses.

        fixed_shapes: of the backbone's input, for a compiled one; else padding is left out where the attention allows.
        """
        super().__init__()
        if not isinstance(getattr(hf, "lm_head", None), nn.Linear) or backbone(hf) is hf:
            raise UserError(
                f"model.config: {type(hf).__name__} is not a backbone and a linear layer named lm_head, which the loss "
                "takes the place of; use another architecture (llama, qwen3, gemma2, mixtral, ... are)"
            )
        soft_cap, scale = soft_cap_and_scale(hf.config.get_text_config())
        hf.lm_head = DistillationHead(hf.lm_head, soft_cap=soft_cap, logit_scale=scale, loss_backend=loss_backend)
        self.hf = hf
        self.terms = terms
        self._fixed_shapes = fixed_shapes
        self.sum_names = sum_names(terms)
        self.term_modules = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))

    def forward(self, request: Request[Result]) -> Result:
        """Run a request where ZeRO-3 has gathered the weights; a collective call there."""
        return request.run(self)

    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """Hidden states before the head [N, D] of the real tokens."""
        return self.run_backbone(micro, with_routers=False)[0]

    def run_backbone(self, micro: MicroBatch, *, with_routers: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states [N, D] of the real tokens, and the router logits of each layer [B * L, experts] if wanted.

        Where the attention takes one line of any length, padding does not pass the backbone: [N, experts] then.
        """
        input_ids, position_ids = as_lines(self.hf.config, micro.input_ids, micro.position_ids)
        index = micro.token_index
        if index is not None and takes_one_line(self.hf.config) and not self._fixed_shapes:
            # Each row still begins at position 0, so the rows stay apart.
            input_ids, position_ids, index = input_ids[:, index], position_ids[:, index], None
        wanted = {"output_router_logits": True} if with_routers else {}
        out = backbone(self.hf)(input_ids=input_ids, position_ids=position_ids, use_cache=False, **wanted)
        hidden: Tensor = out.last_hidden_state.flatten(0, 1)  # [B * L, D]
        hidden = hidden if index is None else hidden[index]
        return hidden, out.router_logits if with_routers else None


@dataclass(frozen=True)
class TrainRequest:
    """The loss of one micro-batch of a step: all terms of the student, added up.

    normalizer: 0-d; what sums over tokens are divided by. num_micro_batches: how many of them this rank adds up to a
    step, which a term that is a mean over micro-batches is divided by. self_check: have terms compare themselves with
    an exact path first (SelfCheckError on a mismatch). kd_scale: 0-d, what KD weights are multiplied by, or None.
    num_sources: of the run.
    """

    micro: MicroBatch
    objective: StepObjective
    normalizer: Tensor
    num_micro_batches: int
    self_check: bool = False
    kd_scale: Tensor | None = None
    num_sources: int = 1

    def run(self, student: StudentModel) -> tuple[Tensor, Tensor]:
        """The loss, 0-d and differentiable, and the detached sums float32 [S], named by `student.sum_names`.

        With several sources, the figures of LossSums of each source follow, [S + sources * 14].
        """
        with_routers = any(term.needs_router_logits for term in student.terms)
        hidden, router_logits = student.run_backbone(self.micro, with_routers=with_routers)
        given = TermInput(
            micro=self.micro,
            objective=self.objective,
            normalizer=self.normalizer,
            num_micro_batches=self.num_micro_batches,
            hidden=hidden,
            router_logits=router_logits,
            head=student.hf.lm_head,
            self_check=self.self_check,
            kd_scale=self.kd_scale,
            source_sums=self._source_sums(hidden),
        )
        losses, sums = zip(*(term.loss(given) for term in student.terms), strict=True)
        for term, found in zip(student.terms, sums, strict=True):
            if found.shape != (len(term.sum_names),):
                raise RuntimeError(
                    f"loss term {type(term).__name__} gave sums of shape {tuple(found.shape)}, expected one for each "
                    f"of {term.sum_names}; correct its loss method"
                )
        loss = losses[0]
        for part in losses[1:]:
            loss = loss + part
        by_source = [] if given.source_sums is None else [given.source_sums.flatten()]
        return loss, torch.cat([found.float() for found in (*sums, *by_source)])

    def _source_sums(self, hidden: Tensor) -> Tensor | None:
        """Zeros [sources, 14] for the figures of each source, in the dtype that the loss adds up in."""
        if self.num_sources == 1:
            return None
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return torch.zeros(self.num_sources, len(LossSums.names()), dtype=dtype, device=hidden.device)


def build_student(model: ModelConfig, config: Any, *, seed: int) -> StudentModel:
    """Random weights from `seed`, or the weights of `model.path`; in float32 (DeepSpeed makes the bfloat16 copy).

    Under ZeRO-3 an HfDeepSpeedConfig must be alive: transformers then initialises and partitions layer by layer. Any
    other way leaves torch's default initialisation in place without an error, so the std is checked.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options: dict[str, Any] = {"attn_implementation": model.attention, "dtype": torch.float32}
    try:
        if model.path is not None:
            place = {"local_files_only": True, "trust_remote_code": False}
            hf = AutoModelForCausalLM.from_pretrained(model.path, config=config, **place, **options)
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights of terms too are those of the seed, at every stage
        terms = build_terms(model, config)
    return StudentModel(hf, terms=terms, loss_backend=model.loss_backend, fixed_shapes=model.compile)
