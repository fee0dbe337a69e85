"""The scalar arguments of a loss call, checked once, and the cheap checks of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from potstill.kernels.divergences import DIVERGENCES, Divergence
from potstill.kernels.types import MISSING_MASS_MODES, KernelInputError, SparseTargetTensors

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TEMPERATURE_SIDES = ("both", "teacher")
LOWEST_OF_BOTH = 1e-3


@dataclass(frozen=True)
class LossSettings:
    """Which loss: w * (alpha T^2 kd_weight KD + ce_weight CE + z_loss lse^2).

    temperature: T, that of the student's logits; it alone scales the loss. teacher_temperature: that of the targets,
    the same number unless the teacher alone is tempered.
    """

    alpha: float
    ce_weight: float
    temperature: float
    teacher_temperature: float
    divergence: str
    options: Mapping[str, float]
    missing_mass: str
    z_loss: float
    soft_cap: float | None
    logit_scale: float

    @property
    def entry(self) -> Divergence:
        return DIVERGENCES[self.divergence]

    @property
    def plain_gradient(self) -> bool:
        """Whether the gradient has a part in the softmax at T = 1 (CE, z-loss)."""
        return self.ce_weight != 0.0 or self.z_loss != 0.0


def check_combination(divergence: str, missing_mass: str) -> None:
    """Raises KernelInputError unless the pair is in the table of divergences."""
    if divergence not in DIVERGENCES:
        raise KernelInputError(f"divergence is {divergence!r}; expected one of {sorted(DIVERGENCES)}")
    if missing_mass not in MISSING_MASS_MODES:
        raise KernelInputError(f"missing_mass is {missing_mass!r}; expected one of {MISSING_MASS_MODES}")
    modes = DIVERGENCES[divergence].modes
    if missing_mass not in modes:
        raise KernelInputError(
            f"divergence {divergence!r} has no finite or sensible value with missing_mass"
            f" {missing_mass!r}; use one of {modes} (docs/kernels.md says why)"
        )


def check_temperature(temperature: float, side: str, divergence: str) -> None:
    """Raises KernelInputError for a temperature that the (known) divergence cannot be taken at on this side."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise KernelInputError(f"temperature is {temperature}; expected a finite number > 0")
    if side not in TEMPERATURE_SIDES:
        raise KernelInputError(f"temperature_side is {side!r}; expected one of {TEMPERATURE_SIDES}")
    entry = DIVERGENCES[divergence]
    if entry.needs_counts and temperature != 1.0:
        raise KernelInputError(f"temperature is {temperature} with divergence {divergence!r}: draws hold at T = 1 only")
    if side == "teacher" and temperature < entry.lowest_teacher_temperature:
        raise KernelInputError(
            f"temperature is {temperature} with temperature_side 'teacher' and divergence {divergence!r}; expected at"
            f" least {entry.lowest_teacher_temperature}: the log-probabilities that it compares grow without bound as"
            " the temperature falls. Use 'forward_kl' for the teacher's argmax as a label"
        )
    if side == "both" and temperature < LOWEST_OF_BOTH:
        raise KernelInputError(
            f"temperature is {temperature} on both sides; expected at least {LOWEST_OF_BOTH}: T^2 leaves next to"
            " nothing of such a loss. Use temperature_side='teacher' for the teacher's argmax as a label"
        )


def make_settings(
    *,
    alpha: float,
    ce_weight: float | None,
    temperature: float,
    temperature_side: str,
    divergence: str,
    missing_mass: str,
    z_loss: float,
    soft_cap: float | None,
    logit_scale: float,
    options: Mapping[str, float] | None,
) -> LossSettings:
    check_combination(divergence, missing_mass)
    ce = 1.0 - float(alpha) if ce_weight is None else float(ce_weight)
    for name, value in (("alpha", alpha), ("ce_weight", ce), ("z_loss", z_loss)):
        if not (math.isfinite(value) and value >= 0):
            raise KernelInputError(f"{name} is {value}; expected a finite number >= 0")
    check_temperature(temperature, temperature_side, divergence)
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise KernelInputError(f"soft_cap is {soft_cap}; expected a number > 0, or None for no cap")
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise KernelInputError(f"logit_scale is {logit_scale}; expected a finite number > 0")
    return LossSettings(
        alpha=float(alpha),
        ce_weight=ce,
        temperature=1.0 if temperature_side == "teacher" else float(temperature),
        teacher_temperature=float(temperature),
        divergence=divergence,
        options=_options(divergence, options),
        missing_mass=missing_mass,
        z_loss=float(z_loss),
        soft_cap=None if soft_cap is None else float(soft_cap),
        logit_scale=float(logit_scale),
    )


def _options(divergence: str, given: Mapping[str, float] | None) -> dict[str, float]:
    options = dict(DIVERGENCES[divergence].options)
    for name, value in (given or {}).items():
        if name not in options:
            raise KernelInputError(
                f"divergence_options names {name!r}; {divergence!r} knows {sorted(options) or 'none'}"
            )
        options[name] = float(value)
    for name, value in options.items():
        if name in ("skew", "beta") and not 0 < value < 1:
            raise KernelInputError(f"divergence option {name} is {value}; expected 0 < {name} < 1")
        if name == "floor" and not (math.isfinite(value) and value < 0):
            raise KernelInputError(f"divergence option floor is {value}; expected a negative number of nats")
    return options


