"""The command line: help that costs nothing, examples that parse, exit codes that tell the truth."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from potstill.common.exit_codes import EXIT_CODES
from potstill.common.options import OVERRIDES
from potstill.launch import cli
from potstill.launch.command import Command, CommandGroup
from potstill.launch.commands import COMMANDS

NAMES = [command.name for command in COMMANDS]


def name_in(words: str) -> str:
    """The command that a line names: one word, or two of a group."""
    first, second, *_ = [*words.split(), ""]
    return f"{first} {second}" if first == "import" else first


def run(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "potstill.launch", *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom potstill.launch.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'pyarrow', 'numpy', 'transformers', 'deepspeed', 'rich', 'plotly', 'shtab'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert all(name in done.stdout for name in NAMES)
    assert all(meaning in done.stdout for meaning in EXIT_CODES.values())


def test_the_table_holds_every_command_that_is_promised() -> None:
    promised = (
        "plan prepare dump score rollout seal status verify inspect stats gc presets train eval report export demo"
    )
    promised += " completion import prune repair"
    assert sorted(NAMES) == sorted(promised.split())


@pytest.mark.parametrize("command", COMMANDS, ids=NAMES)
def test_help_explains_by_examples_that_parse(
    command: Command | CommandGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse([command.name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert command.examples
    for example in command.examples:
        assert example in text
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["potstill", command.name]
        parsed = cli.parse(words[1:])
        if getattr(parsed, OVERRIDES, None) and parsed.config is None and not getattr(parsed, "preset", None):
            _tree_of(" ".join(words[1:3]) if isinstance(command, CommandGroup) else command.name, parsed)


@pytest.mark.parametrize("name", ["tokens", "targets"])
def test_help_of_a_command_of_a_group_is_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["import", name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: potstill import {name} ")
    assert "--tokenizer" in text and "keys of the configuration" in text


def _tree_of(name: str, parsed: object) -> object:
    """Build the checked tree of an example, so that a flag that sets a key wrongly is found."""
    from potstill.common.options import read_config
    from potstill.launch.plan import PlanConfig
    from potstill.student_train.config import train as student
    from potstill.student_train.config.prune import PruneConfig
    from potstill.teacher_dump import config as teacher
    from potstill.teacher_dump.against_teacher.config import AgainstTeacherConfig
    from potstill.teacher_dump.importing.targets.config import ImportTargetsConfig
    from potstill.teacher_dump.importing.tokens.config import ImportTokensConfig
    from potstill.teacher_dump.rollouts.config import RolloutConfig

    trees = {
        "import tokens": ImportTokensConfig,
        "import targets": ImportTargetsConfig,
        "plan": PlanConfig,
        "prepare": teacher.PrepareConfig,
        "dump": teacher.DumpConfig,
        "score": teacher.ScoreConfig,
        "rollout": RolloutConfig,
        "eval": student.EvalConfig,
        "export": student.ExportConfig,
        "prune": PruneConfig,
        "verify": AgainstTeacherConfig,
    }
    return read_config(trees[name], parsed)  # type: ignore[type-var,arg-type]


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            "train --temperature 2.0",
            "use --set objective.temperature=2.0 or --set rescoring.generated.temperature=2.0 or --set "
            "curriculum.0.temperature=2.0",
        ),
        ("train --learning-rate=1e-3", "use --set optimizer.lr=1e-3"),
        (
            "train --every-steps 5",
            "use --set checkpoint.every_steps=5 or --set logging.every_steps=5 or --set eval.every_steps=5",
        ),
        ("train --num-rank 2", "there is no --num-rank here; use --num-ranks"),
        ("train --max-steps 4", "use --steps or --set curriculum.0.targets_clock.max_steps=4"),
        ("export --outptu x --run r", "use --output"),
        ("train --zzz", "there is no --zzz here; --help lists all flags"),
        ("train runs/x", "unexpected: runs/x"),
        ("import tokens --tokeniser t", "there is no --tokeniser here; use --tokenizer"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest_flag_or_key(
    words: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(shlex.split(words))
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"potstill {name_in(words)}: error: ") and last.endswith(hint)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("distil",),
        ("import",),
        ("import", "token"),
        ("train", "--num-ranks", "two"),
        ("status",),
        ("dump", "--no-such"),
    ],
)
def test_a_wrong_command_line_ends_with_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(list(words))
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def fails(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with 1; returns its message, which must be one and have no traceback."""
    assert cli.main(shlex.split(words)) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count(f"potstill {name_in(words)}: error: ") == 1
    return error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prepare --input nowhere.txt --output o --vocab-size 300", "nowhere.txt"),
        ("prepare --input a --output o", "exactly one of tokenizer and train_tokenizer"),
        ("prepare --input a --output o --set row_lenght=4", "did you mean 'row_length'?"),
        ("prepare --config absent.yaml", "absent.yaml cannot be read"),
        ("import tokens --input nowhere --output o --tokenizer m", "nowhere"),
        ("dump --tokens nowhere --teacher m --output o", "nowhere"),
        ("train --preset ml", "did you mean 'lm'?"),
        ("train --preset lm --config a.yaml", "not both"),
        ("train --preset lm --set deepspeed.train_batch_size=4", "use data.global_batch_rows instead"),
        ("train --preset lm --set optimiser.lr=1", "did you mean 'optimizer'?"),
        ("train --preset lm --tokens nowhere --output runs/x", "nowhere"),
        ("train --preset lm --num-ranks 0", "expected 1 or more"),
        ("eval --model nowhere --heldout nowhere", "nowhere"),
        ("status nowhere", "nowhere"),
        ("seal nowhere", "nowhere"),
        ("verify nowhere", "nowhere"),
        ("inspect nowhere", "nowhere"),
        ("stats nowhere", "nowhere"),
        ("presets salty", "preset 'salty' does not exist"),
    ],
)
def test_what_a_person_can_correct_is_said_and_ends_with_1(
    words: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(words, capsys)
    assert not list(tmp_path.rglob("*.arrow"))


def test_traceback_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", "nowhere", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_shows_its_traceback_and_is_not_blamed_on_the_person(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from potstill.launch import presets

    def broken() -> list[object]:
        raise KeyError("inner")

    monkeypatch.setattr("potstill.launch.student_commands.list_presets", broken)
    assert presets is not None
    assert cli.main(["presets"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "defect of potstill" in error


def test_interrupt_ends_with_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> list[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("potstill.launch.student_commands.list_presets", interrupted)
    assert cli.main(["presets"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_reader_that_has_enough_is_no_error(data: Path) -> None:
    code = f"{shlex.quote(sys.executable)} -m potstill.launch inspect {data}/train --row 0 | head -n 1"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    assert done.stdout.startswith("row 0")


def test_installed_as_a_module() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("potstill ")


def test_benchmarks_are_one_command_and_end_with_their_json() -> None:
    from benchmarks.__main__ import last_json

    assert last_json('table\n{"a": 1}\n{"b": 2}\nsaved {x}\n') == {"b": 2}
    assert last_json("nothing\n") is None
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"],
        cwd=Path(__file__).resolve().parent.parent.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert "store_codec" in done.stdout


def test_errors_of_the_rooms_that_a_person_can_correct_have_one_base() -> None:
    from potstill.common.errors import UserError
    from potstill.kernels.types import KernelInputError, SelfCheckError
    from potstill.storage import StoreError
    from potstill.student_train.run.step_watch import LossNotFiniteError

    for error in (StoreError, KernelInputError, SelfCheckError, LossNotFiniteError):
        assert issubclass(error, UserError) and issubclass(error, ValueError)
    assert issubclass(SelfCheckError, RuntimeError), "as those who catch it have known it"
