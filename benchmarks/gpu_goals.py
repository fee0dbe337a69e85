"""The goals of the design for the figures of a GPU, by card, and whether a run met them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]
ANY, H100, H200 = "any card", "H100", "H200"
DESIGN_SHAPE = (128256, 2048)
# fp32 gradient of a [128256, 2048] head, and 0.75 GiB.
LINEAR_PEAK_MIB = 4 * 128256 * 2048 / 2**20 + 768


@dataclass(frozen=True)
class Goal:
    """A figure of the design: the part and the place where it is found, and its bound by card.

    `value` raises LookupError where the part's figures do not hold it (yet).
    """

    what: str
    part: str
    value: Callable[[Figures], float]
    bounds: Mapping[str, float]
    at_least: bool = False

    def bound(self, card: str) -> float | None:
        """The bound for a card by its full name; None for a card without goals."""
        for name, bound in self.bounds.items():
            if name == ANY or name in card:
                return bound
        return None

    def verdict(self, found: float, card: str) -> str:
        bound = self.bound(card)
        if bound is None:
            return "no goal for this card"
        return "met" if (found >= bound if self.at_least else found <= bound) else "MISSED"


def kernel_row(figures: Figures, what: str, key: str, *, variant: str = "potstill") -> float:
    """A cell of the kernels' table at the shape that the design names. Raises LookupError without it."""
    for row in figures["rows"]:
        if (row["what"], row["vocabulary"], row["width"], row["variant"]) == (what, *DESIGN_SHAPE, variant):
            if row[key] is None:
                raise LookupError(row["note"] or "not yet")
            return float(row[key])
    raise LookupError(f"no {what} of {variant} at this shape")


def of_kernels(what: str, key: str, variant: str = "potstill") -> Callable[[Figures], float]:
    return lambda figures: kernel_row(figures, what, key, variant=variant)


def half_of_kernels(figures: Figures) -> float:
    half = kernel_row(figures, "linear", "milliseconds", variant="potstill, half the tokens")
    return half / kernel_row(figures, "linear", "milliseconds")


def named(key: str) -> Callable[[Figures], float]:
    """A figure by its JSON name."""

    def value(figures: Figures) -> float:
        if figures.get(key) is None:
            raise LookupError(f"no {key}")
        return float(figures[key])

    return value


def failed_tests(figures: Figures) -> float:
    return float(figures["failed"] + figures["error"])


def both(bound: float) -> dict[str, float]:
    return {H100: bound, H200: bound}


GOALS = (
    Goal("GPU tests that failed", "tests", failed_tests, {ANY: 0}),
    Goal("loss and gradient from logits, ms", "kernels", of_kernels("logits", "milliseconds"), {H100: 2.1, H200: 1.6}),
    Goal("fused linear, forward and backward, ms", "kernels", of_kernels("linear", "milliseconds"), both(18.5)),
    Goal("fused linear, peak over the inputs, MiB", "kernels", of_kernels("linear", "peak_mib"), both(LINEAR_PEAK_MIB)),
    Goal("teacher top-k from logits, ms", "kernels", of_kernels("teacher", "milliseconds"), both(1.5)),
    Goal("distilled step over our label-only step", "step", named("kd_over_ce_by_round"), both(1.05)),
    Goal("distilled step over Liger's label-only step", "step", named("kd_over_liger_ce_by_round"), both(1.05)),
    Goal("distilled step over torch's label-only step", "step", named("kd_over_torch_ce_by_round"), both(1.05)),
    Goal("dump over the bare forward", "dump", named("dump_over_forward"), both(0.97), at_least=True),
    Goal("ZeRO 1, 2, 3: relative difference of a loss", "zero", named("loss_relative_difference"), {ANY: 0.002}),
    Goal("compiled GPU tests that failed", "compiled", failed_tests, {ANY: 0}),
    Goal("driving thread outside of the engine, ms", "step", named("host_ms_per_step"), both(2.0)),
    Goal("half the tokens: fused linear over all", "kernels", half_of_kernels, both(0.6)),
    Goal("half the tokens: head over all", "selector", named("half_selected_head_over_all"), both(0.6)),
)
