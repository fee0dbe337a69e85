"""The run folder: what is written before the first step, what must agree on resume, and the marker of a done run."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import time
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from potstill.common.config import dump_config, load_config, parse_yaml
from potstill.common.errors import UserError
from potstill.common.permissions import warn_if_world_writable
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.model.initial_weights import initial_rule
from potstill.student_train.run.checkpoint import (
    Checkpoint,
    ResumeError,
    checkpoint_folders,
    checkpoints_folder,
    differing_lines,
    write_json_atomically,
    write_text_atomically,
)
from potstill.student_train.run.checkpoint_files import DONE_FILE
from potstill.student_train.run.run_lock import LOCK_FILE
from potstill.student_train.run.stop import refuse_if_stopped

log = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
LOGS_FOLDER = "logs"  # what libraries printed, a file for each start
STUDENT_FOLDER = "student"  # config.json of the student
PART_FILE = f".{CONFIG_FILE}.part"  # what a kill during the very first write leaves
FILES_LOOKED_AT = 64  # of the newest checkpoint, for who may write them
_NOT_THE_ARCHITECTURE = {"architectures", "dtype", "transformers_version"}
PACKAGES = ("potstill", "torch", "deepspeed", "transformers", "numpy", "pyarrow", "pydantic")


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit of the code if it lies in a git checkout."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        found["commit"] = done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        found["commit"] = "unknown"
    return found


def check_run_folder(config: TrainConfig) -> bool:
    """Whether output_dir holds a run; nothing is touched. Raises UserError where a start would overwrite something.

    A folder that holds a run is continued with checkpoint.resume auto or PATH; with `never` it needs run.force. A
    folder that holds something else is never touched, not even with run.force. A stop file is refused in any case.
    """
    folder = config.run.output_dir
    refuse_if_stopped(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output_dir {folder} is a file; name a folder")
    holds_run = (folder / CONFIG_FILE).is_file()
    ours = {PART_FILE, LOGS_FOLDER, LOCK_FILE}  # what a start leaves that was killed before the run was a run
    others = [path for path in folder.iterdir() if path.name not in ours] if folder.is_dir() else []
    if others and not holds_run:
        raise UserError(f"run.output_dir {folder} holds other files and no run; name a new or empty folder")
    if holds_run and config.checkpoint.resume == "never" and not config.run.force:
        raise UserError(
            f"run.output_dir {folder} holds a run already and checkpoint.resume is never; continue it with resume "
            "auto, name another folder, or delete it with --force (run.force: true in a file)"
        )
    return holds_run


def prepare_run_folder(config: TrainConfig) -> None:
    """Make output_dir ready for a start (rank 0, or the command that starts the ranks). Raises as check_run_folder."""
    folder = config.run.output_dir
    if check_run_folder(config) and config.run.force:
        log.info("deleting the run in %s (run.force)", folder)
        delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = checkpoint_folders(folder)
    places = [folder, folder / CONFIG_FILE, checkpoints_folder(folder), *saved]
    places += [path for newest in saved[-1:] for path in islice(newest.iterdir(), FILES_LOOKED_AT)]
    warn_if_world_writable(folder, places, what="run folder")


def new_log_file(run: Path) -> Path:
    """The file for what libraries and launchers print during one start: `RUN/logs/train-YYYYMMDD-HHMMSS.log`."""
    folder = run / LOGS_FOLDER
    folder.mkdir(exist_ok=True)
    return folder / f"train-{time.strftime('%Y%m%d-%H%M%S')}.log"


def delete_run(folder: Path) -> None:
    """Delete what stands in a run folder, so that a kill leaves no checkpoint that looks whole, and still a run."""
    checkpoints = checkpoints_folder(folder)
    if checkpoints.exists():
        aside = folder / f".{checkpoints.name}.deleted"
        shutil.rmtree(aside, ignore_errors=True)  # of a deletion that was killed
        os.replace(checkpoints, aside)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):  # the mark of a run goes last
        if path.name == LOCK_FILE:
            continue  # whoever deletes holds it
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_start(config: TrainConfig, student_config: Any, ds_config: dict[str, Any], plan: list[Any]) -> None:
    """Write the resolved configurations, the plan and the versions (rank 0, before the first step)."""
    folder = config.run.output_dir
    # run.force is about one start; kept in the file it would delete the run when the file is used again.
    kept = config.model_copy(update={"run": config.run.model_copy(update={"force": False})})
    write_text_atomically(folder / CONFIG_FILE, dump_config(kept))
    (folder / STUDENT_FOLDER).mkdir(exist_ok=True)
    write_text_atomically(folder / STUDENT_FOLDER / "config.json", student_config.to_json_string())
    write_json_atomically(folder / "deepspeed.json", ds_config)
    write_json_atomically(folder / "plan.json", plan)
    write_json_atomically(folder / "versions.json", versions())


def check_student(checkpoint: Checkpoint, student_config: Any) -> None:
    """Refuse to continue with another architecture, e.g. because a config.json was edited. Raises ResumeError."""
    path = checkpoint.folder.parent.parent / STUDENT_FOLDER / "config.json"
    if not path.is_file():
        return  # a checkpoint that was copied away from its run
    saved, now = (
        {key: value for key, value in json.loads(text).items() if key not in _NOT_THE_ARCHITECTURE}
        for text in (path.read_text(encoding="utf-8"), student_config.to_json_string())
    )
    differing = differing_lines(saved, now, who="the checkpoint's student")
    if differing:
        raise ResumeError(
            f"model.config or model.path has changed since {checkpoint.folder}:\n"
            + "\n".join(differing)
            + "\ntake back the change, or name a new run.output_dir (--force, or run.force: true, starts anew here)"
        )


def report_changes(config: TrainConfig) -> None:
    """Log each key whose value is not the one that the run was last started with: a resumed run continues with it."""
    path = config.run.output_dir / CONFIG_FILE
    if not path.is_file():
        return
    before = _flat(parse_yaml(path.read_text(encoding="utf-8"), name=str(path)))
    now = _flat(config.model_dump(mode="json"))
    for key in sorted({*before, *now} - {"run.force"}):
        if before.get(key) != now.get(key):
            log.warning("%s was %r in this run, from here on it is %r", key, before.get(key), now.get(key))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a tree by dotted key."""
    if not isinstance(tree, dict | list) or not tree:
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for name, inner in items for key, value in _flat(inner, f"{prefix}.{name}".strip(".")).items()}


def read_run_config(run: Path) -> TrainConfig:
    """The resolved configuration of a run folder. Raises UserError."""
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run} is no run folder: it holds no {CONFIG_FILE}")
    return load_config(TrainConfig, path)


def pinned_values(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run may not change, as flat keys. Learning rate, length and logging may change."""
    tree = config.model_dump(mode="json")
    model = {key: tree["model"][key] for key in ("config", "path", "dtype", "init_std")}
    model["init"] = initial_rule(config.model)
    rescoring = {} if tree["rescoring"] is None else {"rescoring": tree["rescoring"]}
    return {
        "run.seed": tree["run"]["seed"],
        **{f"model.{key}": value for key, value in model.items()},
        "data.global_batch_rows": tree["data"]["global_batch_rows"],
        "data.order": tree["data"]["order"],
        "optimizer.kind": tree["optimizer"]["kind"],
        "zero_stage": tree["zero_stage"],
        **rescoring,
    }


def write_done(run: Path, record: dict[str, Any]) -> None:
    """Mark the run as done; exit codes of launchers do not always tell the truth, this file does."""
    write_json_atomically(run / DONE_FILE, record)


def read_done(run: Path) -> dict[str, Any] | None:
    """The marker of a done run, or None."""
    path = run / DONE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
