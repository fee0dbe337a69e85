"""Checkpoints: DeepSpeed writes the files, our manifest makes them exist.

A folder `step_NNNNNNNN` without a manifest is no checkpoint; one whose files are not those that the manifest names, by
size and content, is damaged (checkpoint_files.py). The manifest is written last (temporary file, fsync, rename) and
deleted first. Loading is limited to tensors, plain values and a few classes (unpickling.py).
"""

from __future__ import annotations

import errno
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
from potstill.student_train.run.checkpoint_files import (
    MANIFEST,
    DamagedError,
    ResumeError,
    UnfinishedError,
    check_contents,
    check_sizes,
    checkpoints_folder,
    describe_files,
    files_of,
    manifest_of,
    read_manifest,
)
from potstill.student_train.run.engine import Topology, broadcast_object, gather_objects
from potstill.student_train.run.loop_state import LoopState
from potstill.student_train.run.unpickling import only_allowed
from potstill.student_train.run.write_failures import SharedSave

log = logging.getLogger(__name__)


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


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint behind `step` steps of a run lies."""
    return checkpoints_folder(run) / f"step_{step:08d}"


def read_checkpoint(folder: Path, *, contents: bool = False) -> Checkpoint:
    """Read the manifest of one checkpoint and check its files by size, with `contents` also by digest.

    Raises ResumeError that says what is missing, DamagedError where it is not what was saved.
    """
    if not folder.is_dir():
        raise ResumeError(f"checkpoint {folder} does not exist; give the folder step_NNNNNNNN of a run's checkpoints")
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    if contents:
        check_contents(folder, manifest)
    return Checkpoint(folder, manifest)


def checkpoint_folders(run: Path) -> list[Path]:
    """The folders under which checkpoints of a run lie, whole or not, oldest first."""
    return sorted(checkpoints_folder(run).glob("step_*"))


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run whose files have their sizes, oldest first; others are passed over with a warning."""
    found = []
    for folder in checkpoint_folders(run):
        try:
            found.append(read_checkpoint(folder))
        except ResumeError as error:
            log.warning("passing over %s", error)
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find_resume(options: CheckpointConfig, run: Path) -> Checkpoint | None:
    """The checkpoint that a start would try first, by sizes alone; None for a start from the beginning.

    Touches nothing. Raises ResumeError that names the key.
    """
    try:
        if isinstance(options.resume, Path):
            return read_checkpoint(options.resume)
        return next(reversed(list_checkpoints(run)), None) if options.resume == "auto" else None
    except ResumeError as error:
        raise _naming_key(options, error) from error


def _naming_key(options: CheckpointConfig, error: ResumeError) -> ResumeError:
    """The same error, with the key that asked for the checkpoint in front."""
    return type(error)(f"checkpoint.resume = {options.resume}: {error}" if options.resume != "auto" else str(error))


def choose_resume(options: CheckpointConfig, run: Path, topology: Topology) -> Checkpoint | None:
    """The checkpoint to continue from, the same on all ranks, its contents checked by all ranks together.

    With `auto` one that is damaged is named and set aside, and the newest whole one is taken. Raises ResumeError (on
    all ranks): where the one that was named is damaged, or where there are only damaged ones.
    """
    if options.resume == "never":
        return None
    if isinstance(options.resume, Path):
        try:
            return _checked_together(options.resume, topology)
        except ResumeError as error:
            raise _naming_key(options, error) from error
    found = broadcast_object(checkpoint_folders(run) if topology.is_main else None)
    damaged = []
    for folder in reversed(found):
        try:
            return _checked_together(folder, topology)
        except DamagedError as error:
            aside = _set_aside_together(folder, topology)
            damaged.append(aside)
            log.error("%s; it is set aside as %s, and an older checkpoint is looked for", error, aside.name)
        except UnfinishedError as error:
            log.warning("passing over %s", error)
    if damaged:
        raise DamagedError(
            f"no checkpoint of {run} is whole; damaged: {', '.join(map(str, damaged))}. Take them from a copy, or "
            "start anew with --force (run.force: true)"
        )
    return None


def _checked_together(folder: Path, topology: Topology) -> Checkpoint:
    """Read a checkpoint on rank 0 and check its contents on all ranks. Raises on all ranks what failed on any."""
    answer: Any = None
    if topology.is_main:
        try:
            answer = read_checkpoint(folder)
        except ResumeError as error:
            answer = error
    answer = broadcast_object(answer)
    if isinstance(answer, ResumeError):
        raise answer
    damage: ResumeError | None = None
    try:
        check_contents(folder, answer.manifest, part=(topology.rank, topology.world_size))
    except ResumeError as error:
        damage = error
    for found in gather_objects(damage):
        if found is not None:
            raise found
    return answer


def _set_aside_together(folder: Path, topology: Topology) -> Path:
    """Let rank 0 set a damaged checkpoint aside. Raises ResumeError on all ranks where it cannot."""
    answer: Any = None
    if topology.is_main:
        try:
            answer = set_aside(folder)
        except OSError as error:
            answer = ResumeError(f"{folder} is damaged and cannot be set aside: {error}; rename it by hand")
    answer = broadcast_object(answer)
    if isinstance(answer, ResumeError):
        raise answer
    return answer


def set_aside(folder: Path) -> Path:
    """Give a damaged checkpoint a name that nobody reads, `damaged_step_NNNNNNNN`; nothing of it is deleted."""
    number, aside = 1, folder.with_name(f"damaged_{folder.name}")
    while aside.exists():
        number, aside = number + 1, folder.with_name(f"damaged_{folder.name}.{number}")
    os.rename(folder, aside)
    sync_folder(folder.parent)
    return aside


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
    written: dict[str, dict[str, Any]] = {}
    with save.part():
        # Each rank reads what it wrote out of its own memory; another machine's would first have to come from the disk.
        written = describe_files(folder, save.written, sync=True)
    known = {name: said for part in gather_objects(written) for name, said in part.items()}
    with save.part():
        if topology.is_main:
            about = {"loop": loop, "data": data, "pinned": pinned, "world_size": topology.world_size, **extra}
            if decisions := write_decisions(folder):
                about["decisions"] = decisions
            size = commit_checkpoint(folder, about, known=known)
            log.info("saved %s: %.1f MB in %.1f s", folder, size / 1e6, time.monotonic() - started)
    return folder


def commit_checkpoint(folder: Path, about: dict[str, Any], *, known: dict[str, dict[str, Any]] | None = None) -> int:
    """Make sure that the files are on the disk, then write the manifest. Returns the size of the files in bytes.

    `known` is what describe_files has said already, of files that their ranks have made durable.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = known or {}
    if absent := sorted(files.keys() - set(names)):
        raise OSError(errno.ENOENT, "this rank does not see a file that another one wrote", str(folder / absent[0]))
    rest = describe_files(folder, [name for name in names if name not in files], sync=True)
    sync_folder(folder.parent)  # retention may delete an older one right after
    manifest = manifest_of({**files, **rest}, about)
    write_json_atomically(folder / MANIFEST, manifest)
    return sum(said["bytes"] for said in files_of(manifest).values())


def load_checkpoint(engine: Any, folder: Path, *, step: int, universal: bool) -> None:
    """Load weights and optimizer into the engine and compare what came back. Raises ResumeError."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    with only_allowed(folder):
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
