"""The variants that gpu_kernels.py measures: ours, and what one would write without us, on one problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_kernels import eager_loss
from benchmarks.fused_ce import Rival, liger, torch_fused, torch_plain
from benchmarks.replaced import replaced
from potstill.kernels import fused_linear
from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from potstill.kernels.topk import select_top_k, teacher_topk
from potstill.kernels.types import SparseTargetTensors

ALPHA = 0.5
ERROR_ROWS = 32
Step = Callable[[], object]
Errors = Callable[[], tuple[float, float]]
BOTH, CE, PRODUCTS, TOP_K = "CE + sparse KL", "CE only", "products only", "top k, lse, tail"
COMPILE_SECONDS = 40.0


@dataclass(frozen=True)
class Variant:
    """One way to compute one thing.

    Lower `worth` is measured first; `step` is None with a `note` where it cannot run here. `needs_seconds`: not begun
    with less than this left (a compilation cannot be broken off). `profiled`: launches and the GPU's busy time too.
    """

    what: str  # "logits", "linear", "teacher", "teacher hidden"
    name: str
    computes: str
    worth: int
    step: Step | None
    errors: Errors | None = None
    profiled: bool = False
    needs_seconds: float = 0.0
    note: str = ""


@dataclass
class Problem:
    """Inputs of one size: hidden [N, D] and head [V, D] in bf16, targets of k ids, labels."""

    hidden: Tensor
    head: Tensor
    targets: SparseTargetTensors
    labels: Tensor
    k: int

    @property
    def vocabulary(self) -> int:
        return self.head.shape[0]

    @property
    def width(self) -> int:
        return self.head.shape[1]

    @property
    def product_flops(self) -> int:
        """The three products of loss and gradient."""
        return 6 * self.hidden.shape[0] * self.head.numel()

    @property
    def loss_bytes(self) -> int:
        """Two passes over bf16 logits: read; read and write."""
        return 6 * self.hidden.shape[0] * self.vocabulary

    @property
    def teacher_bytes(self) -> int:
        """One read of bf16 logits."""
        return 2 * self.hidden.shape[0] * self.vocabulary

    @classmethod
    def make(cls, *, tokens: int, vocabulary: int, width: int, k: int, device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(vocabulary + width)

        def normal(*shape: int, scale: float) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
            return (values * scale).to(torch.bfloat16)

        hidden, head = normal(tokens, width, scale=1.0), normal(vocabulary, width, scale=3.0 / width**0.5)
        teacher = normal(tokens, width, scale=1.0)  # another mind with the same head
        best = teacher_topk(hidden=teacher, weight=head, k=k)
        labels = torch.randint(0, vocabulary, (tokens,), generator=generator, device=device)
        return cls(hidden.requires_grad_(), head.requires_grad_(), select_top_k(best, k), labels, k)

    def naive(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """What eager_loss takes besides logits: ids, log p, log tail, labels, temperature."""
        shape = (self.hidden.shape[0], self.k)
        assert self.targets.logprobs is not None and self.targets.log_tail is not None
        ids, log_p = self.targets.ids.view(shape).long(), self.targets.logprobs.view(shape)
        norm = torch.logaddexp(log_p.logsumexp(1), self.targets.log_tail)
        return ids, log_p - norm[:, None], self.targets.log_tail - norm, self.labels, 1.0

    def logits(self) -> Tensor:
        with torch.no_grad():
            return self.hidden @ self.head.t()


def gradient_error(problem: Problem, gradient: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Relative error by float64 autograd on some rows: (on kept ids and label, on all other entries).

    `gradient(logits)` gives the gradient of the sum over all rows of the loss by bf16 logits [N, V].
    """
    count = min(ERROR_ROWS, problem.hidden.shape[0])
    logits = problem.logits()
    *tensors, temperature = problem.naive()
    ids, log_p, tail, labels = (value[:count] for value in tensors if isinstance(value, Tensor))
    wide = logits[:count].double().requires_grad_()
    truth = eager_loss(wide, ids, log_p.double(), tail.double(), labels, float(temperature)) * count
    (want,) = torch.autograd.grad(truth, wide)
    difference = gradient(logits)[:count].double() - want
    kept = torch.zeros_like(want, dtype=torch.bool).scatter(1, torch.cat([ids, labels[:, None]], 1), True)
    return tuple(float(difference[mask].norm() / want[mask].norm().clamp_min(1e-300)) for mask in (kept, ~kept))  # type: ignore[return-value]


