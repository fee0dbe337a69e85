"""The parts of transformers' causal language models: the backbone, and what is done to head(hidden) to make logits."""

from __future__ import annotations

from typing import Any

# Configuration keys by which architectures scale their logits, and how the factor is read from the value.
LOGIT_SCALES = {
    "logit_scale": lambda value: float(value),  # Cohere
    "logits_scaling": lambda value: 1.0 / float(value),  # Granite, MiniCPM
    "lm_head_multiplier": lambda value: float(value),  # Falcon-H1
    "output_multiplier": lambda value: float(value),
}
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


def soft_cap_and_scale(config: Any) -> tuple[float | None, float]:
    """(cap, scale) of logits = cap * tanh(scale * head(hidden) / cap); cap None: no cap. `config` is the text part's.

    A model may do something else; whoever relies on this compares it with the model's own logits once.
    """
    cap = next((float(v) for key in SOFT_CAPS if (v := getattr(config, key, None))), None)
    scale = 1.0
    for key, factor in LOGIT_SCALES.items():
        if getattr(config, key, None) is not None:
            scale *= factor(getattr(config, key))
    return cap, scale


def backbone(model: Any) -> Any:
    """The part of a causal language model before its head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder is not None and decoder is not model else model.base_model
