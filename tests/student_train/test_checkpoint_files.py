"""A checkpoint is what was saved, to the byte, or it is not loaded: the checks themselves, and what a run does then."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.student_train.hf_export.weights import find_source
from potstill.student_train.run import checkpoint_files
from potstill.student_train.run.checkpoint import checkpoint_folder, checkpoints_folder, read_checkpoint
from potstill.student_train.run.checkpoint_files import (
    MANIFEST,
    DamagedError,
    ResumeError,
    UnfinishedError,
    check_contents,
    describe_files,
    manifest_of,
    read_manifest,
)
from tests.dist_harness import run_ranks
from tests.student_train import workers
from tests.student_train.test_resume import steps_of, tree_of

LAST = 12


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with checkpoints at 4, 8 and 12, to be copied."""
    run = tmp_path_factory.mktemp("trained") / "run"
    run_ranks(workers.train_run, tree_of(stores, run, **options()), world=2)
    return run


def options() -> dict[str, Any]:
    return {"run": {"max_steps": LAST}, "checkpoint": {"every_steps": 4, "keep_last": 3}}


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(max(0, os.path.getsize(path) // 2 - 4096))
        file.write(bytes(4096))


def model_file(folder: Path) -> Path:
    return folder / "mp_rank_00_model_states.pt"


def optimizer_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*optim_states.pt"))


def of_another_step(folder: Path) -> None:
    shutil.copyfile(optimizer_files(folder.with_name("step_00000004"))[1], optimizer_files(folder)[1])


def of_another_rank(folder: Path) -> None:
    first, second = optimizer_files(folder)
    shutil.copyfile(first, second)


def by_a_pipe(folder: Path) -> None:
    model_file(folder).unlink()
    os.mkfifo(model_file(folder))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit of the model": lambda folder: flip(model_file(folder)),
    "a flipped bit of a rank's optimizer": lambda folder: flip(optimizer_files(folder)[1]),
    "a zeroed page": lambda folder: zero(model_file(folder)),
    "an optimizer file of another step": of_another_step,
    "an optimizer file of another rank": of_another_rank,
    "a truncated file": lambda folder: os.truncate(model_file(folder), 1000),
    "a missing file": lambda folder: model_file(folder).unlink(),
    "a pipe": by_a_pipe,
    "a file that nobody saved": lambda folder: shutil.copyfile(model_file(folder), folder / "layer_00_states.pt"),
    "a manifest of another step": lambda folder: shutil.copyfile(
        folder.with_name("step_00000004") / MANIFEST, folder / MANIFEST
    ),
    "a manifest with another step in it": lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text().replace('"step": 12', '"step": 11')
    ),
    "an empty list as manifest": lambda folder: (folder / MANIFEST).write_text("[]"),
    "a bare version as manifest": lambda folder: (folder / MANIFEST).write_text('{"version":1}'),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 500),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named_before_anything_is_loaded(run: Path, name: str) -> None:
    folder = checkpoint_folder(run, LAST)
    DAMAGES[name](folder)
    for source in (folder, run):  # export and eval, by checkpoint and by run: no older one stands in unasked
        with pytest.raises(DamagedError) as error:
            find_source(source)
        assert str(folder) in str(error.value)
    assert find_source(checkpoint_folder(run, 8)).checkpoint is not None


def test_a_resume_sets_damaged_ones_aside_and_takes_the_newest_whole_one(stores, trained: Path, run: Path) -> None:
    flip(optimizer_files(checkpoint_folder(run, LAST))[1])
    (checkpoint_folder(run, 8) / MANIFEST).write_text("[]")
    assert run_ranks(workers.train_run, tree_of(stores, run, **options()), world=2)[0]["status"] == "done"
    assert steps_of(run) == steps_of(trained)
    names = sorted(path.name for path in checkpoints_folder(run).iterdir() if path.is_dir())
    assert names == [
        "damaged_step_00000008", "damaged_step_00000012", "step_00000004", "step_00000008", "step_00000012"
    ]  # fmt: skip


