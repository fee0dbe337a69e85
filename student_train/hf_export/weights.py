"""Find the weights behind a path: a run folder, one checkpoint of it, or a Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.common.model_place import one_line
from potstill.student_train.model.parameters import DTYPES
from potstill.student_train.run.checkpoint import Checkpoint, checkpoint_folders, read_checkpoint
from potstill.student_train.run.checkpoint_files import MANIFEST, DamagedError, UnfinishedError
from potstill.student_train.run.run_folder import CONFIG_FILE, STUDENT_FOLDER
from potstill.student_train.run.unpickling import only_allowed

PREFIX = "hf."
EXPORT_FILE = "potstill_export.json"  # what an export says of where its weights come from


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `checkpoint` is None for a Hugging Face folder."""

    folder: Path
    checkpoint: Checkpoint | None

    @property
    def run(self) -> Path:
        """Run folder of a checkpoint."""
        assert self.checkpoint is not None
        return self.checkpoint.folder.parent.parent

    @property
    def config_folder(self) -> Path:
        """Folder with the model's config.json."""
        return self.folder if self.checkpoint is None else self.run / STUDENT_FOLDER


def find_source(path: Path) -> Source:
    """Tell which of the three a path is. Raises UserError."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a run folder, a checkpoint folder or a Hugging Face folder")
    if (path / MANIFEST).is_file():
        return Source(path, read_checkpoint(path, contents=True))
    if (path / CONFIG_FILE).is_file():
        return Source(path, _newest(path))
    if (path / "config.json").is_file():
        return Source(path, None)
    raise UserError(f"{path} is neither a run folder, nor a checkpoint, nor a Hugging Face folder (no config.json)")


def _newest(run: Path) -> Checkpoint:
    """The newest checkpoint of a run, checked by content; an older one does not stand in for it. Raises UserError."""
    for folder in reversed(checkpoint_folders(run)):
        try:
            return read_checkpoint(folder, contents=True)
        except UnfinishedError:
            continue  # a save that is under way, or was cut short
        except DamagedError as error:
            raise DamagedError(f"{error}; name an older one of {folder.parent} to read that") from error
    raise UserError(f"run {run} holds no whole checkpoint yet; let it reach its first save")


def checkpoint_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Full weights of a checkpoint by Hugging Face name; float32 masters where the run kept them (ZeRO 1-3)."""
    folder = checkpoint.folder
    with only_allowed(folder):
        if checkpoint.zero_stage == 0:
            state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")["module"]
        else:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
    # What does not begin so are parameters of loss terms, which are no part of the student.
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def load_model(source: Source, *, dtype: str, attention: str = "sdpa") -> Any:
    """The Hugging Face model of a source, on the CPU, in eval mode. No code of the folder is run. Raises UserError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attention, "dtype": DTYPES[dtype]}
    if source.checkpoint is None:
        place = {"local_files_only": True, "trust_remote_code": False}
        try:
            return AutoModelForCausalLM.from_pretrained(source.folder, **place, **options).eval()
        except (OSError, ValueError, ImportError, RuntimeError, UnpicklingError) as error:
            raise UserError(f"model {source.folder} cannot be loaded: {one_line(error)}") from error
    config = AutoConfig.from_pretrained(source.config_folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, **options)
    state = {name: tensor.to(DTYPES[dtype]) for name, tensor in checkpoint_state(source.checkpoint).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if config.get_text_config().tie_word_embeddings else set()
    )
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise UserError(
            f"{source.checkpoint.folder} does not fit the configuration in {source.config_folder}: missing {missing}, "
            f"unexpected {unexpected}"
        )
    model.tie_weights()
    return model.eval()


def model_settings(source: Source) -> list[Any]:
    """What a source's settings say of its text: its text config, and its generation config where the folder has one."""
    from transformers import AutoConfig, GenerationConfig

    folder = source.config_folder
    found = [AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False).get_text_config()]
    if (folder / "generation_config.json").is_file():
        found.append(GenerationConfig.from_pretrained(folder, local_files_only=True))
    return found