def check_tensor(
    name: str,
    value: Tensor,
    *,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tuple(value.shape) != shape:
        raise KernelInputError(f"{name} has shape {list(value.shape)}; expected {list(shape)}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise KernelInputError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; expected {names}")
    if value.device != device:
        raise KernelInputError(f"{name} is on {value.device}; expected {device} like the logits' side")


def check_targets(
    targets: SparseTargetTensors | None,
    settings: LossSettings,
    *,
    num_tokens: int,
    vocab_size: int,
    device: torch.device,
) -> None:
    """Shapes, dtypes, devices and the pairing with the divergence; values only where they are free to read."""
    if targets is None:
        if settings.alpha != 0.0:
            raise KernelInputError(f"targets is None with alpha {settings.alpha}; pass targets, or alpha=0")
        return
    num_entries = targets.num_entries
    f32, i64 = (torch.float32,), (torch.int64,)
    check_tensor("targets.offsets", targets.offsets, shape=(num_tokens + 1,), dtypes=i64, device=device)
    check_tensor("targets.ids", targets.ids, shape=(num_entries,), dtypes=(torch.int32,), device=device)
    check_tensor("targets.log_tail", targets.log_tail, shape=(num_tokens,), dtypes=f32, device=device)
    if targets.logprobs is not None:
        check_tensor("targets.logprobs", targets.logprobs, shape=(num_entries,), dtypes=f32, device=device)
    if targets.log_weights is not None:
        check_tensor("targets.log_weights", targets.log_weights, shape=(num_entries,), dtypes=f32, device=device)
        if targets.counts is not None or targets.logprobs is not None:
            raise KernelInputError("targets.log_weights stand alone; counts and logprobs must be None beside them")
    if targets.counts is not None and tuple(targets.counts.shape) != (num_entries,):
        raise KernelInputError(f"targets.counts has shape {list(targets.counts.shape)}; expected {[num_entries]}")
    _check_pairing(targets, settings)
    if device.type == "cpu" and num_entries:
        low, high = (int(bound) for bound in targets.ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise KernelInputError(f"targets.ids go from {low} to {high}; expected 0 .. {vocab_size - 1}")


def _check_pairing(targets: SparseTargetTensors, settings: LossSettings) -> None:
    if settings.entry.needs_counts and targets.counts is None and targets.log_weights is None:
        raise KernelInputError(
            f"divergence {settings.divergence!r} needs targets.counts or targets.log_weights (sampled targets)"
        )
    if not settings.entry.needs_counts and targets.logprobs is None:
        raise KernelInputError(
            f"divergence {settings.divergence!r} needs targets.logprobs, and these targets hold draws;"
            " use divergence='sampled'"
        )
    needs_tail = settings.missing_mass in ("tail", "label", "raw")
    if settings.teacher_temperature != 1.0 and needs_tail:
        tail_at(targets, settings.teacher_temperature)


def tail_at(targets: SparseTargetTensors, temperature: float) -> Tensor:
    """log_tail at a temperature (float32 [N]); KernelInputError where the targets do not carry it."""
    if temperature == 1.0:
        return targets.log_tail
    for declared, value in targets.log_tail_at.items():
        if math.isclose(declared, temperature, rel_tol=1e-6):
            return value
    raise KernelInputError(
        f"temperature is {temperature}, but the targets carry tails for {sorted(targets.log_tail_at)} besides"
        " 1.0: the tail at another temperature does not follow from the one at T = 1. Declare the"
        " temperature when dumping, or use missing_mass='renorm' or 'support'"
    )


def validate_targets(targets: SparseTargetTensors, *, vocab_size: int) -> None:
    """The checks that read every entry (and wait for a GPU): ids in range and distinct, values in range."""
    if targets.num_entries == 0:
        return
    counts = targets.offsets.diff()
    if int(targets.offsets[0]) != 0 or int(targets.offsets[-1]) != targets.num_entries or int(counts.min()) < 0:
        raise KernelInputError(f"targets.offsets do not run from 0 up to {targets.num_entries} in steps >= 0")
    row = torch.repeat_interleave(torch.arange(targets.num_tokens, device=targets.device), counts)
    ids = targets.ids.long()
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise KernelInputError(
            f"targets.ids go from {int(ids.min())} to {int(ids.max())}; expected 0 .. {vocab_size - 1}"
        )
    keys, _ = torch.sort(row * vocab_size + ids)
    repeated = (keys[1:] == keys[:-1]).nonzero()
    if repeated.numel():
        key = int(keys[int(repeated[0, 0])])
        raise KernelInputError(f"targets of token {key // vocab_size} name id {key % vocab_size} twice")
    if targets.logprobs is not None:
        mass = torch.zeros(targets.num_tokens, dtype=torch.float64, device=targets.device)
        mass.index_add_(0, row, targets.logprobs.double().exp())
        # Stored values sit on a 1/16-nat grid: 3.2 % each way at most, plus room for rounding.
        bad = ~(mass <= 1.04)
        if bool(bad.any()):
            token = int(bad.nonzero()[0, 0])
            raise KernelInputError(f"targets of token {token} have mass {float(mass[token]):.6g}; expected at most 1")
    if targets.log_weights is not None and not bool(torch.isfinite(targets.log_weights).all()):
        raise KernelInputError("targets.log_weights holds values that are not finite; an id of weight 0 is no entry")
    for value, name in ((targets.log_tail, "log_tail"), (targets.counts, "counts")):
        if value is not None and bool(torch.isnan(value.float()).any()):
            raise KernelInputError(f"targets.{name} holds NaN")
