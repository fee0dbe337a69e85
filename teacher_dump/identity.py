"""What a teacher is: names, digests of its weights and configuration, and whether it fits a tokens store.

Everything here runs before the weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.common.model_place import find_model, one_line
from potstill.storage import RunSpec
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.table import ENGINES
from potstill.teacher_dump.tokenizer import tokenizer_digest

log = logging.getLogger(__name__)

PINS = "engine_pins"  # key of run.json's teacher: what an engine says of itself beside the teacher's own figures
_HASH_THREADS = 4
_PLACE_KEYS = ("revision", "trust_remote_code", "subfolder", "token", "cache_dir", "local_files_only")
_FETCH_KEYS = ("token", "cache_dir", "local_files_only")  # of them those that fetching a whole model takes
# Options of from_pretrained that say where weights come from or lie, not what they are.
_IDLE_OPTIONS = {*_PLACE_KEYS, "device_map", "max_memory", "low_cpu_mem_usage", "use_safetensors", "force_download"}
# Keys of config.json that do not change what the model computes.
_IDLE_KEYS = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache"}


def load_config(teacher: TeacherConfig) -> Any:
    """The model's transformers configuration; UserError when the folder or id has none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(teacher.model, **_place_options(teacher))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"teacher {teacher.model!r}: no readable model configuration: {one_line(error)}") from error


def located(teacher: TeacherConfig) -> TeacherConfig:
    """The same settings, told to use the hub's cache where the hub cannot be reached.

    Raises UserError, before anything heavy is loaded, when a model is neither a folder nor in the cache nor on the hub.
    """
    options = teacher.load_options
    one_by_one = (teacher.model, *(member.model for member in teacher.ensemble))
    local_only = [
        find_model(name, what="teacher", revision=options.get("revision"), cache_dir=options.get("cache_dir"))
        for name in one_by_one
        if not options.get("subfolder")
    ]
    if not any(local_only):
        return teacher
    return teacher.model_copy(update={"load_options": {**options, "local_files_only": True}})


def _place_options(teacher: TeacherConfig) -> dict[str, Any]:
    """What else than its name says where a model is: the same for its configuration, tokenizer and weights."""
    asked = {key: teacher.load_options[key] for key in _PLACE_KEYS if key in teacher.load_options}
    return {"trust_remote_code": False, **asked}  # left out, transformers would ask on the terminal


def computing_dtype(teacher: TeacherConfig, model_config: Any) -> str:
    """The dtype that the weights will have, known before they are loaded: part of run.json."""
    if teacher.dtype != "auto":
        return teacher.dtype
    saved = getattr(model_config, "dtype", None) or getattr(model_config.get_text_config(), "dtype", None)
    return str(saved).removeprefix("torch.") if saved is not None else "float32"


def check_fits(teacher: TeacherConfig, config: Any, tokens: RunSpec) -> None:
    """Raise UserError when the model cannot read these rows: vocabulary, context length, tokenizer."""
    text = config.get_text_config()
    vocab = getattr(text, "vocab_size", None)
    if vocab is not None and vocab < tokens.vocab_size:
        raise UserError(
            f"teacher {teacher.model!r} has {vocab} output rows, but the rows were made with a tokenizer of "
            f"{tokens.vocab_size} entries; prepare the text with the teacher's own tokenizer"
        )
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is not None and limit < tokens.row_length:
        raise UserError(
            f"teacher {teacher.model!r} reads at most {limit} positions, but the rows hold {tokens.row_length} tokens; "
            f"prepare with row_length={limit} or less"
        )
    _check_long_rows(teacher, text, tokens.row_length)
    if teacher.check_tokenizer:
        _check_tokenizer(teacher, tokens)


def _check_long_rows(teacher: TeacherConfig, text: Any, row_length: int) -> None:
    """Refuse what only shows in rows longer than the probe that an engine makes when it has loaded the weights."""
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        short = one.get("original_max_position_embeddings") or row_length
        if one.get("rope_type") == "longrope" and short < row_length:
            raise UserError(
                f"teacher {teacher.model!r} reads documents of more than {short} tokens with other position factors "
                f"(longrope), and transformers chooses them for a whole batch by its longest document: a document "
                f"would get other targets beside a long one, and the rows hold {row_length} tokens; prepare with "
                f"row_length={short} or less"
            )
    chunk = getattr(text, "attention_chunk_size", None)
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ["chunked_attention"])
    if chunk and chunked and chunk < row_length and teacher.documents == "packed":
        raise UserError(
            f"teacher {teacher.model!r} attends in chunks of {chunk} tokens, which transformers counts from the start "
            f"of a row and not of a document, and the rows hold {row_length} tokens; set documents=apart"
        )


