"""What is said when ranks lose one another is no defect of potstill, and names what to do."""

from __future__ import annotations

import pytest
import torch

from potstill.common.entry_point import run_command


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4: Connection reset by peer"),
            "same command",
        ),
        (torch.distributed.DistBackendError("NCCL communicator was aborted"), "same command"),
        (torch.distributed.DistNetworkError("port: 29500, name: EADDRINUSE, message: in use"), "another MASTER_PORT"),
    ],
)
def test_a_lost_partner_is_no_defect(error: Exception, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise error

    assert run_command(work, program="program", show_traceback=False) == 1
    said = capsys.readouterr().err
    assert words in said and str(error) in said and "defect" not in said and "Traceback" not in said


def test_any_other_error_still_is(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise RuntimeError("shapes differ")

    assert run_command(work, program="program", show_traceback=False) == 1
    assert "this is a defect" in capsys.readouterr().err
