"""How much each channel, neuron, head and layer of a model matters, from its activations on a few rows.

Minitron, "Compact Language Models via Pruning and Knowledge Distillation", arXiv 2407.14679, section 2: width by the
size of activations (channels: outputs of the norms; neurons: what enters the last projection of the MLP; heads: the
norm of a head's output), a mean over the positions of a row and then the Euclidean norm over rows; depth by block
influence, 1 - cosine of what enters and what leaves a layer (ShortGPT, arXiv 2403.03853), or by the loss without it.
Forward passes only, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from potstill.kernels.types import IGNORE_LABEL
from potstill.student_train.config.prune import DepthBy
from potstill.student_train.data.packed import PackedBatch


@dataclass(frozen=True)
class Importance:
    """Float64 on the CPU; more is more important.

    channels [H]; neurons [layers, I]; heads [layers, query heads]; layers [layers]; energy: name of a norm -> the mean
    square of each channel that enters it [H] (what the norm divides by is its mean). loss: of the whole model, in nats
    per token with a label.
    """

    channels: Tensor
    neurons: Tensor
    heads: Tensor
    layers: Tensor
    energy: Mapping[str, Tensor]
    loss: float


Batches = Callable[[], Iterable[tuple[PackedBatch, Tensor]]]
"""Yields the rows anew at each call: a batch of B rows and their lengths, int64 [B]."""


def norms_of(model: Any) -> dict[str, Any]:
    """The norms on the residual stream by the name of their module in `model`."""
    names = ("input_layernorm", "post_attention_layernorm", "norm")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in names}


def _hidden(value: Any) -> Tensor:
    """The hidden states of what a layer takes or gives: a tensor, or the first of a tuple."""
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, Tensor)
    return found


@contextmanager
def _removed(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Recorder:
    """Hooks that add up what passes the parts of a model, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.num_positions = 0
        self._mask = torch.zeros(0)

    def follow(self, batches: Iterable[tuple[PackedBatch, Tensor]]) -> Iterator[PackedBatch]:
        """The batches, each known to the hooks before it runs."""
        for batch, lengths in batches:
            inside = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
            self._mask = inside[..., None].float().to(batch.input_ids.device)  # [B, L, 1]
            self.num_positions += int(lengths.sum())
            yield batch

    def attach(self, model: Any, head_dim: int) -> list[Any]:
        """Hook every part; returns what removes the hooks."""
        handles = [module.register_forward_hook(self._norm(name)) for name, module in norms_of(model).items()]
        for number, layer in enumerate(model.model.layers):
            for name, part, size in (
                (f"heads {number}", layer.self_attn.o_proj, lambda x: x.unflatten(-1, (-1, head_dim)).norm(dim=-1)),
                (f"neurons {number}", layer.mlp.down_proj, torch.abs),
            ):
                handles.append(part.register_forward_pre_hook(self._entering(name, size)))
            handles.append(layer.register_forward_hook(self._layer(f"layer {number}")))
        return handles

    def stacked(self, kind: str, count: int) -> Tensor:
        """What was added up under "KIND 0", "KIND 1", ... [count, ...]."""
        return torch.stack([self.sums[f"{kind} {number}"].cpu() for number in range(count)])

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0) + value.double()

    def _add_rows(self, name: str, size: Tensor) -> None:
        """[B, L, X] >= 0: the mean over the real positions of each row, squared and added up over rows."""
        mean = (size * self._mask).sum(1) / self._mask.sum(1)
        self._add(name, mean.square().sum(0))

    def _entering(self, name: str, size: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        return lambda module, given: self._add_rows(name, size(given[0].float()))

    def _norm(self, name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, out: Tensor) -> None:
            self._add_rows(f"{name} out", out.float().abs())
            self._add(f"{name} in", (_hidden(given).float().square() * self._mask).sum((0, 1)))

        return hook

    def _layer(self, name: str) -> Callable[..., None]:
        def hook(module: Any, given: Any, out: Any) -> None:
            cosine = F.cosine_similarity(_hidden(given).float(), _hidden(out).float(), dim=-1)
            self._add(name, ((1 - cosine) * self._mask[..., 0]).sum())

        return hook


@torch.no_grad()
def measure(model: Any, batches: Batches, *, head_dim: int, depth_by: DepthBy) -> Importance:
    """Run the model over the rows, once, and for depth by loss once more without each of its layers."""
    recorder, layers = _Recorder(), model.model.layers
    with _removed(recorder.attach(model, head_dim)):
        loss = mean_loss(model, recorder.follow(batches()))
    if depth_by == "loss":
        depth = torch.tensor([loss_without(model, layer, batches) - loss for layer in layers], dtype=torch.float64)
    else:
        depth = recorder.stacked("layer", len(layers)) / recorder.num_positions
    names, sums = list(norms_of(model)), recorder.sums
    return Importance(
        channels=torch.stack([sums[f"{name} out"].cpu() for name in names]).sqrt().sum(0),
        neurons=recorder.stacked("neurons", len(layers)).sqrt(),
        heads=recorder.stacked("heads", len(layers)).sqrt(),
        layers=depth,
        energy={name: sums[f"{name} in"].cpu() / recorder.num_positions for name in names},
        loss=loss,
    )


@torch.no_grad()
def mean_loss(model: Any, batches: Iterable[PackedBatch]) -> float:
    """Cross-entropy in nats per position with a label."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch.model_inputs(model.config)).logits.flatten(0, 1).float()
        labels = batch.labels.flatten()
        total += float(F.cross_entropy(logits, labels, ignore_index=IGNORE_LABEL, reduction="sum"))
        count += batch.num_labels
    return total / max(count, 1)


def loss_without(model: Any, layer: Any, batches: Batches) -> float:
    """The loss with one layer passed over: it gives what it is given."""
    with _removed([layer.register_forward_hook(lambda module, given, out: given[0])]):
        return mean_loss(model, (batch for batch, _ in batches()))
