"""Checkpoints: DeepSpeed writes the files, our manifest makes them exist.

A folder `step_NNNNNNNN` without a readable manifest, or whose files do not have the sizes that the manifest names, is
no checkpoint. The manifest is written last (temporary file, fsync, rename) and deleted first. Loading unpickles:
load only checkpoints that you trust.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.student_train.config.train import CheckpointConfig
from potstill.student_train.run.engine import Topology, broadcast_object
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.write_failures import SharedSave

log = logging.getLogger(__name__)
MANIFEST = "potstill.json"
MANIFEST_VERSION = 1


class ResumeError(UserError):
    """A checkpoint cannot be continued with this configuration, these stores or this world."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `step` optimizer steps are behind it."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["loop"]["step"])

    def state(self) -> LoopState:
        """What the train loop continues with. Raises ResumeError where this version cannot read it."""
        try:
            return LoopState.from_json(self.manifest["loop"])
        except UserError as error:
            raise ResumeError(f"{self.folder}: {error}") from error

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    @property
    def zero_stage(self) -> int:
        return int(self.manifest["pinned"]["zero_stage"])


def write_json_atomically(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the whole file or none, also after a crash. Raises OSError that names it."""
    write_text_atomically(path, json.dumps(value, indent=1))


def write_text_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or the former one, also after a crash.

    Raises OSError that names the file.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        part.unlink(missing_ok=True)
        # A full disk names no file by itself.
        raise OSError(error.errno, error.strerror, str(path)) from error
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checkpoints_folder(run: Path) -> Path:
    """Where the checkpoints of a run lie."""
    return run / "checkpoints"


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint behind `step` steps of a run lies."""
    return checkpoints_folder(run) / f"step_{step:08d}"


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises ResumeError that says what is missing."""
    if not folder.is_dir():
        raise ResumeError(f"checkpoint {folder} does not exist; give the folder step_NNNNNNNN of a run's checkpoints")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResumeError(
            f"{folder} holds no {MANIFEST}: its save was not finished, so it is no checkpoint; take another one"
        ) from error
    except (OSError, ValueError) as error:
        raise ResumeError(f"{folder / MANIFEST} cannot be read: {error}") from error
    if manifest.get("version") != MANIFEST_VERSION:
        raise ResumeError(f"{folder}: manifest version {manifest.get('version')}, expected {MANIFEST_VERSION}")
    for name, size in manifest["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ResumeError(f"{path} has {found} bytes, the manifest says {size}; the checkpoint is damaged")
    return Checkpoint(folder, manifest)


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run, oldest first. Unfinished or damaged folders are passed over with a warning."""
    found = []
    for folder in sorted(checkpoints_folder(run).glob("step_*")):
        try:
            found.append(read_checkpoint(folder))
        except ResumeError as error:
            log.warning("passing over %s", error)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_resume(options: CheckpointConfig, run: Path) -> Checkpoint | None:
    """The checkpoint to continue from, None for a start from the beginning. Raises ResumeError that names the key."""
    try:
        if isinstance(options.resume, Path):
            return read_checkpoint(options.resume)
        return next(reversed(list_checkpoints(run)), None) if options.resume == "auto" else None
    except ResumeError as error:
        key = f"checkpoint.resume = {options.resume}: " if isinstance(options.resume, Path) else ""
        raise ResumeError(f"{key}{error}") from error


def choose_resume(options: CheckpointConfig, run: Path, topology: Topology) -> Checkpoint | None:
    """The checkpoint to continue from, chosen by rank 0 for all. Raises ResumeError (on all ranks)."""
    answer: Any = None
    if topology.is_main:
        try:
            answer = find_resume(options, run)
        except ResumeError as error:
            answer = error
    answer = broadcast_object(answer)
    if isinstance(answer, ResumeError):
        raise answer
    return answer


def differing_lines(saved: dict[str, Any], now: dict[str, Any], *, who: str) -> list[str]:
    """One line for each key whose values differ: that of the checkpoint (`who` has it), that of the configuration."""
    return [
        f"  {key}: {who} has {saved.get(key)!r}, the configuration {now.get(key)!r}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]


def check_pinned(checkpoint: Checkpoint, pinned: dict[str, Any]) -> None:
    """Refuse to continue with another value of a pinned key. Raises ResumeError that names each."""
    now = json.loads(json.dumps(pinned))
    # Checkpoints from before model.init began with the configuration's own std, those before optimizer.kind had AdamW.
    saved = {"model.init": "config", "optimizer.kind": "adamw", **checkpoint.manifest["pinned"]}
    differing = differing_lines(saved, now, who="the checkpoint")
    if differing:
        raise ResumeError(
            f"{checkpoint.folder} belongs to another run:\n"
            + "\n".join(differing)
            + "\nuse the run's own configuration, or a new run.output_dir (--force, or run.force: true, starts anew "
            "here)"
        )


def save_checkpoint(
    engine: Any,
    *,
    run: Path,
    topology: Topology,
    state: LoopState,
    data: dict[str, Any],
    pinned: dict[str, Any],
    extra: dict[str, Any],
    write_decisions: Callable[[Path], dict[str, Any]],
    last_saved: str | None = None,
) -> Path:
    """Save on all ranks (a collective call), then commit by the manifest on rank 0.

    `write_decisions` writes what the run has decided into the folder and returns what the manifest says of it (Legs).
    `last_saved` is the checkpoint that stands, for the message. Raises CheckpointWriteError on all ranks when one of
    them could not write its files; nothing of the new checkpoint is left then.
    """
    started = time.monotonic()
    folder, loop = checkpoint_folder(run, state.step), state.to_json()
    save = SharedSave(folder, state.step, topology, last_saved)
    with save.part():
        if topology.is_main:
            # An older attempt may have left an unfinished folder under this name.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
    with save.deepspeed_part(engine):
        engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state={"potstill": loop}, save_latest=False)
    with save.part():
        if topology.is_main:
            about = {"loop": loop, "data": data, "pinned": pinned, "world_size": topology.world_size, **extra}
            if decisions := write_decisions(folder):
                about["decisions"] = decisions
            size = commit_checkpoint(folder, about)
            log.info("saved %s: %.1f MB in %.1f s", folder, size / 1e6, time.monotonic() - started)
    return folder


def commit_checkpoint(folder: Path, about: dict[str, Any]) -> int:
    """Make sure that the files are on the disk, then write the manifest. Returns the size of the files in bytes."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    sync_folder(folder.parent)  # retention may delete an older one right after
    write_json_atomically(folder / MANIFEST, {"version": MANIFEST_VERSION, "files": files, **about})
    return sum(files.values())


def load_checkpoint(engine: Any, folder: Path, *, step: int, universal: bool) -> None:
    """Load weights and optimizer into the engine and compare what came back. Raises ResumeError."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    path, client = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    if path is None:
        raise ResumeError(f"DeepSpeed found nothing to load in {folder}; the checkpoint is damaged, take another one")
    restore_optimizer(engine.optimizer, settings)
    if not universal and (client or {}).get("potstill", {}).get("step") != step:
        raise ResumeError(
            f"{folder}: the manifest says step {step}, the model file {client.get('potstill')}; the files "
            "belong to different saves, take another checkpoint"
        )


def restore_optimizer(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Undo what a universal ZeRO-3 load of DeepSpeed 0.19 does to an optimizer with several parameter groups.

    It gives every group the settings of the first (so weight decay would reach norms and biases), and one and the same
    step counter to all (so it would count once per group, and Adam's bias correction would drift).
    """
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def remove_checkpoint(folder: Path) -> None:
    """Delete the manifest first: a half-deleted checkpoint must never look whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def apply_retention(options: CheckpointConfig, run: Path) -> None:
    """Keep the newest `keep_last` and every permanent one; rank 0 only, right after a save.

    What a killed save or deletion has left goes too: it can never be read, and would fill the disk kill by kill.
    """
    permanent = options.permanent_every_steps
    for folder in checkpoints_folder(run).glob("step_*"):
        if not (folder / MANIFEST).exists():
            log.info("deleting %s: its save or its deletion was cut short", folder)
            remove_checkpoint(folder)
    for checkpoint in list_checkpoints(run)[: -options.keep_last]:
        if permanent is None or checkpoint.step % permanent:
            remove_checkpoint(checkpoint.folder)
