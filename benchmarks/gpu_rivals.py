"""The variants that gpu_kernels.py measures: ours, and what one would write without us, on one problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu_kernels import eager_loss
from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from potstill.kernels.topk import select_top_k, teacher_topk
from potstill.kernels.types import SparseTargetTensors

ALPHA = 0.5
ERROR_ROWS = 32
Step = Callable[[], object]
Variants = dict[str, tuple[Step, Step | None]]


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
    ids, log_p, tail, labels, temperature = (
        value[:count] if isinstance(value, Tensor) else value for value in problem.naive()
    )
    wide = logits[:count].double().requires_grad_()
    truth = eager_loss(wide, ids, log_p.double(), tail.double(), labels, temperature) * count
    (want,) = torch.autograd.grad(truth, wide)
    difference = gradient(logits)[:count].double() - want
    kept = torch.zeros_like(want, dtype=torch.bool).scatter(1, torch.cat([ids, labels[:, None]], 1), True)
    return tuple(float(difference[mask].norm() / want[mask].norm().clamp_min(1e-300)) for mask in (kept, ~kept))  # type: ignore[return-value]


def logits_variants(problem: Problem) -> Variants:
    """Loss and gradient from given bf16 logits."""
    naive = problem.naive()
    compiled = torch.compile(lambda logits: eager_loss(logits.float(), *naive))
    arguments = {"targets": problem.targets, "labels": problem.labels, "alpha": ALPHA}
    one = torch.ones((), device=problem.hidden.device)
    on_gpu = problem.hidden.is_cuda

    def ours(logits: Tensor, backend: str, *, inplace: bool) -> Tensor:
        leaf = logits.detach().requires_grad_()
        loss, _ = sparse_loss(logits=leaf, backend=backend, inplace=inplace, normalizer=one, **arguments)
        return torch.autograd.grad(loss, leaf)[0]

    def rival(logits: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = logits.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf) * problem.hidden.shape[0], leaf)[0]

    def eager(logits: Tensor) -> Tensor:
        return eager_loss(logits.float(), *naive)

    given = problem.logits()
    backends = ("triton", "triton_compiled", "torch") if on_gpu else ("torch",)
    out: Variants = {}
    for number, backend in enumerate(backends):
        name = "potstill" if number == 0 else f"potstill {backend}"

        def error(backend: str = backend) -> object:
            return gradient_error(problem, lambda x: ours(x, backend, inplace=False))

        # In place the logits of the next repeat are the gradient of this one: other values, the same work.
        out[name] = (lambda backend=backend: ours(given, backend, inplace=True), error)
    out["potstill, not in place"] = (lambda: ours(given, backends[0], inplace=False), None)
    out["eager"] = (lambda: rival(given, eager), lambda: gradient_error(problem, lambda x: rival(x, eager)))
    out["torch.compile"] = (
        lambda: rival(given, compiled),
        lambda: gradient_error(problem, lambda x: rival(x, compiled)),
    )
    return out


def linear_variants(problem: Problem) -> Variants:
    """Loss and gradients from hidden states and a head."""
    naive = problem.naive()
    leaves = (problem.hidden, problem.head)
    arguments = {"targets": problem.targets, "labels": problem.labels, "alpha": ALPHA}

    def ours(backend: str, **options: object) -> object:
        loss, _ = linear_sparse_loss(
            hidden=problem.hidden, weight=problem.head, backend=backend, **arguments, **options
        )
        return torch.autograd.grad(loss, leaves)

    def whole(logits_loss: Callable[..., Tensor]) -> object:
        logits = problem.hidden @ problem.head.t()
        return torch.autograd.grad(logits_loss(logits.float(), *naive), leaves)

    def products() -> object:
        logits = problem.logits()
        return logits @ problem.head, logits.t() @ problem.hidden

    compiled = torch.compile(eager_loss)
    half = (torch.arange(problem.hidden.shape[0], device=problem.hidden.device) % 2).float()
    active = int(half.sum())
    best, *others = ("triton", "triton_compiled") if problem.hidden.is_cuda else ("torch",)
    return {
        "potstill": (lambda: ours(best), None),
        **{f"potstill {name}": (lambda name=name: ours(name), None) for name in others},
        "potstill, half the tokens": (lambda: ours(best, token_weights=half, num_active=active), None),
        "potstill, T = 1, KD alone": (lambda: ours(best, ce_weight=0.0), None),
        "the three products alone": (products, None),
        "eager": (lambda: whole(eager_loss), None),
        "torch.compile": (lambda: whole(compiled), None),
        "chunked CE, V/D chunks": (lambda: chunked_ce(problem, chunk_rows=None), None),
        "chunked CE, 2048 rows": (lambda: chunked_ce(problem, chunk_rows=2048), None),
    }


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


def teacher_variants(problem: Problem) -> Variants:
    """Top k, lse and tail of given bf16 logits (no product)."""
    given = problem.logits()

    def plain() -> object:
        wide = given.float()
        best = torch.topk(wide, problem.k, 1)
        lse = torch.logsumexp(wide, 1)
        return best, lse, torch.log1p(-(best.values - lse[:, None]).exp().sum(1).clamp_max(1 - 1e-7))

    return {
        "potstill": (lambda: teacher_topk(logits=given, k=problem.k), None),
        "potstill + T = 2": (lambda: teacher_topk(logits=given, k=problem.k, temperatures=(2.0,)), None),
        "torch.topk": (plain, None),
    }