def test_named_or_without_a_whole_one_a_resume_is_refused(stores, run: Path) -> None:
    """On all ranks, whichever rank's share holds the damage; the folder that was named is left as it is."""
    folder = checkpoint_folder(run, LAST)
    for step in (4, 8, LAST):
        flip(optimizer_files(checkpoint_folder(run, step))[0])
    trees = [
        tree_of(stores, run, run={"max_steps": 16}, checkpoint={"resume": str(folder)}),
        tree_of(stores, run, run={"max_steps": 16}),
    ]
    named, auto = zip(*run_ranks(workers.train_runs, trees, world=2), strict=True)
    assert len(set(named)) == len(set(auto)) == 1
    assert named[0].startswith(f"DamagedError: checkpoint.resume = {folder}: {folder}/")
    assert "is not what was saved" in named[0]
    assert auto[0].startswith(f"DamagedError: no checkpoint of {run} is whole") and "--force" in auto[0]
    aside = sorted(path.name for path in checkpoints_folder(run).iterdir() if path.is_dir())
    assert aside == [f"damaged_step_{step:08d}" for step in (4, 8, LAST)]


def test_the_digest_is_that_of_the_page_on_security(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SHA-256 over the SHA-256 digests of the pieces, whatever the number of threads, by an own few lines."""
    monkeypatch.setattr(checkpoint_files, "PIECE_BYTES", 1000)
    content = os.urandom(4321)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"")
    pieces = [hashlib.sha256(content[at : at + 1000]).digest() for at in range(0, len(content), 1000)]
    assert describe_files(tmp_path, ["a", "b"]) == {
        "a": {"bytes": 4321, "sha256": hashlib.sha256(b"".join(pieces)).hexdigest()},
        "b": {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    }


def test_every_flipped_byte_of_a_manifest_is_seen(tmp_path: Path) -> None:
    """But for blanks: what stands there is the same then."""
    about = {"loop": {"step": 3}, "pinned": {"zero_stage": 1}, "world_size": 2, "data": {"a": 0.1}}
    content = json.dumps(manifest_of({"f.pt": {"bytes": 3, "sha256": "ab"}}, about)).encode()
    (tmp_path / MANIFEST).write_bytes(content)
    assert read_manifest(tmp_path)["loop"] == {"step": 3}
    for at in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            (tmp_path / MANIFEST).write_bytes(flipped)
            try:
                read_manifest(tmp_path)
            except DamagedError:
                continue
            assert json.loads(flipped) == json.loads(content), flipped


def test_a_manifest_of_a_newer_potstill_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "MANIFEST_VERSION", 3)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest_of({}, {})))
    monkeypatch.undo()
    with pytest.raises(ResumeError, match="install the potstill that saved it") as error:
        read_manifest(tmp_path)
    assert not isinstance(error.value, DamagedError)
    with pytest.raises(UnfinishedError):
        read_manifest(tmp_path / "..")


def test_a_checkpoint_of_an_older_potstill_still_continues(stores, trained: Path, run: Path, caplog) -> None:
    """With sizes alone, and a warning that says so."""
    shutil.rmtree(checkpoint_folder(run, LAST))
    for step in (4, 8):
        path = checkpoint_folder(run, step) / MANIFEST
        manifest = json.loads(path.read_text())
        del manifest["sha256"]
        sizes = {name: said["bytes"] for name, said in manifest["files"].items()}
        path.write_text(json.dumps({**manifest, "version": 1, "files": sizes}, indent=1))
    assert read_checkpoint(checkpoint_folder(run, 8), contents=True).step == 8 and "contents cannot be" in caplog.text
    assert run_ranks(workers.train_run, tree_of(stores, run, **options()), world=2)[0]["status"] == "done"
    assert steps_of(run) == steps_of(trained)


def test_a_file_system_that_does_not_serve_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale handle may pass; setting the checkpoint aside would lose steps."""
    checkpoint = read_checkpoint(checkpoint_folder(run, LAST))

    def stale(*_: Any) -> int:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "preadv", stale)
    with pytest.raises(UserError, match=r"\.pt cannot be read: Stale file handle; see that it can") as error:
        check_contents(checkpoint.folder, checkpoint.manifest)
    assert not isinstance(error.value, DamagedError)


def test_each_rank_checks_a_share(run: Path) -> None:
    """The shares of all ranks are all files, and one rank's damage is found by one rank."""
    checkpoint = read_checkpoint(checkpoint_folder(run, LAST))
    flip(model_file(checkpoint.folder))
    found = []
    for rank in range(3):
        try:
            check_contents(checkpoint.folder, checkpoint.manifest, part=(rank, 3))
        except DamagedError:
            found.append(rank)
    assert len(found) == 1
