"""A store that every user may change is warned of once, by whatever opens it first; others are not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from potstill.common import permissions
from potstill.storage import StoreReader, seal_store, verify_store
from tests.storage.stores import write_tokens


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch):
    monkeypatch.setattr(permissions, "_told", set())


def warnings(caplog):
    """What was logged, without what a command before this test has switched on."""
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("opened", [StoreReader, seal_store, lambda path: verify_store(path, deep=False)])
@pytest.mark.parametrize("what", ["folder", "units", "manifest.json", "unit"])
def test_one_warning(tmp_path, caplog, opened, what):
    store = Path(write_tokens(tmp_path / "t", 10).url)
    place = {"folder": store, "unit": sorted((store / "units").glob("*.arrow"))[1]}.get(what, store / what)
    with caplog.at_level(logging.WARNING):
        opened(store)
        assert not warnings(caplog)
        place.chmod(0o777)
        for _ in range(2):
            opened(store)
    (record,) = warnings(caplog)
    assert f"store {store} may be changed by every user" in record.getMessage()
    assert ("the folder itself" if what == "folder" else place.name) in record.getMessage()
