"""Muon for matrices beside AdamW for the rest, also where DeepSpeed hands over flat parts in place of matrices.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; sizes after Liu et al. 2025, arXiv 2502.16982):
    B <- m B + (1 - m) G,    U = (1 - m) G + m B,    W <- (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) orth(U)
where orth sets all singular values near 1 by five Newton-Schulz steps in bfloat16. With the factor 0.2 sqrt(max) an
update is as large as AdamW's (root mean square), so learning rate and weight decay carry over. On whole matrices this
is torch.optim.Muon with adjust_lr_fn match_rms_adamw, bit for bit (a test compares them).

Under ZeRO 1 and 2 a rank holds a slice of the group's matrices laid end to end. B and U are taken element by element,
so each rank keeps its slice of B; then U is gathered in bfloat16 (which orth would round it to anyway), and each rank
orthogonalises the matrices that its slice touches. So every ZeRO stage takes the same step. DeepSpeed's own Muon is not
used: it clips the orthogonalised update instead of the gradient, and compiles its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of the polynomial a x + b x^3 + c x^5 (Jordan et al.): singular values in (0, 1] come to 0.7 to 1.2 in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7
UPDATE_RMS = 0.2  # of AdamW in practice (arXiv 2502.16982, section 2.2)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The matrix [m, n] with its singular values brought near 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.bfloat16().T if tall else matrix.bfloat16()
    found = found / found.norm().clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if tall else found


def matrices_of(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rows, columns) of each matrix in a parameter: one of [m, n], E of the experts' [E, m, n]."""
    *many, rows, columns = shape
    for _ in range(math.prod(many)):
        yield rows, columns


@dataclass(frozen=True)
class Place:
    """Matrix [rows, columns] at the flat elements [start, start + rows * columns) of its group."""

    start: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.start + self.rows * self.columns


def places_of(shapes: Sequence[Sequence[int]]) -> list[Place]:
    """Where the matrices of parameters lie that are laid end to end."""
    found, start = [], 0
    for shape in shapes:
        for rows, columns in matrices_of(shape):
            found.append(Place(start, rows, columns))
            start += rows * columns
    return found


@dataclass(frozen=True)
class FlatPart:
    """What a flat tensor of DeepSpeed holds of its group: the elements from `start` on, the rest on other ranks.

    places: of all matrices of the group; num_ranks: how many equal parts there are (1: this tensor holds all).
    """

    places: tuple[Place, ...]
    start: int
    num_ranks: int


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups with `kind` muon take Muon's step, groups with `kind` adamw that of torch.optim.AdamW.

    One optimizer, because DeepSpeed wraps one. It may be asked to step with some of the groups only.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, adamw: dict[str, Any]) -> None:
        """Each group: params, kind, lr, weight_decay. `adamw`: further options of torch.optim.AdamW."""
        rest = [group for group in groups if group["kind"] == "adamw"]
        self._adamw = torch.optim.AdamW(rest, **adamw) if rest else None
        super().__init__(groups, {"momentum": momentum})
        self.parts: dict[Tensor, FlatPart] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the groups in `param_groups`; a collective call where DeepSpeed has cut the matrices."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"] if group["kind"] == "muon" else ():
                if parameter.grad is not None:
                    self._muon(parameter, group)
        if self._adamw is not None:
            # Loading a checkpoint, and DeepSpeed, put other lists in place of these.
            self._adamw.param_groups = [group for group in self.param_groups if group["kind"] == "adamw"]
            self._adamw.state = self.state
            self._adamw.step()
        return loss

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        update = grad.lerp(state["momentum_buffer"], momentum).bfloat16()
        part = self.parts.get(parameter)
        if part is None and parameter.dim() < 2:
            raise RuntimeError(
                f"Muon was given a tensor of shape {tuple(parameter.shape)} and not told which matrices it holds; "
                "this is a defect of potstill, please report it with zero_stage and model.dtype"
            )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if part is None:
            part = FlatPart(tuple(places_of([parameter.shape])), 0, 1)
        flat, whole = parameter.view(-1), gathered_update(update.reshape(-1), part.num_ranks)
        end = part.start + flat.numel()
        for place in part.places:
            first, last = max(place.start, part.start), min(place.end, end)
            if first >= last:
                continue
            matrix = whole[place.start : place.end].view(place.rows, place.columns)
            step = orthogonalized(matrix).reshape(-1)[first - place.start : last - place.start]
            size = group["lr"] * UPDATE_RMS * math.sqrt(max(place.rows, place.columns))
            flat[first - part.start : last - part.start].add_(step, alpha=-size)


def gathered_update(part: Tensor, num_ranks: int) -> Tensor:
    """All ranks' parts [n] bfloat16 one after another [num_ranks * n]; a collective call for more than one rank."""
    if num_ranks == 1:
        return part
    whole = part.new_empty(num_ranks * part.numel())
    # As bytes: not every backend moves bfloat16.
    torch.distributed.all_gather_into_tensor(whole.view(torch.uint8), part.contiguous().view(torch.uint8))
    return whole
