"""The Hugging Face Trainer over potstill's stores: a data set, a data collator and a `compute_loss`.

Shows: rows joined with the teacher's targets as a map-style data set, packed rows without an attention mask, and a
loss that is right under gradient accumulation and on several GPUs: the Trainer counts the labels of the global batch,
and every micro-batch divides by that count.

    python examples/hf_trainer.py --tokens data/train --targets targets --model configs/student --output run

The loss works on the model's own logits, because the Trainer may wrap the model (DistributedDataParallel, FSDP,
DeepSpeed), and a wrapped model must be called as a whole. Start one process per GPU: torchrun --nproc-per-node 8 ...
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from potstill.kernels.loss import sparse_loss
from potstill.storage import RowDataset, RowSample, StoreReader
from potstill.student_train import PackedBatch, collate_rows


def collate(samples: Sequence[RowSample]) -> dict[str, Any]:
    """Micro-batch as the Trainer wants it: a dictionary whose `labels` it can count."""
    batch = collate_rows([sample.tokens for sample in samples], [sample.targets("teacher") for sample in samples])
    # The labels stand at the position that predicts them. `shift_labels` says so: from `labels` alone the Trainer
    # would take the first column off before it counts, as for labels that the model still has to shift.
    return {**vars(batch), "shift_labels": batch.labels}


class DistillationTrainer(Trainer):
    """Trainer whose loss is alpha * KL(teacher, student) + (1 - alpha) * cross-entropy, per labelled position."""

    # compute_loss divides by the count of the whole accumulated batch, so that nothing is left to divide by.
    loss_is_scaled_for_ga = True

    def __init__(self, *, alpha: float, **options: Any) -> None:
        super().__init__(**options)
        if self.args.n_gpu > 1:
            raise ValueError(f"{self.args.n_gpu} GPUs in one process: start one process per GPU (torchrun)")
        self.alpha = alpha

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Sum over this micro-batch / labels of the global batch, `num_items_in_batch` (None: of this micro-batch)."""
        batch = PackedBatch(**{name: value for name, value in inputs.items() if name != "shift_labels"})
        batch = batch.to(self.args.device)
        outputs = model(**batch.model_inputs(self.model.config))
        count = batch.num_labels if num_items_in_batch is None else num_items_in_batch
        loss, _ = sparse_loss(
            logits=outputs.logits.flatten(0, 1),
            targets=batch.targets,
            labels=batch.labels.flatten(),
            token_weights=batch.token_weights,
            normalizer=torch.as_tensor(count, dtype=torch.float32, device=self.args.device),
            alpha=self.alpha,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # the ranks' gradients are averaged, the count is of all ranks
        return (loss, outputs) if return_outputs else loss


def train(options: argparse.Namespace) -> Trainer:
    """Train a new model of the given configuration; returns the Trainer."""
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model))
    data = RowDataset(StoreReader(options.tokens), {"teacher": StoreReader(options.targets)})
    settings = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.lr,
        seed=options.seed,
        remove_unused_columns=False,  # the Trainer does not know the names that compute_loss uses
        logging_steps=options.log_every,
        report_to=[],
    )
    trainer = DistillationTrainer(
        alpha=options.alpha, model=model, args=settings, train_dataset=data, data_collator=collate
    )
    trainer.train()
    trainer.save_model()
    return trainer


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens store (potstill prepare)")
    parser.add_argument("--targets", type=Path, required=True, help="targets store of these tokens (potstill dump)")
    parser.add_argument("--model", required=True, help="folder with the student's config.json; weights are drawn anew")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the trained model")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows per forward pass and process (4)")
    parser.add_argument("--accumulation", type=int, default=2, help="forward passes per optimizer step (2)")
    parser.add_argument("--alpha", type=float, default=0.9, help="weight of the teacher; 1 - alpha is of the labels")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="initial weights and order of the rows (0)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of the log (10)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    train(parse())
