"""What repair takes out of the stores of rollout and of the imports is made again by the same command, to the bit."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.launch.cli import main
from potstill.storage import StoreReader, repair_store, verify_store
from potstill.teacher_dump import RolloutConfig, rollout
from potstill.teacher_dump.importing.targets.config import ImportTargetsConfig
from potstill.teacher_dump.importing.targets.run import import_targets
from tests.storage.damage import flip, unit_file
from tests.student_train import tiny
from tests.teacher_dump.foreign_files import truth_of, write_topk
from tests.teacher_dump.tiny import make_tokens, save_llama

NAMES = ("scores", "answers", "tokens")


@pytest.fixture(scope="module")
def rolled(tmp_path_factory: pytest.TempPathFactory) -> tuple[RolloutConfig, list[str]]:
    """A rollout over three units, and the digests of its stores."""
    root = tmp_path_factory.mktemp("rolled")
    masks = [np.arange(9) >= 4 for _ in range(5)]
    tokens = make_tokens(root / "prompts", [(9,)] * 5, masks=masks)
    model = {"model": save_llama(root / "model"), "check_tokenizer": False, "batch_rows": 2}
    config = RolloutConfig(
        tokens=tokens, output=root / "out", model=model, samples=2, grade_ids=True, stop_ids=[3], max_new_tokens=4
    )
    assert rollout(config).sealed
    return config, [StoreReader(root / "out" / name).digest for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_each_store_of_a_rollout(rolled: tuple[RolloutConfig, list[str]], name: str, tmp_path: Path) -> None:
    """Answers and scores of a unit come of one walk: a unit that one lacks is taken out of the other, too."""
    config, digests = rolled
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    config = config.model_copy(update={"output": str(output)})
    flip(unit_file(output / name, 0), random.Random(2))
    if name == "answers":
        repair_store(output / name)  # as if the command had been killed between the two stores
        with pytest.raises(UserError, match=f"potstill repair {output / name}"):
            rollout(config)
    assert main(["repair", str(output / name)]) == 3
    assert rollout(config).sealed
    assert [StoreReader(output / one).digest for one in NAMES] == digests
    assert all(verify_store(output / one, deep=True).ok for one in NAMES)


@pytest.mark.parametrize("unit", [0, 1, 3])
def test_an_import_of_targets(unit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truths = [truth_of(row) for row in tiny.token_rows(16)]
    tiny.write_store(
        tmp_path / "t", tiny.spec_of("tokens", num_rows=None, rows_per_unit=4), [one.row for one in truths]
    )
    source = write_topk(tmp_path / "files" / "a.parquet", truths)
    settings = {"input": [str(source)], "output": str(tmp_path / "d"), "teacher": "bigram"}
    settings["tokens"] = str(tmp_path / "t")
    (tmp_path / "import.yaml").write_text(json.dumps(settings))
    import_targets(ImportTargetsConfig(**settings))
    store = tmp_path / "d" / "targets"
    digest = StoreReader(store).digest
    flip(unit_file(store, unit), random.Random(unit))
    assert main(["repair", str(store), "--with", str(tmp_path / "import.yaml")]) == 0
    assert StoreReader(store).digest == digest and verify_store(store, deep=True).ok
    assert "potstill import targets --config" in capsys.readouterr().out
