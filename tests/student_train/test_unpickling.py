"""Loading executes nothing: code planted in each kind of file of a checkpoint does not run, through any door.

The manifest is made to fit each planted file, as somebody would who made the checkpoint for others to load.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import load_file

from potstill.common.errors import UserError
from potstill.student_train.hf_export.weights import checkpoint_state, find_source, load_model
from potstill.student_train.run.checkpoint import checkpoint_folder, read_checkpoint
from potstill.student_train.run.checkpoint_files import MANIFEST, describe_files, manifest_of
from potstill.student_train.run.universal import convert
from potstill.student_train.run.unpickling import UnpicklingRefusedError, only_allowed
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine
from tests.dist_harness import run_ranks
from tests.student_train import workers
from tests.student_train.test_resume import tree_of


class Code:
    """What pickles itself as a call of its own choosing."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture(scope="module")
def trained(stores, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run of one rank for ZeRO 0, 1 and 3, with a checkpoint at step 2."""
    runs = {stage: tmp_path_factory.mktemp("trained") / f"zero{stage}" for stage in (0, 1, 3)}
    trees = [tree_of(stores, run, stage=stage, run={"max_steps": 2}) for stage, run in runs.items()]
    assert run_ranks(workers.train_runs, trees, world=1) == [["done"] * len(runs)]
    return runs


def plant(folder: Path, name: str, mark: Path) -> None:
    """Put code into a file of a checkpoint, beside all that stood there, and make the manifest fit."""
    content = torch.load(folder / name, weights_only=False)
    torch.save({"code": Code(mark), **content}, folder / name)
    manifest = json.loads((folder / MANIFEST).read_text())
    about = {key: value for key, value in manifest.items() if key not in ("files", "version", "sha256")}
    files = manifest["files"] | describe_files(folder, [name])
    (folder / MANIFEST).write_text(json.dumps(manifest_of(files, about)))


def planted_in(run: Path, to: Path, name: str, mark: Path) -> Path:
    shutil.copytree(run, to)
    plant(checkpoint_folder(to, 2), name, mark)
    return to


def test_planted_code_runs_through_no_door(stores, trained: dict[int, Path], tmp_path: Path) -> None:
    mark = tmp_path / "the planted code ran"
    trees, planted = [], []
    for stage, run in trained.items():
        names = sorted(path.name for path in checkpoint_folder(run, 2).glob("*.pt"))
        assert len(names) == (1 if stage == 0 else 2)
        for name in names:
            to = planted_in(run, tmp_path / f"zero{stage}-{name}", name, mark)
            planted.append((stage, name, to))
            # Further than the checkpoint: it is loaded, by the same number of ranks.
            trees.append(tree_of(stores, to, stage=stage, run={"max_steps": 2}))
    [endings] = run_ranks(workers.train_runs, trees, world=1)
    for (stage, name, run), ending in zip(planted, endings, strict=True):
        assert ending.startswith("UnpicklingRefusedError: ") and "mkdir" in ending, (stage, name, ending)
        source = find_source(run)
        assert source.checkpoint is not None
        with pytest.raises(UnpicklingRefusedError, match="mkdir"):
            checkpoint_state(source.checkpoint)
        assert not mark.exists(), (stage, name)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_conversion_to_other_ranks_executes_nothing(trained: dict[int, Path], tmp_path: Path, stage: int) -> None:
    mark = tmp_path / "the planted code ran"
    [name] = [path.name for path in checkpoint_folder(trained[stage], 2).glob("*optim_states.pt")]
    run = planted_in(trained[stage], tmp_path / "run", name, mark)
    with pytest.raises(UserError, match="holds what no checkpoint of this project holds"):
        convert(read_checkpoint(checkpoint_folder(run, 2)), tmp_path / "universal")
    assert not mark.exists() and not (tmp_path / "universal").exists()


class AsGetattr:
    """What pickles itself as getattr of two arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (getattr, self.arguments)


def test_getattr_gives_members_of_one_enum_and_nothing_else(tmp_path: Path) -> None:
    """Python 3.11.0 to 3.11.3 saved them so, and their checkpoints are loaded by others."""
    file = tmp_path / "a.pt"
    torch.save({"stage": AsGetattr(ZeroStageEnum, "gradients")}, file)
    with only_allowed(tmp_path):
        assert torch.load(file)["stage"] is ZeroStageEnum.gradients
    for arguments in ((ZeroStageEnum, "__subclasses__"), (ZeroStageEnum, "from_bytes"), (fragment_address, "__init__")):
        torch.save({"stage": AsGetattr(*arguments)}, file)
        with pytest.raises(UnpicklingRefusedError, match="it names getattr"), only_allowed(tmp_path):
            torch.load(file)


def test_the_mark_is_made_where_loading_is_not_limited(trained: dict[int, Path], tmp_path: Path) -> None:
    """What is planted does run where it may: the tests above can fail. Behind the limit torch.load is as it was."""
    mark = tmp_path / "the planted code ran"
    run = planted_in(trained[0], tmp_path / "run", "mp_rank_00_model_states.pt", mark)
    file = checkpoint_folder(run, 2) / "mp_rank_00_model_states.pt"
    load = torch.load
    with pytest.raises(UnpicklingRefusedError), only_allowed(file.parent):
        torch.load(file, weights_only=False)
    assert torch.load is load and not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load_as_teacher(folder: Path) -> Any:
    return load_engine(TeacherConfig(model=str(folder), device="cpu", dtype="float32"))


@pytest.mark.parametrize("load", [load_as_teacher, lambda folder: load_model(find_source(folder), dtype="float32")])
def test_a_model_folder_runs_no_code_and_asks_nobody(
    model: Path, tmp_path: Path, load: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weights that are a pickle with code in them, nor a class of its own beside them: each is an error."""
    mark = tmp_path / "the planted code ran"
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person was asked"))
    with_code, with_class = (Path(shutil.copytree(model, tmp_path / name)) for name in ("code", "class"))
    weights = load_file(with_code / "model.safetensors")
    (with_code / "model.safetensors").unlink()
    torch.save({"code": Code(mark), **weights}, with_code / "pytorch_model.bin")
    settings = json.loads((with_class / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (with_class / "config.json").write_text(json.dumps(settings))
    (with_class / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    for folder, words in ((with_code, "mkdir"), (with_class, "custom code")):
        with pytest.raises(UserError, match=words) as error:
            load(folder)
        assert str(folder) in str(error.value)
    assert not mark.exists()
    assert load(model) is not None
