"""Which loss: the scalar options, checked once, and the rules that say which of them go together.

Each option is one field of LossSettings. Each rule stands here once; whoever reads options from elsewhere (from a
configuration, of a store) calls it and adds where the option came from.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from potstill.kernels.divergences import DIVERGENCES, Divergence
from potstill.kernels.types import MISSING_MASS_MODES, KernelInputError

TEMPERATURE_SIDES = ("both", "teacher")
OFF_KD = ("nothing", "ce")  # what a token counts whose KD is off, beside ce_weight
LOWEST_OF_BOTH = 1e-3
MODES_WITH_TAIL = ("tail", "label", "raw")  # they read the stored tail; renorm and support need none


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """w * (alpha T^2 kd_weight KD + ce CE + z_loss lse^2), T the student's temperature.

    Made once per optimizer step and carried whole. Numbers become floats. Raises KernelInputError that names the field.

    alpha: weight of the divergence KD, >= 0.
    ce_weight: weight of the cross-entropy with the label, >= 0; None: 1 - alpha.
    off_kd: a token whose KD is off (kd_weight 0, or no target is stored for it) has CE with ce_weight all the same
        ("nothing"), or with ce_weight + alpha ("ce"): with ce_weight 1 - alpha it then counts as in plain next-token
        training. Weights of KD between 0 and 1 change nothing of CE.
    temperature: of the targets, and of the student's logits: T^2 then multiplies the KD term's loss and gradient alike.
    temperature_side: "both", or "teacher" to temper the targets alone; the student stays at 1, and so there is no T^2.
        Near 0 the target is the teacher's argmax (1e-20 will do; equals share).
    divergence: a name in DIVERGENCES. divergence_options: its constants (skew, beta, floor); None: the table's.
    missing_mass: where the teacher's mass outside its entries goes, see docs/kernels.md.
    z_loss: weight of lse^2 at T = 1, >= 0.
    soft_cap, logit_scale: z = cap * tanh(scale * raw / cap), None: no cap. They belong to a head, not to a step: the
        passes over the logits need them beside the rest, so a head adds its own with `for_head`.
    """

    alpha: float = 1.0
    ce_weight: float | None = None
    off_kd: str = "nothing"
    temperature: float = 1.0
    temperature_side: str = "both"
    divergence: str = "forward_kl"
    divergence_options: Mapping[str, float] | None = None
    missing_mass: str = "tail"
    z_loss: float = 0.0
    soft_cap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "ce_weight", "temperature", "z_loss", "soft_cap", "logit_scale"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        check_combination(self.divergence, self.missing_mass)
        for name, weight in (("alpha", self.alpha), ("ce_weight", self.label_weight), ("z_loss", self.z_loss)):
            if not (math.isfinite(weight) and weight >= 0):
                raise KernelInputError(f"{name} is {weight}; expected a finite number >= 0")
        if self.off_kd not in OFF_KD:
            raise KernelInputError(f"off_kd is {self.off_kd!r}; expected one of {OFF_KD}")
        check_temperature(self.temperature, self.temperature_side, self.divergence)
        check_scale_and_cap(logit_scale=self.logit_scale, soft_cap=self.soft_cap)
        _check_options(self.divergence, self.constants)

    @property
    def label_weight(self) -> float:
        """The weight of the cross-entropy, with 1 - alpha for None."""
        return 1.0 - self.alpha if self.ce_weight is None else self.ce_weight

    @property
    def off_weight(self) -> float:
        """What the cross-entropy of a token whose KD is off weighs beyond `label_weight`."""
        return self.alpha if self.off_kd == "ce" else 0.0

    @property
    def student_temperature(self) -> float:
        """T of the student's logits; it alone scales the loss. That of the targets is `temperature` on either side."""
        return 1.0 if self.temperature_side == "teacher" else self.temperature

    @property
    def entry(self) -> Divergence:
        """The divergence's entry in the table."""
        return DIVERGENCES[self.divergence]

    @property
    def constants(self) -> dict[str, float]:
        """The divergence's constants, those that are not given as in the table."""
        given = self.divergence_options or {}
        return {**self.entry.options, **{name: float(value) for name, value in given.items()}}

    @property
    def plain_gradient(self) -> bool:
        """Whether the gradient has a part in the softmax at T = 1 (CE, z-loss), for any token."""
        return self.label_weight != 0.0 or self.off_weight != 0.0 or self.z_loss != 0.0

    @property
    def needs_tail(self) -> bool:
        """Whether the teacher's mass outside its entries is read."""
        return self.missing_mass in MODES_WITH_TAIL

    def for_head(self, *, soft_cap: float | None, logit_scale: float) -> "LossSettings":
        """These settings for a head that caps and scales its logits."""
        return replace(self, soft_cap=soft_cap, logit_scale=logit_scale)

    def without_kd(self) -> "LossSettings":
        """The label terms alone, of tokens without targets: alpha 0, and what belongs to the divergence by default.

        A student's logits are then streamed at T = 1 only, whatever the KD term that counts nothing would ask for.
        """
        return LossSettings(
            alpha=0.0,
            ce_weight=self.label_weight + self.off_weight,
            z_loss=self.z_loss,
            soft_cap=self.soft_cap,
            logit_scale=self.logit_scale,
        )


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


def check_scale_and_cap(*, logit_scale: float, soft_cap: float | None) -> None:
    """Raises KernelInputError unless both are finite numbers > 0 (or the cap None)."""
    if soft_cap is not None and not (math.isfinite(soft_cap) and soft_cap > 0):
        raise KernelInputError(f"soft_cap is {soft_cap}; expected a finite number > 0, or None for no cap")
    if not (math.isfinite(logit_scale) and logit_scale > 0):
        raise KernelInputError(f"logit_scale is {logit_scale}; expected a finite number > 0")


def stored_temperature(temperature: float, stored: Iterable[float]) -> float | None:
    """The one of the `stored` temperatures that `temperature` means; None where there is none."""
    return next((known for known in stored if math.isclose(known, temperature, rel_tol=1e-6)), None)


def _check_options(divergence: str, constants: Mapping[str, float]) -> None:
    known = DIVERGENCES[divergence].options
    for name, value in constants.items():
        if name not in known:
            raise KernelInputError(f"divergence_options names {name!r}; {divergence!r} knows {sorted(known) or 'none'}")
        if name in ("skew", "beta") and not 0 < value < 1:
            raise KernelInputError(f"divergence option {name} is {value}; expected 0 < {name} < 1")
        if name == "floor" and not (math.isfinite(value) and value < 0):
            raise KernelInputError(f"divergence option floor is {value}; expected a negative number of nats")