def backends(problem: Problem) -> tuple[str, ...]:
    """Ours on this device, the default first."""
    return ("triton", "triton_compiled", "torch") if problem.hidden.is_cuda else ("torch",)


def logits_variants(problem: Problem) -> list[Variant]:
    """Loss and gradient from given bf16 logits."""
    naive = problem.naive()
    compiled = torch.compile(lambda logits: eager_loss(logits.float(), *naive))
    arguments = {"targets": problem.targets, "labels": problem.labels, "alpha": ALPHA}
    one = torch.ones((), device=problem.hidden.device)
    given = problem.logits()

    def ours(logits: Tensor, backend: str, *, inplace: bool) -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss, _ = sparse_loss(logits=leaf, backend=backend, inplace=inplace, normalizer=one, **arguments)
        return torch.autograd.grad(loss, leaf)[0]

    def own(name: str, backend: str, worth: int, *, inplace: bool = True, needs_seconds: float = 0.0) -> Variant:
        # In place the logits of the next repeat are the gradient of this one: other values, the same work.
        step = partial(ours, given, backend, inplace=inplace)
        errors = partial(gradient_error, problem, partial(ours, backend=backend, inplace=False)) if inplace else None
        return Variant("logits", name, BOTH, worth, step, errors, worth == 0, needs_seconds)

    def rival(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf) * problem.hidden.shape[0], leaf)[0]

    def other(name: str, worth: int, loss: Callable[[Tensor], Tensor], *, needs_seconds: float = 0.0) -> Variant:
        errors = partial(gradient_error, problem, partial(rival, loss))
        step = partial(rival, loss, given)
        return Variant("logits", name, BOTH, worth, step, errors, needs_seconds=needs_seconds)

    default, *slower = backends(problem)
    out = [
        own("potstill", default, 0),
        own("potstill, not in place", default, 4, inplace=False),
        other("eager", 5, lambda logits: eager_loss(logits.float(), *naive)),
        other("torch.compile", 6, compiled, needs_seconds=COMPILE_SECONDS),
    ]
    for backend in slower:
        needs_seconds = COMPILE_SECONDS if backend.endswith("compiled") else 0.0
        out.append(own(f"potstill {backend}", backend, 7, needs_seconds=needs_seconds))
    return out


def linear_variants(problem: Problem) -> list[Variant]:
    """Loss and gradients from hidden states and a head."""
    naive = problem.naive()
    leaves = (problem.hidden, problem.head)
    arguments = {"targets": problem.targets, "labels": problem.labels, "alpha": ALPHA}

    def ours(backend: str, **options: object) -> object:
        loss, _ = linear_sparse_loss(
            hidden=problem.hidden, weight=problem.head, backend=backend, **arguments, **options
        )
        return torch.autograd.grad(loss, leaves)

    def labels_alone() -> object:
        loss, _ = linear_sparse_loss(
            hidden=problem.hidden, weight=problem.head, targets=None, labels=problem.labels, alpha=0.0
        )
        return torch.autograd.grad(loss, leaves)

    def whole(logits_loss: Callable[..., Tensor]) -> object:
        logits = problem.hidden @ problem.head.t()
        return torch.autograd.grad(logits_loss(logits.float(), *naive), leaves)

    def products() -> object:
        logits = problem.logits()
        return logits @ problem.head, logits.t() @ problem.hidden

    keeps = fused_linear.KEEPS_LAST_CHUNK
    other_way = "added up in the forward" if keeps else "kept for the backward"

    def ours_the_other_way() -> object:
        with replaced(fused_linear, "KEEPS_LAST_CHUNK", not keeps):
            return ours(best)

    compiled = torch.compile(eager_loss)
    half = (torch.arange(problem.hidden.shape[0], device=problem.hidden.device) % 2).float()
    active = int(half.sum())
    best = backends(problem)[0]

    def variant(name: str, computes: str, worth: int, step: Step, *, needs_seconds: float = 0.0) -> Variant:
        profiled = name in ("potstill", "potstill, labels alone")
        return Variant("linear", name, computes, worth, step, profiled=profiled, needs_seconds=needs_seconds)

    def ours_compiled() -> object:
        return ours("triton_compiled")

    out = [
        variant("potstill", BOTH, 0, lambda: ours(best)),
        variant("the three products alone", PRODUCTS, 1, products),
        variant("potstill, labels alone", CE, 2, labels_alone),
        variant(f"potstill, last chunk {other_way}", BOTH, 2, ours_the_other_way),
        variant("potstill, half the tokens", BOTH, 3, lambda: ours(best, token_weights=half, num_active=active)),
        variant("potstill, KD alone", BOTH, 4, lambda: ours(best, ce_weight=0.0)),
        variant("chunked CE, V/D chunks", CE, 5, lambda: chunked_ce(problem, chunk_rows=None)),
        variant("chunked CE, 2048 rows", CE, 5, lambda: chunked_ce(problem, chunk_rows=2048)),
        variant("eager", BOTH, 5, lambda: whole(eager_loss)),
        variant("torch.compile", BOTH, 6, lambda: whole(compiled), needs_seconds=COMPILE_SECONDS),
    ]
    if "triton_compiled" in backends(problem):
        out.append(variant("potstill triton_compiled", BOTH, 7, ours_compiled, needs_seconds=COMPILE_SECONDS))
    return [*out, *(rival_variant(problem, name, make, worth) for name, make, worth in RIVALS)]


