"""`potstill prune`: measure a model on some rows, cut it, write a Hugging Face folder for a student to start from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from potstill.common.disk_room import room_for
from potstill.common.errors import UserError
from potstill.common.token_table import tokenizer_digest
from potstill.storage import StoreReader
from potstill.student_train.config.prune import PruneConfig
from potstill.student_train.data.opening import open_store
from potstill.student_train.data.packed import PackedBatch, collate_rows
from potstill.student_train.data.store_tokenizer import read_tokenizer, tokenizers_beside
from potstill.student_train.evaluation.folder import model_vocabulary
from potstill.student_train.hf_export.hf_folder import (
    CARD_FILE,
    check_in_fresh_process,
    check_output_dir,
    copy_tokenizer,
    restore_use_cache,
)
from potstill.student_train.hf_export.weights import Source, find_source, load_model
from potstill.student_train.model.parameters import DTYPES, count_parameters
from potstill.student_train.pruning.card import PruneFacts, prune_card
from potstill.student_train.pruning.cutting import Kept, choose, cut, norm_factors
from potstill.student_train.pruning.importance import Importance, mean_loss, measure
from potstill.student_train.pruning.shape import Shape, shape_of, wanted_shape
from potstill.student_train.run.checkpoint import write_json_atomically, write_text_atomically
from potstill.student_train.run.run_folder import read_run_config

PRUNE_FILE = "potstill_prune.json"  # what was kept, and what it was chosen by


@dataclass(frozen=True)
class PruneSummary:
    """What was written. Losses in nats per token on the calibration rows, before and after, untrained."""

    output_dir: Path
    shapes: tuple[Shape, Shape]
    num_parameters: tuple[int, int]
    losses: tuple[float, float]
    layers: list[int]
    tokenizer: Path | None
    logits_difference: float | None

    def format(self) -> str:
        """A few lines for a person."""
        whole, smaller = (shape.as_dict() for shape in self.shapes)
        sizes = ", ".join(f"{name} {size} of {whole[name]}" for name, size in smaller.items() if size != whole[name])
        check = "not checked" if self.logits_difference is None else f"{self.logits_difference:.3g} in a fresh process"
        before, after = self.num_parameters
        return (
            f"pruned to {self.output_dir}: {after:,} of {before:,} parameters\n"
            f"  kept: {sizes or 'everything'}\n"
            f"  loss on the calibration rows, untrained: {self.losses[1]:.4g} (whole model {self.losses[0]:.4g})\n"
            f"  largest difference of logits: {check}\n"
            f"  tokenizer: {self.tokenizer or 'not known; copy it beside the weights'}\n"
            f"  train it: potstill train --preset pruned --model {self.output_dir} ..."
        )


def prune(config: PruneConfig) -> PruneSummary:
    """Write `config.output_dir`, whole or not at all. Raises UserError."""
    reads = {"model": config.model, "tokens": config.tokens}
    check_output_dir(config.output_dir, force=config.force, reads=reads)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokens, source = open_store(config.tokens, "tokens", "tokens"), find_source(config.model)
    model = _load(source, tokens, config)
    whole = shape_of(model.config)
    wanted = wanted_shape(config, whole)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = calibration_rows(tokens, config.calibration_rows)

    def batches() -> Iterator[tuple[PackedBatch, Tensor]]:
        for start in range(0, len(rows), config.batch_rows):
            found = tokens.tokens_rows(rows[start : start + config.batch_rows])
            yield collate_rows(found).to(device), torch.tensor([len(row.tokens) for row in found])

    importance = measure(model.to(device), batches, head_dim=whole.head_dim, depth_by=config.depth_by)
    kept = choose(importance, whole, wanted)
    smaller = cut(model, kept, whole, wanted, norm_factors(importance, kept))
    model.cpu()
    loss = mean_loss(smaller.to(device), (batch for batch, _ in batches()))
    dtype = config.dtype or _stored_dtype(source)
    facts = PruneFacts(
        title=config.output_dir.name,
        model=config.model.name,
        shapes=(whole, wanted),
        num_parameters=(count_parameters(model), count_parameters(smaller)),
        losses=(importance.loss, loss),
        depth_by=config.depth_by,
        layers=kept.layers.tolist(),
        calibration_rows=len(rows),
        tokens_digest=tokens.digest,
        dtype=dtype,
    )
    tokenizer = _tokenizer(config, source, tokens)
    difference = _write(config, _cast(smaller.cpu(), dtype), facts, _record(facts, kept, importance), tokenizer)
    return PruneSummary(
        config.output_dir, facts.shapes, facts.num_parameters, facts.losses, facts.layers, tokenizer, difference
    )


def calibration_rows(tokens: StoreReader, count: int) -> np.ndarray:
    """Ids of `count` rows spread evenly over a store, or of all where it has fewer (int64)."""
    return np.unique(np.linspace(0, tokens.num_rows - 1, min(count, tokens.num_rows)).astype(np.int64))


def _load(source: Source, tokens: StoreReader, config: PruneConfig) -> Any:
    """The model in float32 on the CPU, seen to fit the rows. Raises UserError."""
    if model_vocabulary(source, None) is not None:
        raise UserError(
            f"model {config.model} has a vocabulary of its own (data.vocabulary of its run), so that the rows of "
            "tokens are other text to it; prune its teacher, or the export of a run in the vocabulary of the rows"
        )
    if config.check_tokenizer:
        _check_tokenizer(source, tokens, config)
    model = load_model(source, dtype="float32")
    if source.checkpoint is not None:
        restore_use_cache(model, read_run_config(source.run).model)
    shape_of(model.config)  # refuses an unknown architecture before its keys are read
    if model.config.vocab_size < tokens.vocab_size:
        raise UserError(
            f"model {config.model} has vocab_size {model.config.vocab_size}, the rows of tokens ids below "
            f"{tokens.vocab_size}; they were not made with the same tokenizer"
        )
    if model.config.max_position_embeddings < tokens.spec.row_length:
        raise UserError(
            f"model {config.model} reads at most {model.config.max_position_embeddings} positions, the rows of tokens "
            f"hold {tokens.spec.row_length}; prepare shorter rows"
        )
    return model


def _check_tokenizer(source: Source, tokens: StoreReader, config: PruneConfig) -> None:
    """Raise UserError where the model's folder has a tokenizer that is not that of the rows.

    Rows of other ids run as well, and what is important would be measured on nonsense.
    """
    if source.checkpoint is not None or not (source.folder / "tokenizer.json").is_file():
        return  # a run has no tokenizer of its own here, and a folder without one says nothing
    found = tokenizer_digest(read_tokenizer(source.folder))
    if found != tokens.spec.tokenizer_digest:
        raise UserError(
            f"model {config.model} has a tokenizer with the digest {found[:16]}, the rows of {tokens.url} were made "
            f"with {tokens.spec.tokenizer_digest[:16]}; name rows made with the model's tokenizer (check_tokenizer: "
            "false skips this check)"
        )


def _stored_dtype(source: Source) -> str:
    """The dtype of a run, or of the weights in a folder; float32 for what is neither float32 nor bfloat16."""
    if source.checkpoint is not None:
        return read_run_config(source.run).model.dtype
    from transformers import AutoConfig

    saved = str(
        AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False).dtype
    ).removeprefix("torch.")
    return saved if saved in DTYPES else "float32"


def _cast(model: Any, dtype: str) -> Any:
    """The model with parameters of this dtype. Not Module.to: that would round the rotary embedding's frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def _tokenizer(config: PruneConfig, source: Source, tokens: StoreReader) -> Path | None:
    """Where the tokenizer's files lie: in the model's own folder, else with the store of rows."""
    own = source.folder if source.checkpoint is None else read_run_config(source.run).model.path
    for folder in (own, *tokenizers_beside(config.tokens, tokens.spec.info)):
        if folder is not None and (folder / "tokenizer.json").is_file():
            return folder
    return None


