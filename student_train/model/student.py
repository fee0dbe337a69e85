"""The student: Hugging Face backbone, distillation head and loss inside one module that DeepSpeed wraps.

The loss is computed inside the wrapped forward, so that ZeRO-3 has gathered the head's weight where the fused op reads
it. The head takes the place of `lm_head`, keeps its parameter names, and without a request still gives logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from potstill.common.causal_lm import backbone, soft_cap_and_scale
from potstill.common.errors import UserError
from potstill.common.packed import as_lines
from potstill.kernels.loss import TokenStatistics, linear_sparse_loss, self_check, token_statistics
from potstill.kernels.types import IGNORE_LABEL, LossSums
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.curriculum.step_objective import StepObjective
from potstill.student_train.curriculum.token_selector import choose
from potstill.student_train.data.batch import MicroBatch
from potstill.student_train.evaluation.calibration import calibration_bins
from potstill.student_train.model.initial_weights import STD_KEY, initial_weights, residual_projections
from potstill.student_train.model.router import RouterBalance, expert_counts, router_balance

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LossRequest:
    """What the head shall do with the hidden states: this batch, this objective, divided by this number."""

    micro: MicroBatch
    objective: StepObjective
    normalizer: Tensor
    self_check: bool = False
    calibrate: bool = False


def divergence_arguments(objective: StepObjective) -> dict[str, Any]:
    """What the kernels call the settings of the KD term."""
    return {
        "temperature": objective.temperature,
        "temperature_side": objective.temperature_side,
        "divergence": objective.divergence,
        "missing_mass": objective.missing_mass,
        "divergence_options": objective.options,
    }


class DistillationHead(nn.Module):
    """Output projection that computes the loss next to its own weight; logits are never kept as [N, V]."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: Any, *, soft_cap: float | None, logit_scale: float) -> None:
        super().__init__()
        self.weight = linear.weight  # the same parameter, so that tied embeddings stay tied
        self.bias = getattr(linear, "bias", None)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.soft_cap = soft_cap
        self.logit_scale = logit_scale

    def finish(self, raw: Tensor) -> Tensor:
        """Scale and cap of the loss on the raw logits [..., V]."""
        logits = self.logit_scale * raw
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)

    def forward(self, hidden: Tensor, request: LossRequest | None = None) -> Any:
        """Logits [..., V] without a request (unscaled, uncapped: the model does that), else (loss, sums)."""
        if request is None:
            return F.linear(hidden, self.weight, self.bias)
        micro, objective = request.micro, request.objective
        token_weights, kd_weights = self.choice(hidden, micro, objective)
        distils = objective.alpha > 0.0
        options: dict[str, Any] = {
            "token_weights": token_weights,
            "kd_weights": kd_weights,
            "alpha": objective.alpha,
            "ce_weight": objective.ce_weight,
            "z_loss": objective.z_loss,
            "soft_cap": self.soft_cap,
            "logit_scale": self.logit_scale,
            "normalizer": request.normalizer,
            "num_active": micro.num_active,
            **(divergence_arguments(objective) if distils else {}),
        }
        tensors = {"hidden": hidden, "weight": self.weight, "bias": self.bias, "labels": micro.labels}
        targets = micro.targets if distils else None
        if request.self_check:
            check_num_active(micro.num_active, token_weights)
            detached = {name: None if value is None else value.detach() for name, value in tensors.items()}
            self_check(**detached, targets=targets, **options)
        loss, sums = linear_sparse_loss(**tensors, targets=targets, **options)
        measured = hidden.shape[0] if objective.tokens is not None and objective.tokens.uses_student else 0
        selection = selection_figures(micro, token_weights, kd_weights, measured=measured)
        figures = [sums.stack().float(), selection]
        if request.calibrate:
            figures.append(
                calibration_bins(
                    hidden,
                    self.weight,
                    self.bias,
                    micro.labels,
                    token_weights,
                    soft_cap=self.soft_cap,
                    logit_scale=self.logit_scale,
                )
            )
        return loss, torch.cat(figures)

    def statistics(self, hidden: Tensor, micro: MicroBatch, objective: StepObjective | None) -> TokenStatistics:
        """Figures of every position [N] without gradients; those against the targets where an objective is given."""
        return token_statistics(
            hidden=hidden.detach(),
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
            labels=micro.labels,
            targets=None if objective is None else micro.targets,
            soft_cap=self.soft_cap,
            logit_scale=self.logit_scale,
            **({} if objective is None else divergence_arguments(objective)),
        )

    @torch.no_grad()
    def choice(self, hidden: Tensor, micro: MicroBatch, objective: StepObjective) -> tuple[Tensor, Tensor | None]:
        """Weights [N] of the positions for the whole loss and for its KD term; unlabelled positions weigh 0."""
        labelled = micro.labels != IGNORE_LABEL
        everywhere = labelled.float()
        choice = objective.tokens
        if choice is None or not choice.uses_student:
            return (everywhere if micro.token_weights is None else micro.token_weights), micro.kd_weights
        needs_targets = choice.selector.entry.needs_targets
        figures = self.statistics(hidden, micro, objective if needs_targets else None)
        columns = {"loss": -figures.label_logprob, "entropy": figures.entropy, **micro.columns}
        if needs_targets:
            columns["divergence"] = figures.divergence
        weights = choose(choice, columns, labelled=labelled, row=micro.row, num_rows=micro.num_rows)
        return (everywhere, weights) if choice.selector.applies_to == "kd" else (weights, None)


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
    figures = [labelled, (token_weights > 0).sum(), (kd > 0).sum(), token_weights.square().sum()]
    return torch.stack([*(figure.float() for figure in figures), token_weights.new_tensor(float(measured)).float()])


ROUTER_NAMES = ("router_aux", "router_batches")  # load balancing loss, and the micro-batches that had one
# Labelled positions, those with weight > 0, those whose KD counts, sum of squared weights, those measured to choose.
SELECTION_NAMES = ("labelled", "positions", "kd_positions", "squared_weight", "measured")
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


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Whole parameters while open, changes kept; does nothing for parameters that ZeRO-3 has not cut."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        yield


@torch.no_grad()
def draw_weights(hf: Any, *, seed: int, residual_std: float | None = None) -> None:
    """Draw the initial weights again, module by module in a fixed order, by the architecture's own rule.

    While ZeRO-3 builds a model its constructors take random numbers that they do not take elsewhere; drawing once
    more makes a seed mean the same weights for every stage and number of ranks (on one kind of device).
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
        with gathered([weight for part in (module, *module.children()) for weight in part.parameters(recurse=False)]):
            owners[id(module)]._init_weights(module)
    if residual_std is not None:
        for _, parameter in residual_projections(hf):
            with gathered([parameter]):
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
        if not 0.8 * std < found < 1.2 * std:
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
