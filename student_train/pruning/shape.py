"""What can be cut of a model, and along which axes of which parameters. One table; other architectures are refused.

Four things are counted: channels of the residual stream (one choice for the whole model), neurons of an MLP, query
heads and key/value heads (a choice for each layer), and layers. The size of a head stays, and with it the rotary
embedding. To add an architecture: its model_type, and the axes of parameters that it has beside those below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from potstill.common.errors import UserError
from potstill.student_train.config.prune import PruneConfig

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # gated MLP, RMS norms before each block, rotary positions

Axis = str | None  # "channels", "neurons", "queries", "keys"; None: stays whole
# The axes of a module's weight; a bias has the first of them.
AXES: Mapping[str, tuple[Axis, ...]] = {
    "embed_tokens": (None, "channels"),
    "input_layernorm": ("channels",),
    "q_proj": ("queries", "channels"),
    "k_proj": ("keys", "channels"),
    "v_proj": ("keys", "channels"),
    "q_norm": (None,),
    "k_norm": (None,),
    "o_proj": ("channels", "queries"),
    "post_attention_layernorm": ("channels",),
    "gate_proj": ("neurons", "channels"),
    "up_proj": ("neurons", "channels"),
    "down_proj": ("channels", "neurons"),
    "norm": ("channels",),
    "lm_head": (None, "channels"),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model that pruning can change, and the size of a head, which it cannot."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int
    head_dim: int

    @property
    def queries_per_key(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    def as_dict(self) -> dict[str, int]:
        """By name, in the order of the fields."""
        return asdict(self)


def shape_of(config: Any) -> Shape:
    """The shape of a model of this transformers configuration. Raises UserError for an unknown architecture."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"model is a {config.model_type}, whose weights prune does not know how to cut; expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = config.num_attention_heads
    return Shape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        num_layers=config.num_hidden_layers,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def wanted_shape(config: PruneConfig, whole: Shape) -> Shape:
    """The shape that is asked for. Raises UserError that names the key: larger than `whole`, or heads do not fit."""
    asked = {
        name: size for name in whole.as_dict() if name != "head_dim" and (size := getattr(config, name)) is not None
    }
    for name, size in asked.items():
        has = getattr(whole, name)
        if size > has:
            raise UserError(f"{name} is {size}, but the model has {has}; pruning cannot add: ask for {has} or less")
    if "num_kv_heads" not in asked and whole.queries_per_key == 1:
        asked["num_kv_heads"] = asked.get("num_heads", whole.num_heads)
    elif "num_heads" not in asked and "num_kv_heads" in asked:
        asked["num_heads"] = asked["num_kv_heads"] * whole.queries_per_key
    wanted = Shape(**{**whole.as_dict(), **asked})
    if wanted.num_heads % wanted.num_kv_heads or wanted.queries_per_key > whole.queries_per_key:
        raise UserError(
            f"num_heads {wanted.num_heads} and num_kv_heads {wanted.num_kv_heads} do not fit: all key heads keep "
            f"equally many of their {whole.queries_per_key} query heads; make num_heads a multiple of num_kv_heads, "
            f"at most {whole.queries_per_key} times as many"
        )
    return wanted


def axes_of(name: str) -> tuple[Axis, ...]:
    """The axes of a parameter by its name in the model. Raises UserError for a part that no table entry knows."""
    module, _, kind = name.rpartition(".")
    axes = AXES.get(module.rpartition(".")[2])
    if axes is None or kind not in ("weight", "bias"):
        raise UserError(
            f"model has a parameter {name}, which prune does not know how to cut; take a plain architecture"
        )
    return axes if kind == "weight" else axes[:1]