def _record(facts: PruneFacts, kept: Kept, importance: Importance) -> dict[str, Any]:
    """PRUNE_FILE: numbers of what was kept (those of the whole model), and the importance of its layers."""
    return {
        **facts.as_dict(),
        "layer_importance": [float(f"{value:.6g}") for value in importance.layers.tolist()],
        "kept": {
            "layers": kept.layers.tolist(),
            "channels": kept.channels.tolist(),
            "heads": kept.heads[kept.layers].tolist(),
            "kv_heads": kept.kv_heads[kept.layers].tolist(),
            "neurons": kept.neurons[kept.layers].tolist(),
        },
    }


def _write(
    config: PruneConfig, model: Any, facts: PruneFacts, record: dict[str, Any], tokenizer: Path | None
) -> float | None:
    """The folder under another name, then in its place; returns the largest difference of logits, if asked for."""
    part = config.output_dir.with_name(f".{config.output_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with room_for(config.output_dir, unfinished=part):
        part.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(part)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, part)
        write_json_atomically(part / PRUNE_FILE, record)
        write_text_atomically(part / CARD_FILE, prune_card(facts))
        difference = check_in_fresh_process(model, part) if config.check else None
        if config.output_dir.exists():
            shutil.rmtree(config.output_dir)
        os.replace(part, config.output_dir)
    return difference
