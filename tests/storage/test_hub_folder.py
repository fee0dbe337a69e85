"""Stores read from a data set of a hub on the loopback, at one commit, by the hub's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from potstill.storage import (
    CorruptError,
    EpochPlan,
    GaveUpError,
    Loader,
    NotAStoreError,
    ReadFailedError,
    StoreError,
    StoreReader,
    StoreWriter,
    UnsealedError,
    WriteFailedError,
    collect_garbage,
    seal_store,
    store_status,
    verify_store,
    write_card,
)
from potstill.storage.files import hub_folder
from tests.hub_server import Hub, Repository, serve_hub
from tests.storage.stores import same_targets, tokens_spec, write_targets, write_tokens

NAME = "acme/targets"


def files_of(*folders: Path) -> dict[str, bytes]:
    """As an upload takes them: without folders that hold nothing."""
    found = {}
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        found |= {f"{folder.name}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in files}
    return found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[StoreReader, StoreReader]:
    root = tmp_path_factory.mktemp("hub_stores")
    tokens = write_tokens(root / "tokens", 10)
    write_card(tokens.url)
    return tokens, write_targets(root / "targets", tokens)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serve_hub() as served:
        served.speak_to(monkeypatch, tmp_path)
        # This process has imported the client already.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_folder, "BACKOFF_SECONDS", 0.005)
        monkeypatch.setattr(hub_folder, "_resolved", {})
        yield served


@pytest.fixture
def repository(hub: Hub, local: tuple[StoreReader, StoreReader]) -> Repository:
    return hub.add("datasets", NAME, files_of(Path(local[0].url), Path(local[1].url)))


def first(times: int, status: int, of: str) -> Callable[[str], int | None]:
    """The first `times` requests whose line holds `of` end with this status."""
    left = [times]

    def fault(line: str) -> int | None:
        if of not in line or left[0] == 0:
            return None
        left[0] -= 1
        return status

    return fault


def test_a_store_on_the_hub_reads_as_the_local_one(
    hub: Hub, repository: Repository, local: tuple[StoreReader, StoreReader]
) -> None:
    commit = repository.branches["main"]
    tokens, targets = (StoreReader(f"hf://datasets/{NAME}/{name}") for name in ("tokens", "targets"))
    assert targets.url == f"hf://datasets/{NAME}@{commit}/targets"
    assert (tokens.digest, targets.digest) == (local[0].digest, local[1].digest)
    for row in (7, 0, 3):
        assert same_targets(targets.row(row).targets, local[1].row(row).targets)  # type: ignore[union-attr]
    with Loader(EpochPlan(10, global_batch=4, seed=0, joined=("teacher",)), tokens, {"teacher": targets}) as loader:
        assert len(next(loader).joined["teacher"]) == 4
    assert verify_store(targets.url, deep=True).ok and verify_store(tokens.url, deep=True).ok
    assert store_status(targets.url).sealed and seal_store(targets.url).store_digest == local[1].digest
    assert collect_garbage(tokens.url, dry_run=True).files == ()
    units = [line for line in hub.seen if "/units/" in line and "resolve" in line]
    assert units and all(f"/resolve/{commit}/" in line for line in units)


def test_a_branch_that_moves_on_changes_nothing_under_a_reader(
    hub: Hub,
    repository: Repository,
    local: tuple[StoreReader, StoreReader],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = repository.branches["main"]
    before = StoreReader(f"hf://datasets/{NAME}@main/tokens")
    other = write_tokens(tmp_path / "tokens", 12)
    new = repository.commit(files_of(tmp_path / "tokens"))
    again = StoreReader(f"hf://datasets/{NAME}@main/tokens")
    assert old != new and before.url == again.url and again.digest == local[0].digest != other.digest
    assert before.row(9).row == 9 and before.num_rows == 10
    # By its commit each is read as it is, and a new process takes the branch as it is then.
    assert StoreReader(f"hf://datasets/{NAME}@{new}/tokens").digest == other.digest
    hub_folder._resolved.clear()
    assert StoreReader(f"hf://datasets/{NAME}@main/tokens").digest == other.digest
    assert StoreReader(f"hf://datasets/{NAME}@{old}/tokens").digest == local[0].digest
    # Ranks would each take it as it is when they ask.
    hub_folder._resolved.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StoreError, match=rf"name its commit: hf://datasets/{NAME}@{new}/tokens"):
        StoreReader(f"hf://datasets/{NAME}/tokens")
    assert StoreReader(f"hf://datasets/{NAME}@{new}/tokens").digest == other.digest


def test_it_is_read_only(repository: Repository) -> None:
    url = f"hf://datasets/{NAME}/new"
    for write in (lambda: StoreWriter.create(url, tokens_spec()), lambda: write_card(f"hf://datasets/{NAME}/targets")):
        with pytest.raises(WriteFailedError, match="a store on the hub is read only"):
            write()


def test_faults_that_pass_are_tried_again_and_others_are_said(hub: Hub, repository: Repository) -> None:
    url = f"hf://datasets/{NAME}/targets"
    hub.fault = first(2, 503, "/run.json")
    assert StoreReader(url).num_rows == 10
    hub.fault = first(99, 503, "/run.json")
    with pytest.raises(GaveUpError, match=rf"{NAME}@[0-9a-f]{{40}}/targets/run.json .*answers 503 .attempt 4 of 4"):
        StoreReader(url)
    hub.fault = first(99, 403, "/run.json")
    with pytest.raises(ReadFailedError, match="answers 403; set HF_TOKEN"):
        StoreReader(url)
    hub.fault = lambda line: None
    for wrong, message in (
        (f"hf://datasets/{NAME}@other/targets", "no such data set, or no such revision"),
        ("hf://datasets/acme/nothing/targets", "no such data set, or no such revision"),
        ("hf://models/acme/nothing", "expected hf://datasets/ORG/NAME"),
    ):
        with pytest.raises(StoreError, match=message):
            StoreReader(wrong)
    with pytest.raises(NotAStoreError, match=r"holds no run\.json"):
        StoreReader(f"hf://datasets/{NAME}")


def test_a_commit_that_lacks_a_part_is_damaged_and_not_shorter(
    hub: Hub, repository: Repository, local: tuple[StoreReader, StoreReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = files_of(Path(local[1].url))
    unit = next(name for name in whole if name.endswith(".arrow") and "/units/" in name)
    lacking = repository.commit({name: data for name, data in whole.items() if name != unit})
    cut = repository.commit({**whole, unit: whole[unit][: len(whole[unit]) // 2]})
    unsealed = repository.commit({name: data for name, data in whole.items() if "manifest" not in name})
    for commit in (lacking, cut):
        report = verify_store(f"hf://datasets/{NAME}@{commit}/targets", deep=True)
        assert not report.ok and unit.rpartition("/")[2] in report.format()
        with pytest.raises(CorruptError, match=rf"@{commit}/targets/units/"):
            list(StoreReader(f"hf://datasets/{NAME}@{commit}/targets").rows(range(10)))
    with pytest.raises(UnsealedError):
        StoreReader(f"hf://datasets/{NAME}@{unsealed}/targets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ReadFailedError, match="HF_HUB_OFFLINE is set; name a local copy"):
        StoreReader(f"hf://datasets/{NAME}@{cut}/targets")
