"""Initial weights by width: the std that random weights are drawn with, for a model that does not name its own.

transformers' default of 0.02 suits a hidden size of 2560. At a hidden size of 96 it leaves the logits of attention next
to nothing: the run stays on a plateau near the bigram loss, and rounding decides when it leaves. A std of
1/sqrt(hidden size) gives each projection an output as large as its input at every width (LeCun et al. 1998, Efficient
BackProp, section 4.6). `width_residual`, the default, also divides the projections into the residual stream by
sqrt(2 x layers) (Radford et al. 2019, GPT-2, section 2.3). benchmarks/init_rules.py compares the rules over seeds and
widths: both shrink the spread, and the division improves the mean at every width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from potstill.student_train.config.train import ModelConfig

Rule = Literal["width", "width_residual", "config"]
STD_KEY = "initializer_range"
# Last part of the names of projections into the residual stream, over transformers' decoder architectures.
RESIDUAL_PROJECTIONS = frozenset(
    {"o_proj", "out_proj", "c_proj", "down_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2"}
)


@dataclass(frozen=True)
class InitialWeights:
    """What random weights are drawn with: std of every matrix, and that of projections into the residual stream.

    `std` None: the architecture has no such setting. `residual_std` None: the architecture's own rule decides.
    """

    rule: Rule
    std: float | None
    reason: str
    residual_std: float | None = None

    def describe(self) -> str:
        """One line for the log."""
        std = "the architecture's own rule" if self.std is None else f"std {self.std:.4g}"
        scaled = "" if self.residual_std is None else f", {self.residual_std:.4g} into the residual stream"
        return f"{std}{scaled} ({self.reason})"


def initial_rule(model: ModelConfig) -> Rule:
    """The rule that `model.init` comes to: `auto` is `width_residual` unless the configuration names the std."""
    if model.path is not None or model.init_std is not None:
        return "config"
    if model.init == "auto":
        return "config" if declares_std(model.config) else "width_residual"
    return model.init


def initial_weights(model: ModelConfig, config: Any) -> InitialWeights:
    """What the random weights of this Hugging Face configuration are drawn with.

    Raises ValueError when `model.init` asks for a rule that the architecture has no setting for.
    """
    text = config.get_text_config()
    own, width = getattr(text, STD_KEY, None), getattr(text, "hidden_size", None)
    rule = initial_rule(model)
    if model.init_std is not None:
        return InitialWeights("config", model.init_std, "model.init_std")
    if rule == "config":
        reason = "model.init: config"
        if model.init == "auto":
            reason = f"{STD_KEY} of model.config"
            reason += f"; model.init: width_residual would take {width**-0.5:.4g}" if width else ""
        return InitialWeights("config", own, reason)
    if own is None or not width:
        missing = f"a {config.model_type} has no {STD_KEY} and hidden_size to set it by"
        if model.init == "auto":
            return InitialWeights("config", own, missing)
        raise ValueError(f"model.init is {model.init}, but {missing}; use model.init: config")
    if rule == "width":
        return InitialWeights("width", width**-0.5, f"1/sqrt(hidden size {width})")
    layers = text.num_hidden_layers
    reason = f"1/sqrt(hidden size {width}), divided by sqrt(2 x {layers} layers) into the residual stream"
    return InitialWeights("width_residual", width**-0.5, reason, width**-0.5 / math.sqrt(2 * layers))


def declares_std(source: Path | str | dict[str, Any] | None) -> bool:
    """Whether a model configuration, as its author wrote it, names the std of its initial weights."""
    if source is None:
        return False
    if isinstance(source, dict):
        return STD_KEY in source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return path.is_file() and STD_KEY in json.loads(path.read_text(encoding="utf-8"))


def residual_projections(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights [out, in] that write into the residual stream, by name (also of experts, [experts, out, in])."""
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        owner = parts[-2] if parts[-1] == "weight" else parts[-1]
        # ZeRO-3 leaves an empty vector in place of a weight that it has cut.
        if owner in RESIDUAL_PROJECTIONS and len(getattr(parameter, "ds_shape", parameter.shape)) >= 2:
            yield name, parameter
