"""What transformers tells of a checkpoint that it has loaded: weights it lacks, of other shapes, and left over.

transformers fills what is missing or of another shape with random numbers, and leaves out without an error what the
model has no place for; none of this may pass unseen into targets.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from potstill.common.errors import UserError
from potstill.teacher_dump.config import TeacherConfig

log = logging.getLogger(__name__)

# Multi-token prediction: a part of that name, or a layer beyond the last (DeepSeek-V3, GLM-4.5).
_NAMED = re.compile(r"(^|[._])(mtp|nextn|medusa)")
_LAYER = re.compile(r"^(?:(?:model|language_model|transformer)\.)*layers\.(\d+)\.")
_SHOWN = 3


def check_loaded(teacher: TeacherConfig, model: Any, found: Mapping[str, Iterable[Any]]) -> None:
    """Raise UserError for weights that are missing or of another shape; log those that the model has no place for.

    found: the loading information of from_pretrained, called with ignore_mismatched_sizes=True.
    """
    config = model.config
    _refuse_lost_cap(teacher, config.get_text_config())
    refuse_missing(teacher, found["missing_keys"])
    _refuse_shapes(teacher, config, found["mismatched_keys"])
    # From the files, since transformers does not tell of those that it knows to be further heads.
    further = further_heads(set(_saved_names(teacher)) - set(model.state_dict()), config)
    if further:
        log.info(
            "teacher %s: %d of its weights (%s) are of multi-token prediction; they are left out, targets are of the "
            "main head, which predicts the next token",
            teacher.model,
            len(further),
            _some(further),
        )
    unused = set(found["unexpected_keys"])
    if unused := unused - set(further_heads(unused, config)):
        log.warning(
            "teacher %s: %d weights of its checkpoint (%s) have no place in %s and are left out; if they are part of "
            "the model, its config.json is of another one",
            teacher.model,
            len(unused),
            _some(unused),
            type(model).__name__,
        )


def further_heads(names: Iterable[str], config: Any) -> list[str]:
    """Those of the names of weights that belong to multi-token prediction, sorted. `config` is the model's."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)

    def is_further(name: str) -> bool:
        layer = _LAYER.search(name)
        beyond = layer is not None and layers is not None and int(layer.group(1)) >= layers
        return beyond or _NAMED.search(name) is not None

    return sorted(name for name in names if is_further(name))


def refuse_missing(teacher: TeacherConfig, missing: Iterable[str]) -> None:
    """Raise UserError when weights are not in the checkpoint: transformers fills them with random numbers."""
    if names := sorted(missing):
        raise UserError(
            f"teacher {teacher.model!r}: {len(names)} of its weights are not in the checkpoint "
            f"({', '.join(names[:_SHOWN])}); expected all of them: fetch the checkpoint again, or correct its "
            "config.json"
        )


def _refuse_shapes(teacher: TeacherConfig, config: Any, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    odd = sorted((name, tuple(saved), tuple(wanted)) for name, saved, wanted in mismatched)
    if not odd:
        return
    name, saved, wanted = odd[0]
    what = f"{name} is {list(saved)} in the checkpoint, config.json asks for {list(wanted)}"
    advice = "fetch the checkpoint again, or correct its config.json"
    vocab = getattr(config.get_text_config(), "vocab_size", None)
    if vocab is not None and wanted[:1] == (vocab,) and saved[1:] == wanted[1:] and saved[0] > vocab:
        advice = (
            f"rows that pad the vocabulary are left out by a dump: set vocab_size to {saved[0]} in config.json, with "
            "embeddings of as many rows"
        )
        if saved[0] % vocab == 0:
            advice += (
                f"; if these are {saved[0] // vocab} heads of multi-token prediction, keep the {vocab} rows of the "
                "one that predicts the next token in the checkpoint"
            )
    raise UserError(f"teacher {teacher.model!r}: {len(odd)} of its weights have another shape: {what}; {advice}")


def _refuse_lost_cap(teacher: TeacherConfig, text: Any) -> None:
    # transformers up to 5.19 takes sdpa for Gemma 2, later ones do not: it knows no cap on the scores of attention, and
    # every target would be off by what the cap does.
    cap, attention = getattr(text, "attn_logit_softcapping", None), getattr(text, "_attn_implementation", None)
    if cap and attention == "sdpa":
        raise UserError(
            f"teacher {teacher.model!r} caps the scores of its attention at {cap}, and this version of transformers "
            f"computes it by {attention}, which leaves the cap out; set teacher.attention=eager"
        )


def _saved_names(teacher: TeacherConfig) -> list[str]:
    """Names of the weights in the safetensors files of the teacher's folder or of the hub's cache."""
    folder = Path(teacher.model) / teacher.load_options.get("subfolder", "")
    if not Path(teacher.model).is_dir():
        from huggingface_hub import try_to_load_from_cache

        options = {key: teacher.load_options[key] for key in ("cache_dir", "revision") if key in teacher.load_options}
        inner = Path(teacher.load_options.get("subfolder", "")) / "config.json"
        kept = try_to_load_from_cache(str(teacher.model), inner.as_posix(), **options)
        if not isinstance(kept, str):
            return []
        folder = Path(kept).parent
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    from safetensors import safe_open

    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as weights:
            names += weights.keys()
    return names


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")
