"""The head of a checkpoint, read from its safetensors files by name: the model itself is with vLLM.

Legend: V output rows, padding included, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from potstill.common.causal_lm import soft_cap_and_scale
from potstill.common.errors import UserError
from potstill.teacher_dump.engines.base import Head

HEADS = ("lm_head", "embed_out", "output_layer", "output")  # Llama and most, GPT-NeoX, ChatGLM, InternLM2
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
# What stands beside a quantised weight: GPTQ and AWQ, compressed-tensors, FP8 (DeepSeek and ModelOpt), bitsandbytes.
_QUANTISED = (
    "qweight",
    "qzeros",
    "scales",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight.absmax",
    "weight.quant_state.bitsandbytes__nf4",
    "SCB",
)
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def read_checkpoint_head(folder: Path, config: Any, *, dtype: torch.dtype, device: torch.device) -> Head:
    """The output layer [V, D] in `dtype` on `device`, with bias, soft cap and scale of the configuration.

    `config` is the model's transformers configuration. Raises UserError for a head that is not there, is quantised, has
    another number of rows than the vocabulary, or is one of two that differ.
    """
    places = tensor_places(folder)
    text = config.get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False) or getattr(config, "tie_word_embeddings", False))
    layer = head_layer(places, tied=tied, folder=folder)
    beside = [name for name in (f"{layer}.{ending}" for ending in _QUANTISED) if name in places]
    if beside:
        raise UserError(_quantised_text(folder, layer, f"{beside[0]} stands beside it"))
    weight = _read(folder, places, f"{layer}.weight")
    if weight.dtype not in _PLAIN:
        raise UserError(_quantised_text(folder, layer, f"its type is {str(weight.dtype).removeprefix('torch.')}"))
    vocab_size = int(getattr(text, "vocab_size", 0))
    if weight.ndim != 2 or weight.shape[0] != vocab_size:
        raise UserError(
            f"teacher folder {folder}: {layer}.weight is {list(weight.shape)}, expected {vocab_size} rows, the "
            "vocab_size of config.json: correct that where the rows beyond pad the vocabulary, keep the rows that "
            "predict the next token where they are further heads, else fetch the checkpoint again"
        )
    if tied:
        _refuse_second_head(folder, places, layer, weight)
    bias = _read(folder, places, f"{layer}.bias") if f"{layer}.bias" in places else None
    cap, scale = soft_cap_and_scale(text)
    return Head(
        weight=weight.to(device, dtype),
        bias=None if bias is None else bias.to(device, dtype),
        soft_cap=cap,
        logit_scale=scale,
    )


def _refuse_second_head(folder: Path, places: Mapping[str, Path], layer: str, weight: torch.Tensor) -> None:
    # transformers does not tie what differs, vLLM drops the second: two teachers from one checkpoint.
    for name in (f"{head}.weight" for head in HEADS):
        if name in places and not torch.equal(_read(folder, places, name), weight):
            raise UserError(
                f"teacher folder {folder}: config.json ties the head to {layer}, and the checkpoint holds a {name} of "
                "other values, which vLLM leaves out and transformers uses; say which one is meant: set "
                "tie_word_embeddings to false in config.json, or take the tensor out of the checkpoint"
            )


def tensor_places(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it. Raises UserError without readable safetensors files."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: folder / file for name, file in weight_map.items()}
        places: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                places |= dict.fromkeys(tensors.keys(), file)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"teacher folder {folder}: its list of tensors cannot be read: {error}") from error
    if not places:
        raise UserError(
            f"teacher folder {folder} holds no *.safetensors, from which engine vllm reads the head; save the model "
            "as safetensors, or use engine hf"
        )
    return places


def head_layer(places: Iterable[str], *, tied: bool, folder: Path) -> str:
    """Name of the layer whose weight is the head's, e.g. lm_head or model.embed_tokens. Raises UserError."""
    names = list(places)
    for kinds in (EMBEDDINGS, HEADS) if tied else (HEADS,):
        for kind in kinds:
            found = sorted({layer for name in names if (layer := _layer_of(name)) and _is_kind(layer, kind)})
            if len(found) == 1:
                return found[0]
            if found:
                raise UserError(
                    f"teacher folder {folder} holds several layers that could be the head: {', '.join(found)}; engine "
                    "vllm cannot tell which one it is: use engine hf"
                )
    wanted = f"{', '.join(HEADS)}" + (f" or, because it is tied, {', '.join(EMBEDDINGS)}" if tied else "")
    raise UserError(
        f"teacher folder {folder} holds no head: expected the weight of a layer named {wanted}; fetch the checkpoint "
        "again, or use engine hf"
    )


def _layer_of(name: str) -> str:
    """The layer of a weight, quantised or not; empty for other tensors."""
    for ending in ("weight", "qweight", "weight_packed"):
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}")
    return ""


def _is_kind(layer: str, kind: str) -> bool:
    # Not inside a layer of a stack: multi-token prediction has embeddings and a head of its own there.
    parts = layer.split(".")
    return parts[-1] == kind and not any(part.isdigit() or part in ("mtp", "vision_tower", "visual") for part in parts)


def _read(folder: Path, places: Mapping[str, Path], name: str) -> torch.Tensor:
    if name not in places:
        raise UserError(f"teacher folder {folder} holds no tensor {name}; fetch the checkpoint again, or use engine hf")
    try:
        with safe_open(places[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"teacher folder {folder}: {name} cannot be read from {places[name].name}: {error}") from error
    return tensor


def _quantised_text(folder: Path, layer: str, why: str) -> str:
    return (
        f"teacher folder {folder}: its head {layer} is quantised ({why}), and engine vllm applies the head itself, "
        "from plain weights; use a checkpoint whose head was left out of quantisation (most are), or engine hf"
    )
