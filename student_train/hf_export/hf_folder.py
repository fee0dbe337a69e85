"""Export: a checkpoint becomes a Hugging Face folder that a fresh process loads with equal logits."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.common.disk_room import room_for
from potstill.common.errors import UserError
from potstill.common.packed import probe_ids
from potstill.storage import StoreError, StoreReader
from potstill.student_train.config.train import ExportConfig, ModelConfig, TrainConfig
from potstill.student_train.data.store_tokenizer import tokenizers_beside
from potstill.student_train.data.stores import VOCABULARY
from potstill.student_train.hf_export.card_facts import gather_facts
from potstill.student_train.hf_export.model_card import model_card
from potstill.student_train.hf_export.push import look_first, push_folder
from potstill.student_train.hf_export.weights import EXPORT_FILE, find_source, load_model
from potstill.student_train.run.checkpoint import write_json_atomically, write_text_atomically
from potstill.student_train.run.run_folder import read_run_config

log = logging.getLogger(__name__)
CHECK_TIMEOUT_SECONDS = 3600
PROBE_TOKENS = 48
CARD_FILE = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    output_dir: Path
    step: int
    num_parameters: int
    dtype: str
    tokenizer: Path | None
    logits_difference: float | None
    pushed: str | None = None  # where to, in words
    licensed: bool = False

    def format(self) -> str:
        """A few lines for a person."""
        check = "not checked" if self.logits_difference is None else f"{self.logits_difference:.3g} in a fresh process"
        return (
            f"exported step {self.step} to {self.output_dir}: {self.num_parameters:,} parameters, {self.dtype}\n"
            f"  largest difference of logits: {check}\n"
            f"  tokenizer: {self.tokenizer or 'not known; copy it beside the weights (--set tokenizer=FOLDER)'}\n"
            f"  model card: {self.output_dir / CARD_FILE}"
            + ("" if self.licensed else "; fill in the licence before you publish")
            + ("" if self.pushed is None else f"\n  {self.pushed}")
        )


def check_output_dir(output_dir: Path, *, force: bool, reads: Mapping[str, Path | str]) -> None:
    """Raise UserError where a folder stands that may not be replaced: without `force`, or never.

    reads: by key what the output is made of, which replacing the folder must not take with it.
    """
    for what, place in {**reads, "the folder of this process": Path.cwd()}.items():
        if isinstance(place, Path) and place.resolve().is_relative_to(output_dir.resolve()):
            raise UserError(f"output_dir {output_dir} is or holds {what} ({place}); name a folder of its own")
    if output_dir.exists() and not force:
        raise UserError(
            f"output_dir {output_dir} exists; name another folder, or replace it with --force (force: true in a file)"
        )


def export(config: ExportConfig) -> ExportSummary:
    """Write `config.output_dir`, whole or not at all, and push it if asked. Raises UserError."""
    source = find_source(config.run)
    if source.checkpoint is None:
        raise UserError(f"{config.run} is a Hugging Face folder already; name a run or a checkpoint")
    check_output_dir(config.output_dir, force=config.force, reads={"run": source.run})
    seen = None if config.push is None else look_first(config)  # before the work, not after it
    run_config = read_run_config(source.run)
    dtype = config.dtype or run_config.model.dtype
    model = load_model(source, dtype=dtype)
    restore_use_cache(model, run_config.model)
    part = config.output_dir.with_name(f".{config.output_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with room_for(config.output_dir, unfinished=part):
        part.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(part, max_shard_size=config.max_shard_bytes)
        tokenizer = find_tokenizer(config.tokenizer, run_config)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, part)
        # A repository is for others: of the path of this machine only its end is said there.
        place = source.checkpoint.folder if seen is None else "/".join(source.checkpoint.folder.parts[-2:])
        record = {"step": source.checkpoint.step, "checkpoint": str(place), "dtype": dtype}
        own = source.checkpoint.manifest.get("stores", {}).get(VOCABULARY)
        if own is not None:
            record["vocabulary_map"] = own
        write_json_atomically(part / EXPORT_FILE, record)
        num_parameters = sum(p.numel() for p in model.parameters())
        title = config.output_dir.name if run_config.run.name == "run" else run_config.run.name
        facts = gather_facts(
            source.run,
            source.checkpoint,
            run_config,
            title=title,
            hf_config=model.config,
            num_parameters=num_parameters,
            dtype=dtype,
            license=config.license,
        )
        write_text_atomically(part / CARD_FILE, model_card(facts))
        difference = check_in_fresh_process(model, part) if config.check else None
        if config.output_dir.exists():
            shutil.rmtree(config.output_dir)
        os.replace(part, config.output_dir)
    pushed = None if seen is None else push_folder(config, step=source.checkpoint.step, seen=seen)
    return ExportSummary(
        output_dir=config.output_dir,
        step=source.checkpoint.step,
        num_parameters=num_parameters,
        dtype=dtype,
        tokenizer=tokenizer,
        logits_difference=difference,
        pushed=pushed,
        licensed=config.license is not None,
    )


def restore_use_cache(model: Any, config: ModelConfig) -> None:
    """Give the model the `use_cache` of the configuration that the student was made from.

    Training switches it off, and the run folder keeps it so; a student that generates without a cache is slow.
    """
    wanted = source_use_cache(config)
    model.config.use_cache = wanted
    if model.generation_config is not None:
        model.generation_config.use_cache = wanted


def source_use_cache(config: ModelConfig) -> bool:
    """`use_cache` as `model.config` or `model.path` has it; true, the default of transformers, where it is not said."""
    if isinstance(config.config, dict):
        return bool(config.config.get("use_cache", True))
    place = Path(str(config.path if config.config is None else config.config))
    file = place if place.is_file() else place / "config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("use_cache", True))
    except (OSError, ValueError, AttributeError) as error:
        log.warning("%s cannot be read for its use_cache (%s); the export says true, the default", file, error)
        return True


def find_tokenizer(asked: Path | None, run: TrainConfig) -> Path | None:
    """The tokenizer folder: as asked, else the student's own (data.vocabulary), else of the starting weights, else
    what the tokens store remembers."""
    if asked is not None:
        if not any((asked / name).is_file() for name in TOKENIZER_FILES):
            raise UserError(f"tokenizer {asked} holds no tokenizer files ({', '.join(TOKENIZER_FILES[:2])}, ...)")
        return asked
    if run.data.vocabulary is not None:
        place = run.data.vocabulary.tokenizer
        if not (place / "tokenizer.json").is_file():
            raise UserError(f"data.vocabulary.tokenizer {place} of the run holds no tokenizer.json; name a copy of it")
        return place
    info: Mapping[str, Any] = {}
    tokens = run.data.named_sources()[0].config.tokens  # one tokenizer made the stores of all sources
    try:
        info = StoreReader(tokens).spec.info
    except StoreError as error:
        log.warning("the tokens store of the run cannot be read for its tokenizer: %s", error)
    candidates = [run.model.path, *tokenizers_beside(tokens, info)]
    for folder in candidates:
        if folder is not None and (folder / "tokenizer.json").is_file():
            return folder
    return None


def copy_tokenizer(folder: Path, output: Path) -> None:
    """Copy the tokenizer's files as they are."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, output / name)


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Logits of the probe in float32 [1, PROBE_TOKENS, V]: differences then come from the weights alone."""
    vocab_size = model.config.get_text_config().vocab_size
    return model.float().eval()(input_ids=probe_ids(torch.arange(PROBE_TOKENS)[None], vocab_size)).logits


def check_in_fresh_process(model: Any, folder: Path) -> float:
    """Load `folder` in a new process and compare logits there. Returns the largest difference; raises UserError."""
    probe = folder.with_name(f"{folder.name}.probe.pt")
    torch.save(probe_logits(model), probe)
    command = [sys.executable, "-m", "potstill.student_train.hf_export.fresh_load", str(folder), str(probe)]
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CHECK_TIMEOUT_SECONDS, check=False
        )
    finally:
        probe.unlink(missing_ok=True)
    if done.returncode:
        raise UserError(
            f"the exported folder {folder} does not load as it should; it is left there:\n{done.stderr[-2000:]}"
        )
    return float(done.stdout.split()[-1])
