"""A plain torch loop over potstill's stores: loader -> model -> sparse distillation loss -> optimizer step.

Shows: the loader's order and its state in a checkpoint, micro-batches that are divided by the count of the whole
global batch, the fused loss (no logits [N, V] are kept), and a resume that continues as if nothing had happened.

    python examples/plain_torch_loop.py --tokens data/train --targets targets --model configs/student --output run

Run it again with more --steps: it continues from run/checkpoint.pt. Every step prints one line.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from potstill.kernels.loss import linear_sparse_loss
from potstill.storage import EpochPlan, LoadedBatch, Loader, StoreReader
from potstill.student_train import PackedBatch, collate_rows


def make_loader(tokens_path: Path, targets_path: Path, *, global_batch: int, seed: int) -> Loader:
    """Batches of `global_batch` rows, each with what the teacher says about it."""
    tokens = StoreReader(tokens_path)
    plan = EpochPlan(tokens.num_rows, global_batch=global_batch, seed=seed, joined=["teacher"])
    # Of several ranks each gives its own: Loader(..., rank=rank, world=world_size). The global batches stay the same.
    return Loader(plan, tokens, {"teacher": StoreReader(targets_path)})


def micro_batches(batch: LoadedBatch, rows: int) -> list[PackedBatch]:
    """The batch as tensors, `rows` rows at a time."""
    tokens, targets = batch.tokens, batch.targets("teacher")
    return [collate_rows(tokens[i : i + rows], targets[i : i + rows]) for i in range(0, len(tokens), rows)]


def micro_loss(model: Any, batch: PackedBatch, *, normalizer: torch.Tensor, alpha: float) -> torch.Tensor:
    """This micro-batch's share of the loss: sum over its labelled positions / `normalizer`."""
    hidden = model.base_model(**batch.model_inputs(model.config)).last_hidden_state
    loss, _ = linear_sparse_loss(
        hidden=hidden.flatten(0, 1),
        weight=model.lm_head.weight,
        targets=batch.targets,
        labels=batch.labels.flatten(),
        token_weights=batch.token_weights,
        normalizer=normalizer,
        alpha=alpha,
    )
    return loss


def train_step(
    model: Any, optimizer: torch.optim.Optimizer, batch: LoadedBatch, *, micro_rows: int, alpha: float
) -> float:
    """One optimizer step; returns the loss of the global batch in nats per labelled position."""
    device = model.device
    parts = micro_batches(batch, micro_rows)
    # The count of all micro-batches, not the mean of their means. With several ranks: all-reduce this number, and
    # divide it by the number of ranks where gradients are averaged over them (DistributedDataParallel).
    normalizer = torch.tensor(float(sum(part.num_labels for part in parts)), device=device)
    total = 0.0
    for part in parts:
        loss = micro_loss(model, part.to(device), normalizer=normalizer, alpha=alpha)
        loss.backward()
        total += float(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return total


def save(path: Path, model: Any, optimizer: torch.optim.Optimizer, loader: Loader) -> None:
    """Write everything that the next step depends on; whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": loader.state_dict()}
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def resume(path: Path, model: Any, optimizer: torch.optim.Optimizer, loader: Loader) -> None:
    """Put everything back; the loader refuses the state of other stores, another seed or another batch."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])


def train(options: argparse.Namespace) -> list[float]:
    """Train to `options.steps`, from the checkpoint if there is one; returns the losses of the steps made here."""
    torch.manual_seed(options.seed)
    config = AutoConfig.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_config(config).to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / "checkpoint.pt"
    losses = []
    with make_loader(options.tokens, options.targets, global_batch=options.batch, seed=options.seed) as loader:
        if checkpoint.exists():
            resume(checkpoint, model, optimizer, loader)
            print(f"continues at step {loader.state_dict()['batches']}")
        for batch in loader:  # without an end: epoch after epoch
            if batch.batch >= options.steps:
                break
            losses.append(train_step(model, optimizer, batch, micro_rows=options.micro_batch, alpha=options.alpha))
            loader.commit(batch.batch)  # this alone moves the loader's state: batches read ahead do not count
            print(f"step {batch.batch} loss {losses[-1]:.4f}")
            if (batch.batch + 1) % options.save_every == 0 or batch.batch + 1 == options.steps:
                save(checkpoint, model, optimizer, loader)
    return losses


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens store (potstill prepare)")
    parser.add_argument("--targets", type=Path, required=True, help="targets store of these tokens (potstill dump)")
    parser.add_argument("--model", required=True, help="folder with the student's config.json; weights are drawn anew")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoint.pt")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all (100)")
    parser.add_argument("--batch", type=int, default=8, help="rows per optimizer step (8)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per forward pass (4)")
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the teacher; 1 - alpha is of the labels")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the rows (0)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (50)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
