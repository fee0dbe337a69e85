"""`potstill completion`: a shell that has read the script completes commands, flags, choices, presets and files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from potstill.launch.cli import main
from potstill.launch.commands import COMMANDS
from potstill.launch.presets import list_presets


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """The script of each shell."""
    import contextlib
    import io

    found = {}
    for shell in ("bash", "zsh", "tcsh"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["completion", shell]) == 0
        found[shell] = out.getvalue()
    return found


def complete(script: str, folder: Path, *words: str) -> set[str]:
    """What bash offers for the last of these words."""
    (folder / "script.bash").write_text(script)
    code = (
        "source ./script.bash\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        'name=$(complete -p potstill | sed "s/.*-F \\([^ ]*\\).*/\\1/")\n'
        '"$name"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", *words], cwd=folder, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return {line.strip() for line in done.stdout.splitlines() if line.strip()}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_flags_choices_presets_and_files(scripts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "my-run.yaml").write_text("")
    (tmp_path / "stores").mkdir()

    def offers(*words: str) -> set[str]:
        return complete(scripts["bash"], tmp_path, "potstill", *words)

    assert offers("tra") == {"train"}
    assert offers("") == {command.name for command in COMMANDS}
    assert offers("train", "--pre") == {"--preset"}
    assert {"--config", "--preset", "--num-ranks", "--tokens", "--set"} <= offers("train", "--")
    assert offers("train", "--preset", "") == {preset.name for preset in list_presets()}
    assert offers("presets", "sal") == {"salt"}
    assert offers("completion", "z") == {"zsh"}
    assert offers("train", "--config", "my") == {"my-run.yaml"}
    assert offers("train", "--tokens", "sto") == {"stores"}, "a key whose value is a path"
    assert offers("report", "sto") == {"stores"} and offers("status", "sto") == {"stores"}
    assert offers("status", "stores", "--wat") == {"--watch"}
    assert offers("import", "tok") == {"tokens"}
    assert {"--config", "--tokenizer", "--packing"} <= offers("import", "tokens", "--")
    assert offers("import", "tokens", "--config", "my") == {"my-run.yaml"}
    assert offers("import", "tokens", "--output", "sto") == {"stores"}
    assert "my-run.yaml" not in offers("train", "--num-ranks", "my")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_scripts_name_every_command_and_its_flags(scripts: dict[str, str], shell: str) -> None:
    assert all(command.name in scripts[shell] for command in COMMANDS)
    assert all(flag in scripts[shell] for flag in ("preset", "heldout-fraction", "num-workers", "watch"))


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_shells_read_their_script(scripts: dict[str, str], shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(scripts[shell])
    done = subprocess.run([program, "-n", str(tmp_path / "script")], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
