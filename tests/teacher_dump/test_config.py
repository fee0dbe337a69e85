"""The trees of settings: defaults that stand, and errors that name the key."""

from __future__ import annotations

import pytest

from potstill.common.config import dump_config, load_config
from potstill.common.errors import ConfigError
from potstill.teacher_dump import DumpConfig, PrepareConfig, ScoreConfig

PREPARE = ["input=[a]", "output=b", "tokenizer=c"]
DUMP = ["tokens=a", "output=b", "teacher.model=c"]


def test_a_written_tree_reads_back_equal() -> None:
    from potstill.common.config import parse_yaml

    for model, overrides in (
        (PrepareConfig, PREPARE),
        (DumpConfig, [*DUMP, "temperatures=[2.0]", "selection.mode=top_k"]),
        (ScoreConfig, ["tokens=s3://bucket/a", "output=b", "model.model=c"]),
    ):
        config = load_config(model, None, overrides)
        assert model.model_validate(parse_yaml(dump_config(config), name="written")) == config


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        (PrepareConfig, ["input=[a]", "output=b"], "exactly one of tokenizer and train_tokenizer"),
        (PrepareConfig, [*PREPARE, "train_tokenizer.vocab_size=300"], "exactly one of tokenizer and train_tokenizer"),
        (PrepareConfig, [*PREPARE, "heldout_fraction=0.1", "heldout_documents=3"], "at most one of heldout"),
        (PrepareConfig, [*PREPARE, "row_lenght=7"], "did you mean 'row_length'"),
        (DumpConfig, [*DUMP, "selection.k=256"], r"selection.k"),
        (DumpConfig, [*DUMP, "selection.p=0"], r"selection.p"),
        (DumpConfig, [*DUMP, "selection.mode=sample", "selection.power=0.4"], r"selection.power"),
        (DumpConfig, [*DUMP, "selection.mode=sample", "selection.power=1.6"], r"selection.power"),
        (DumpConfig, [*DUMP, "selection.power=0.8"], "power 0.8 is of draws, and mode is top_p_k"),
        (DumpConfig, [*DUMP, "temperatures=[1.0]"], "not 1, which is always stored"),
        (DumpConfig, [*DUMP, "temperatures=[2.0, 2.0]"], "name one twice"),
        (DumpConfig, [*DUMP, "temperatures=[0]"], r"must be in \(0, 100\]"),
        (DumpConfig, [*DUMP, "worker=2", "num_workers=2"], "worker 2 is not below num_workers 2"),
        (DumpConfig, [*DUMP, "teacher.dtype=float8"], "teacher.dtype"),
        (DumpConfig, ["tokens=a", "output=b"], "teacher: this key is needed"),
    ],
)
def test_what_is_wrong_is_named(model: type, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(model, None, overrides)


def test_the_facade_loads_no_heavy_library() -> None:
    import subprocess
    import sys

    code = "import potstill.teacher_dump, sys; print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
