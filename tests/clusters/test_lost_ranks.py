"""Ranks that lose one another: how long they wait, what they say, and when torchrun may start them again."""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import potstill.student_train.__main__ as rank_of_a_run
from potstill.common.entry_point import run_command
from potstill.common.errors import UserError
from potstill.student_train.run.engine import group_timeout
from potstill.student_train.run.summary import TrainSummary


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


def test_how_long_ranks_wait_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
    assert group_timeout() == timedelta(minutes=30)
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "2")
    assert group_timeout() == timedelta(minutes=2)
    for wrong in ("0", "1.5", "soon", ""):
        monkeypatch.setenv("DEEPSPEED_TIMEOUT", wrong)
        with pytest.raises(UserError, match=r"DEEPSPEED_TIMEOUT is .*whole minutes"):
            group_timeout()


@pytest.mark.parametrize(
    ("status", "restarts", "asked"),
    [
        ("stop file run/stop", "3", True),
        ("run.max_runtime_minutes", "3", True),
        ("stop file run/stop", "0", False),
        ("signal SIGTERM", "3", False),
        ("another rank's request", "3", False),
        ("done", "3", False),
    ],
)
def test_the_torchrun_that_would_start_again_is_ended(
    status: str, restarts: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    summary = TrainSummary(status, Path("run"), 3, 9, 96, 1, 1.0, {}, {})
    monkeypatch.setattr(rank_of_a_run, "train_rank", lambda options: summary)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert rank_of_a_run.run_alone(argparse.Namespace()) == (0 if status == "done" else 75)
    assert sent == ([(os.getppid(), signal.SIGTERM)] if asked else [])
    monkeypatch.setenv("LOCAL_RANK", "1")  # one of them is enough
    rank_of_a_run.run_alone(argparse.Namespace())
    assert len(sent) == asked
