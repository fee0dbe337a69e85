"""One warning for a place that every user may change; none for others."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from potstill.common import permissions
from potstill.common.permissions import warn_if_world_writable, world_writable


@pytest.fixture(autouse=True)
def _nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permissions, "_told", set())


def test_files_folders_and_what_links_lead_to(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("open", "closed", "link", "absent", "folder")]
    for path in paths[:2]:
        path.write_text("")
    paths[4].mkdir()
    os.symlink(paths[1], paths[2])  # a link itself has all bits set
    modes = {paths[0]: 0o646, paths[1]: 0o664, paths[4]: 0o757}
    for path, mode in modes.items():
        path.chmod(mode)
    assert world_writable(paths) == [paths[0], paths[4]]


def test_one_warning_says_which_and_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [tmp_path, *(tmp_path / name for name in "abcd")]
    for path in paths[1:]:
        path.write_text("")
    tmp_path.chmod(0o755)
    with caplog.at_level(logging.WARNING):
        warn_if_world_writable(tmp_path, paths, what="run folder")
        assert caplog.records == []
        for path in paths:
            path.chmod(0o777)
        for _ in range(3):
            warn_if_world_writable(tmp_path, paths, what="run folder")
    (record,) = caplog.records
    assert f"run folder {tmp_path} may be changed by every user" in record.getMessage()
    assert "(the folder itself, a, b and 2 more)" in record.getMessage()
    assert f"chmod -R o-w {tmp_path}" in record.getMessage()
