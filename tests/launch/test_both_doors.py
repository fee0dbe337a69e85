"""`potstill train` and the module that launchers start on every rank read, say and end alike."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from potstill.common.exit_codes import DONE, ERROR, INTERRUPTED, PREEMPTED
from potstill.common.options import OVERRIDES, read_config
from potstill.kernels.types import SelfCheckError
from potstill.launch import cli
from potstill.storage.errors import CorruptError
from potstill.student_train import __main__ as rank
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run import trainer
from potstill.student_train.run.rank_report import FOLDER_VARIABLE, LOG_VARIABLE, read_errors
from potstill.student_train.run.summary import TrainSummary

NEEDED = "run.max_steps=4 model.config=c data.tokens=t data.global_batch_rows=4"


def overrides(words: str) -> list[list[str]]:
    given = shlex.split(words)
    return [getattr(parsed, OVERRIDES) for parsed in (cli.parse(["train", *given]), rank.parse(given))]


@pytest.mark.parametrize(
    "words",
    [
        "--set a.b=1 c=2 --set d=3",
        "--set a.b=1 --set c=2 --set d=3",
        "--set=a.b=1 --set c=2 d=3",
        "--config x.yaml --set a.b=1 c=2 --set=d=3",
    ],
)
def test_each_form_of_set_is_read_by_both(words: str) -> None:
    assert overrides(words) == [["a.b=1", "c=2", "d=3"]] * 2


def test_flags_and_their_order_are_those_of_the_command() -> None:
    words = f"--output r --steps 9 --set {NEEDED} optimizer.lr=0.5 --seed 7"
    command, of_rank = overrides(words)
    assert command == of_rank
    given = shlex.split(words)
    config = read_config(TrainConfig, rank.parse([*given, "--local_rank=3"]))
    assert config == read_config(TrainConfig, cli.parse(["train", *given]))
    assert (config.run.max_steps, config.run.seed, config.optimizer.lr) == (4, 7, 0.5)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--temperature 2.0", "use --set objective.temperature=2.0"),
        ("--max-steps 4", "use --steps"),
        ("--step 4", "use --steps"),
    ],
)
def test_a_wrong_flag_ends_both_with_2_and_the_same_hint(
    words: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, prefix in ((cli.main, ["train"]), (rank.main, [])):
        with pytest.raises(SystemExit) as caught:
            main([*prefix, *shlex.split(words)])
        assert caught.value.code == 2
        assert hint in capsys.readouterr().err.splitlines()[-1]


def raising(error: BaseException) -> Callable[..., TrainSummary]:
    def train(config: TrainConfig, **options: object) -> TrainSummary:
        raise error

    return train


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Words that start one rank without a launcher, whose training a test replaces."""
    for name in ("RANK", "WORLD_SIZE", FOLDER_VARIABLE, LOG_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return ["--set", "run.output_dir=r", *NEEDED.split()]


@pytest.mark.parametrize("error", [SelfCheckError("loss 2 apart"), CorruptError("unit 3 is cut"), OSError(13, "shut")])
def test_a_rank_says_what_a_person_can_correct_in_one_line(
    alone: list[str], error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train", raising(error))
    assert rank.main(alone) == ERROR
    assert capsys.readouterr().err == f"potstill.student_train: error: {error}\n"
    assert rank.main([*alone, "--traceback"]) == ERROR
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback") and errors.endswith(f"\npotstill.student_train: error: {error}\n")


def test_a_rank_says_what_to_do_about_a_full_disk(
    alone: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainer, "train", raising(OSError(28, "full", str(tmp_path / "file"))))
    assert rank.main(alone) == ERROR
    error = capsys.readouterr().err
    assert error.startswith(f"potstill.student_train: error: writing {tmp_path / 'file'} failed: [Errno 28] full")
    assert f"bytes are free at {tmp_path}" in error and "make room there" in error and error.count("\n") == 1


def test_a_defect_and_an_interrupt_of_a_rank_end_as_those_of_the_command(
    alone: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train", raising(KeyError("inner")))
    assert rank.main(alone) == ERROR
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback") and "not foreseen: KeyError: 'inner'; this is a defect" in errors
    monkeypatch.setattr(trainer, "train", raising(KeyboardInterrupt()))
    assert rank.main(alone) == INTERRUPTED


@pytest.mark.parametrize("is_done", [True, False])
def test_a_rank_ends_with_the_code_of_its_run(alone: list[str], is_done: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = TrainSummary("done" if is_done else "signal SIGTERM", Path("r"), 4, 4, 512, 100, 1.5, {}, None)
    assert summary.is_done == is_done
    monkeypatch.setattr(trainer, "train", lambda config: summary)
    assert rank.main(alone) == (DONE if is_done else PREEMPTED)


def test_a_rank_of_the_command_leaves_its_error_and_keeps_its_traceback_for_the_log(
    alone: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "train", raising(SelfCheckError("loss 2 apart")))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    assert rank.main(alone) == ERROR
    (error,) = read_errors(tmp_path)
    assert (error.rank, error.text, error.foreseen) == (0, "loss 2 apart", True)
    assert "Traceback" not in capfd.readouterr().err
    assert "SelfCheckError: loss 2 apart" in (tmp_path / "log").read_text()
