"""What the README tells people to type is understood by the command, and its configuration is one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from potstill.common.config import build_config, load_config, parse_yaml
from potstill.common.exit_codes import EXIT_CODES
from potstill.common.options import OVERRIDES
from potstill.launch import cli
from potstill.launch.plan import PlanConfig
from potstill.launch.presets import find_preset, list_presets
from potstill.student_train import __main__ as rank_main
from potstill.student_train.config.train import EvalConfig, ExportConfig, TrainConfig
from potstill.teacher_dump import ImportTargetsConfig, ImportTokensConfig, RolloutConfig
from potstill.teacher_dump.config import DumpConfig, PrepareConfig, ScoreConfig

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREES = {
    "plan": PlanConfig,
    "prepare": PrepareConfig,
    "import tokens": ImportTokensConfig,
    "import targets": ImportTargetsConfig,
    "dump": DumpConfig,
    "score": ScoreConfig,
    "rollout": RolloutConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Every shell line of the README, with continued lines joined and comments taken off."""
    joined = "\n".join(blocks("sh")).replace("\\\n", " ")
    lines = [shlex.join(shlex.split(line, comments=True)) for line in joined.splitlines()]
    return [line for line in lines if line]


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    assert README.count("\n") <= 300
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("potstill ")])
def test_command_lines_are_understood(line: str) -> None:
    words = shlex.split(line)[1:]
    arguments = cli.parse(words)
    name = " ".join([arguments.command, *filter(None, [getattr(arguments, "kind", None)])])
    if name in TREES and arguments.config is None:
        preset = getattr(arguments, "preset", None)
        path = None if preset is None else find_preset(preset).path
        load_config(TREES[name], path, getattr(arguments, OVERRIDES))


@pytest.mark.parametrize("line", [line for line in commands() if "potstill.student_train" in line])
def test_cluster_lines_are_understood(line: str) -> None:
    words = shlex.split(line)
    options = rank_main.parse(words[words.index("potstill.student_train") + 1 :])
    assert options.config == "run.yaml"


def test_every_shell_line_is_known() -> None:
    known = ("potstill ", "make ", "deepspeed ", "srun torchrun ")
    assert [line for line in commands() if not line.startswith(known)] == []


def test_makefile_has_every_target_that_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test", "bench"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named), named


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_a_student_configuration(text: str) -> None:
    build_config(TrainConfig, parse_yaml(text, name="README.md"), source="README.md")


def test_exit_codes_are_those_of_the_command() -> None:
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)] == list(EXIT_CODES)


@pytest.mark.parametrize("preset", list_presets(), ids=lambda preset: preset.name)
def test_presets_load(preset: object) -> None:
    assert load_config(TrainConfig, find_preset(preset.name).path)  # type: ignore[attr-defined]


def test_files_that_are_named_exist() -> None:
    rooms = ("common", "kernels", "launch", "storage", "student_train", "teacher_dump", "tests", "benchmarks", "docs")
    named = re.findall(rf"`((?:{'|'.join(rooms)})/[a-z_/.]*)`", README) + re.findall(r"\]\(([^)]+)\)", README)
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path.partition("#")[0]).exists()] == []


RESULT_ROW = re.compile(
    r"^\| (?P<what>[^|]+) \| (?P<figure>[^|]+) \| \[[^\]]+\]\((?P<file>benchmarks/results/[^)]+)\) \|$", re.M
)
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in NUMBER.findall(text)]


def holds(value: str, found: list[float]) -> bool:
    """Whether one of the numbers, rounded as the README rounds, is this value."""
    digits = len(value.partition(".")[2])
    return any(f"{number:.{digits}f}" == value.replace(",", "") for number in found)


@pytest.mark.parametrize("row", list(RESULT_ROW.finditer(README)), ids=lambda row: row["what"].strip())
def test_every_result_is_in_its_file(row: re.Match[str]) -> None:
    found = numbers((ROOT / row["file"]).read_text(encoding="utf-8"))
    values = NUMBER.findall(row["figure"])
    assert values
    assert [value for value in values if not holds(value, found)] == []


def test_the_results_stand_first_and_say_where_they_were_measured() -> None:
    assert README.index("## Results") < README.index("## Two commands")
    assert len(RESULT_ROW.findall(README)) >= 8
    kept = json.loads((ROOT / "benchmarks" / "results" / "demo_spread.json").read_text(encoding="utf-8"))
    about = kept["1,2,3,4,5"]
    assert about["commit"] in README
    assert about["machine"] in README


def test_no_figure_stands_outside_the_table_of_results() -> None:
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith("|"))
    unit = r"(?:nats|%|bytes per token|B/token|[kMG]?i?B\b|tokens/s|seconds?|minutes?|hours?|times\b)"
    assert re.findall(rf"\d[\d.,]* ?{unit}", prose) == []
