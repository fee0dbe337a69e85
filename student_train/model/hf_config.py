"""The student's Hugging Face configuration, and all that can be wrong with it before a model is built."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from potstill.common.errors import UserError
from potstill.student_train.config.train import ModelConfig
from potstill.student_train.model.initial_weights import STD_KEY, initial_weights
from potstill.student_train.model.router import router_balance

log = logging.getLogger(__name__)


def hf_config(model: ModelConfig, *, vocab_size: int, row_length: int | None = None) -> Any:
    """The student's configuration for rows of `row_length` tokens with ids below `vocab_size`.

    Raises UserError, naming the key of `model`, when it cannot be read, is not one of a causal language model, or does
    not fit the tokens store.
    """
    if isinstance(model.config, dict):
        key, config = "model.config", _inline_config(model.config, vocab_size)
    else:
        key, folder = ("model.config", model.config) if model.path is None else ("model.path", model.path)
        config = _folder_config(Path(str(folder)), key)
    _check_architecture(config, key)
    _check_size(config, key, vocab_size=vocab_size, row_length=row_length)
    _check_attention(model)
    router_balance(model.router_aux_loss, config)  # refuses or warns now
    if model.path is None:
        try:
            std = initial_weights(model, config).std
        except ValueError as error:
            raise UserError(str(error)) from error
        if std is not None:
            setattr(config.get_text_config(), STD_KEY, std)
    config.use_cache = False
    return config


def _inline_config(given: dict[str, Any], vocab_size: int) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {"vocab_size": vocab_size, **given}
    kind = values.pop("model_type", None)
    if kind is None:
        raise UserError("model.config needs model_type (e.g. llama); it names the transformers architecture")
    if kind not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model.config.model_type {kind!r}: transformers does not know it{hint}")
    try:
        config = AutoConfig.for_model(kind, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config is no {kind} configuration: {_one_line(error)}") from error
    # transformers keeps what it does not know as a plain attribute, and a misspelt size is then the default's. But some
    # models read attributes that their configuration does not declare (qwen3_moe: head_dim), so only typos are errors.
    known = {field.name for field in dataclasses.fields(type(config))} | set(config.attribute_map)
    for name in values:
        if name not in known and name in vars(config):
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
            if near:
                raise UserError(f"model.config.{name}: {kind} has no such key; did you mean {near[0]!r}?")
            log.warning("model.config.%s: %s declares no such key, so it may do nothing", name, type(config).__name__)
    return config


def _folder_config(folder: Path, key: str) -> Any:
    from transformers import AutoConfig

    if key == "model.path" and folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{key} {folder} holds no weights (*.safetensors); for random weights name the folder in model.config"
        )
    if not folder.exists():
        raise UserError(f"{key} {folder} does not exist; give a folder with a config.json (nothing is downloaded)")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{key} {folder} holds no readable model configuration: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """The first words of a message of transformers: what follows is advice to update it."""
    paragraphs = str(error).split("\n\n")
    return " ".join(paragraphs[0].split()) or type(error).__name__


def _check_architecture(config: Any, key: str) -> None:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"{key}: {config.model_type!r} is no causal language model of transformers, so it cannot be a student; "
            "take one that is (llama, qwen3, mixtral, ...)"
        )


def _check_size(config: Any, key: str, *, vocab_size: int, row_length: int | None) -> None:
    text = config.get_text_config()
    if text.vocab_size < vocab_size:
        raise UserError(
            f"{key}: the student's vocab_size is {text.vocab_size}, but its rows hold ids below {vocab_size} (of "
            f"the tokens store, or of data.vocabulary); set vocab_size to {vocab_size} or more, or prepare the text "
            "with the student's tokenizer"
        )
    limit = getattr(text, "max_position_embeddings", None)
    if row_length is not None and limit is not None and limit < row_length:
        raise UserError(
            f"{key}: the student's max_position_embeddings is {limit}, but the rows of data.tokens hold {row_length} "
            f"tokens, and a document may fill a row; set it to {row_length} or more, or prepare shorter rows"
        )


def _check_attention(model: ModelConfig) -> None:
    from transformers.utils import is_flash_attn_2_available

    if model.attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise UserError(
            "model.attention is flash_attention_2, which needs a GPU and the package flash-attn; install it, or take "
            "sdpa"
        )