def _check_tokenizer(teacher: TeacherConfig, tokens: RunSpec) -> None:
    folder = Path(teacher.model)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        log.warning("teacher %s holds no tokenizer, so it cannot be compared with that of the rows", folder)
        return
    from transformers import AutoTokenizer

    try:
        found = tokenizer_digest(AutoTokenizer.from_pretrained(teacher.model, **_place_options(teacher)))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"teacher {teacher.model!r}: its tokenizer cannot be loaded ({one_line(error)}); "
            "set check_tokenizer=false if you know that it is that of the rows"
        ) from error
    if found != tokens.tokenizer_digest:
        raise UserError(
            f"teacher {teacher.model!r} has a tokenizer with digest {found[:16]}, the rows were made with "
            f"{tokens.tokenizer_digest[:16]}; prepare the text with the teacher's tokenizer "
            "(check_tokenizer=false skips this check)"
        )


def teacher_id(teacher: TeacherConfig) -> str:
    """Name for run.json: a folder's own name (so that it may be moved), or the hub id and revision."""
    if Path(teacher.model).is_dir():
        return Path(teacher.model).resolve().name
    revision = teacher.load_options.get("revision")
    return teacher.model if revision is None else f"{teacher.model}@{revision}"


def config_digest(config: Any) -> str:
    """sha256 over the model configuration without the keys that change nothing."""
    plain = {key: value for key, value in config.to_dict().items() if key not in _IDLE_KEYS}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def folder_weights_digest(folder: Path) -> str:
    """sha256 over the names and contents of the weight files, in order of names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"teacher folder {folder} holds no weights (*.safetensors or *.bin)")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(_file_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(f"{file.name} {digest}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    # A hub cache links to files that are named by their sha256: no need to read 100 GB again.
    target = os.path.basename(os.path.realpath(path))
    if path.is_symlink() and len(target) == 64 and set(target) <= set("0123456789abcdef"):
        return target
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error.strerror}") from error


def weights_digest(teacher: TeacherConfig) -> str:
    """Digest of a model's weights on disk; see weights_folder."""
    return folder_weights_digest(weights_folder(teacher))


def weights_folder(teacher: TeacherConfig) -> Path:
    """Where a model's weights lie: its folder, or the hub's cache (fetched first when it is not there)."""
    folder = Path(teacher.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.safetensors", "*.json", "*.bin"]
            revision = teacher.load_options.get("revision")
            options = {key: teacher.load_options[key] for key in _FETCH_KEYS if key in teacher.load_options}
            folder = Path(snapshot_download(teacher.model, revision=revision, allow_patterns=patterns, **options))
        except Exception as error:  # the hub's client has a dozen classes of its own, without one base
            raise UserError(
                f"teacher {teacher.model!r} is no folder and cannot be fetched: {one_line(error)}"
            ) from error
    return folder


def describe(teacher: TeacherConfig, config: Any, *, dtype: str) -> Mapping[str, Any]:
    """The `teacher` field of run.json: what decides the bytes. Batch size and device are left out on purpose."""
    found = {
        "id": teacher_id(teacher),
        "weights_digest": weights_digest(teacher),
        "config_digest": config_digest(config),
        "architecture": (getattr(config, "architectures", None) or [type(config).__name__])[0],
        "dtype": dtype,
        "engine": teacher.engine,
        "attention": teacher.attention or "default",
        "documents": teacher.documents,
        "padded_vocab_size": int(getattr(config.get_text_config(), "vocab_size", 0)),
    }
    entry = ENGINES[teacher.engine]
    idle = _IDLE_OPTIONS | entry.idle_options
    options = {key: value for key, value in teacher.load_options.items() if key not in idle}
    if options:
        # A quantised load of the same weights is another teacher.
        found["load_options"] = json.loads(json.dumps(options, sort_keys=True, default=str))
    if teacher.head == "logits":
        found["head"] = "logits"  # rounded to the model's dtype, which those of a head applied apart are not
    if entry.pins is not None:
        found[PINS] = dict(import_module(entry.pins).pins(teacher, dtype=dtype))
    if teacher.ensemble:
        others = [_describe_member(one, weight) for one, weight in members(teacher)]
        found |= {"weight": teacher.weight, "ensemble": others}
    return found


def members(teacher: TeacherConfig) -> list[tuple[TeacherConfig, float]]:
    """The further teachers of an ensemble, each as a configuration of its own, and their weights."""
    alone = teacher.model_copy(update={"ensemble": []})
    return [(alone.model_copy(update={"model": one.model}), one.weight) for one in teacher.ensemble]


def _describe_member(teacher: TeacherConfig, weight: float) -> dict[str, Any]:
    config = load_config(teacher)
    return {
        "id": teacher_id(teacher),
        "weights_digest": weights_digest(teacher),
        "config_digest": config_digest(config),
        "weight": weight,
    }