# The name in the table, what makes it (None where this machine lacks it), and its worth.
RIVALS: tuple[tuple[str, Callable[[], Rival | None], int], ...] = (
    ("Liger fused CE", lambda: liger(wide=False), 1),
    ("Liger fused CE, dW in float32", lambda: liger(wide=True), 3),
    ("torch linear_cross_entropy", torch_fused, 3),
    ("torch CE of all logits", torch_plain, 5),
)


def rival_variant(problem: Problem, name: str, make: Callable[[], Rival | None], worth: int) -> Variant:
    """Somebody else's label loss with its gradients, or the note that it is not here."""
    rival = make()
    if rival is None:
        return Variant("linear", name, CE, worth, None, note="not in this Python")
    if name.startswith("Liger") and not problem.hidden.is_cuda:
        return Variant("linear", name, CE, worth, None, note="needs a GPU")

    def step() -> object:
        loss = rival.loss(problem.hidden, problem.head, problem.labels) / problem.hidden.shape[0]
        return torch.autograd.grad(loss, (problem.hidden, problem.head))

    return Variant("linear", name, CE, worth, step, profiled=worth == 1)


@torch.no_grad()
def chunked_ce(problem: Problem, *, chunk_rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Label cross-entropy in the shape of Liger's fused linear CE (own code): V / D chunks, gradient in the
    forward, weight gradient summed in the head's dtype."""
    hidden, head = problem.hidden, problem.head
    num_tokens = hidden.shape[0]
    if chunk_rows is None:
        chunks = max(1, -(-problem.vocabulary // problem.width))
        chunk_rows = max(1, 1 << max(0, (num_tokens // chunks - 1)).bit_length())
    total = hidden.new_zeros((), dtype=torch.float32)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    for start in range(0, num_tokens, chunk_rows):
        rows = slice(start, start + chunk_rows)
        logits = hidden[rows] @ head.t()
        log_q = F.log_softmax(logits.float(), 1)
        label = problem.labels[rows, None]
        total -= log_q.gather(1, label).sum()
        slab = log_q.exp_().scatter_add_(1, label, log_q.new_full(label.shape, -1.0))
        slab = (slab / num_tokens).to(head.dtype)
        grad_hidden[rows] = slab @ head
        grad_head.addmm_(slab.t(), hidden[rows])
    return total / num_tokens, grad_hidden, grad_head


def teacher_variants(problem: Problem) -> list[Variant]:
    """Top k, lse and tail of given bf16 logits, and of hidden states and a head."""
    given = problem.logits()
    hidden, head = problem.hidden.detach(), problem.head.detach()

    def plain() -> object:
        wide = given.float()
        best = torch.topk(wide, problem.k, 1)
        lse = torch.logsumexp(wide, 1)
        return best, lse, torch.log1p(-(best.values - lse[:, None]).exp().sum(1).clamp_max(1 - 1e-7))

    def two() -> object:
        return teacher_topk(logits=given, k=problem.k, temperatures=(2.0,))

    return [
        Variant("teacher", "potstill", TOP_K, 0, lambda: teacher_topk(logits=given, k=problem.k), profiled=True),
        Variant("teacher", "torch.topk", TOP_K, 3, plain),
        Variant("teacher", "potstill + T = 2", TOP_K, 4, two),
        Variant(
            "teacher hidden",
            "potstill",
            TOP_K,
            2,
            lambda: teacher_topk(hidden=hidden, weight=head, k=problem.k),
            profiled=True,
        ),
        Variant("teacher hidden", "the product alone", PRODUCTS, 2, lambda: hidden @ head.t()),
    ]
