"""`potstill repair`: from a damaged store of each command back to its digest, by what is printed or by --with."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from pathlib import Path

import pytest

from potstill.common.config import load_config
from potstill.common.options import OVERRIDES
from potstill.launch import cli
from potstill.launch.cli import main
from potstill.launch.store_makers import maker_of
from potstill.storage import StoreReader, verify_store
from potstill.teacher_dump import ImportTargetsConfig, ImportTokensConfig
from potstill.teacher_dump.config import DumpConfig, PrepareConfig, ScoreConfig
from tests.storage.damage import flip, truncate, unit_file
from tests.teacher_dump.tiny import make_tokens, save_llama

GOLDEN = Path(__file__).parent.parent / "storage" / "golden"


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokens, a tiny teacher, dump.yaml and the targets that it gives."""
    root = tmp_path_factory.mktemp("dumped")
    make_tokens(root / "tokens")
    save_llama(root / "teacher")
    (root / "dump.yaml").write_text(dump_yaml(root))
    assert main(["dump", "--config", str(root / "dump.yaml")]) == 0
    return root


def dump_yaml(root: Path) -> str:
    teacher = f"{{model: {root / 'teacher'}, batch_rows: 3, check_tokenizer: false}}"
    return (
        f"tokens: {root / 'tokens'}\noutput: {root / 'targets'}\nteacher: {teacher}\n"
        "selection: {mode: top_p_k, p: 0.9, k: 12}\ntemperatures: [2.0]\n"
    )


@pytest.fixture
def whole(dumped: Path, tmp_path: Path) -> Path:
    """A copy of `dumped` for one test."""
    root = tmp_path / "root"
    shutil.copytree(dumped, root)
    (root / "dump.yaml").write_text(dump_yaml(root))
    return root


@pytest.fixture
def damaged(whole: Path) -> Path:
    """The same with a flipped unit and a missing one."""
    flip(unit_file(whole / "targets", 0), random.Random(1))
    unit_file(whole / "targets", 1).unlink()
    return whole


def test_dump_says_that_a_complete_store_is_damaged(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dump", "--config", str(damaged / "dump.yaml")]) == 1
    told = capsys.readouterr()
    assert "complete and sealed" not in told.out
    assert "unit 1" in told.err and f"potstill repair {damaged / 'targets'}" in told.err


def test_dump_says_that_a_sealed_store_has_lost_a_record(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(whole / "targets" / "units" / "u0000002.json", random.Random(0))
    assert main(["dump", "--config", str(whole / "dump.yaml")]) == 1
    told = capsys.readouterr().err
    assert "no readable record (first: [2])" in told and f"potstill repair {whole / 'targets'}" in told


def test_with_a_configuration_the_store_is_whole_at_the_end(
    damaged: Path, dumped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, words = damaged / "targets", ["repair", str(damaged / "targets"), "--with", str(damaged / "dump.yaml")]
    assert main([*words, "--dry-run"]) == 3
    assert f"potstill dump --config {damaged / 'dump.yaml'}" in capsys.readouterr().out
    assert (store / "manifest.json").exists()
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "to be made again: 2 units [0, 1]" in told and "did 2 units" in told
    assert StoreReader(store).digest == StoreReader(dumped / "targets").digest
    assert verify_store(store, deep=True).ok
    assert main(words) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_json_says_what_was_done_and_what_to_run(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["repair", str(damaged / "targets"), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["redo"] == [0, 1] and found["missing"] == [0, 1] and not found["sealed"]
    assert [item["unit"] for item in found["findings"]] == [0, 1] and found["moved"][0][0] == "manifest.json"
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    assert [key for key in found if f"`{key}`" not in page] == []
    # The printed command is the one that made the store, with what run.json cannot know in capitals.
    (line,) = found["next"]
    words = shlex.split(line.replace("TOKENS", str(damaged / "tokens")).replace("TEACHER", str(damaged / "teacher")))
    assert main([*words[1:], "teacher.check_tokenizer=false"]) == 0
    assert main(["repair", str(damaged / "targets")]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: elsewhere\n", "output is elsewhere, which is not where this store is written"),
        ("output: {store}\nforce: true\n", "force deletes the whole store"),
        ("outptu: x\n", "output"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_moved(
    damaged: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = damaged / "targets"
    plain = [line for line in dump_yaml(damaged).splitlines() if not line.startswith("output")]
    (damaged / "wrong.yaml").write_text("\n".join(plain) + "\n" + text.format(store=store))
    assert main(["repair", str(store), "--with", str(damaged / "wrong.yaml")]) == 1
    assert message in capsys.readouterr().err
    assert (store / "manifest.json").exists() and not (store / "quarantine").exists()


@pytest.mark.parametrize("units", [(0,), (2,), (-1,), (0, 1, 2, -1)])
def test_prepare_makes_again_what_repair_took_out(
    text: Path, tmp_path: Path, units: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """First, middle and last unit of a store whose length nobody knows before its end."""
    yaml = tmp_path / "prepare.yaml"
    yaml.write_text(
        f"input: [{text}]\noutput: {tmp_path / 'd'}\nrow_length: 32\nrows_per_unit: 4\nheldout_fraction: 0.2\n"
        "train_tokenizer: {vocab_size: 300}\n"
    )
    assert main(["prepare", "--config", str(yaml)]) == 0
    store = tmp_path / "d" / "train"
    digest, last = StoreReader(store).digest, StoreReader(store).num_units - 1
    for unit in units:
        flip(unit_file(store, last if unit < 0 else unit), random.Random(unit))
    assert main(["repair", str(store), "--with", str(yaml)]) == 0
    assert StoreReader(store).digest == digest and verify_store(store, deep=True).ok
    assert "Traceback" not in capsys.readouterr().err


def test_damage_of_the_index_needs_a_seal_only(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = damaged / "tokens"
    digest = StoreReader(store).digest
    flip(store / "index.arrow", random.Random(3))
    assert main(["repair", str(store)]) == 3
    told = capsys.readouterr().out
    assert f"potstill seal {store}" in told
    assert main(["seal", str(store)]) == 0
    assert StoreReader(store).digest == digest


def test_the_command_of_every_kind_of_store_is_understood() -> None:
    """Of the stores that are kept as examples: what is printed is a command line with a configuration."""
    trees = {
        "prepare": PrepareConfig,
        "import tokens": ImportTokensConfig,
        "import targets": ImportTargetsConfig,
        "dump": DumpConfig,
        "score": ScoreConfig,
    }
    from potstill.launch.store_makers import command_line

    seen = set()
    for place in sorted(GOLDEN.iterdir()):
        spec = StoreReader(place).spec
        maker = maker_of(spec)
        line = command_line(maker, spec, str(place))
        arguments = cli.parse(shlex.split(line)[1:])
        load_config(trees[maker.name], arguments.config, getattr(arguments, OVERRIDES))
        seen.add(maker.name)
    assert {"prepare", "dump", "score"} <= seen
