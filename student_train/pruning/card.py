"""README.md of a pruned folder: what it was cut from, what was kept, and that it has still to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from potstill.student_train.config.prune import DepthBy
from potstill.student_train.hf_export.model_card import LICENSE_PLACEHOLDER, markdown_table
from potstill.student_train.pruning.shape import Shape

DEPTH_WORDS = {"cosine": "1 - cosine of a layer's input and output", "loss": "the rise of the loss without the layer"}


@dataclass(frozen=True, kw_only=True)
class PruneFacts:
    """What is told of a cut. Pairs are (whole model, pruned); losses in nats per token on the calibration rows."""

    title: str
    model: str
    shapes: tuple[Shape, Shape]
    num_parameters: tuple[int, int]
    losses: tuple[float, float]
    depth_by: DepthBy
    layers: list[int]
    calibration_rows: int
    tokens_digest: str
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a record."""
        whole, pruned = (shape.as_dict() for shape in self.shapes)
        return {
            "model": self.model,
            "whole": {**whole, "num_parameters": self.num_parameters[0], "loss": self.losses[0]},
            "pruned": {**pruned, "num_parameters": self.num_parameters[1], "loss": self.losses[1]},
            "depth_by": self.depth_by,
            "calibration_rows": self.calibration_rows,
            "tokens_digest": self.tokens_digest,
        }


def prune_card(facts: PruneFacts) -> str:
    """The card as Markdown with its YAML front matter."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=LICENSE_PLACEHOLDER,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["potstill", "pruned"],
    )
    whole, pruned = (shape.as_dict() for shape in facts.shapes)
    sizes: list[tuple[Any, ...]] = [(name, whole[name], size) for name, size in pruned.items()]
    sizes += [("parameters", *(f"{count:,}" for count in facts.num_parameters))]
    sizes += [("loss on the calibration rows", *(f"{loss:.4g}" for loss in facts.losses))]
    return (
        "---\n# TODO: put the licence that you publish this model under (the Hub refuses this one).\n"
        f"{data.to_yaml()}\n---\n\n# {facts.title}\n\n"
        f"A part of the weights of {facts.model} ({facts.dtype}), chosen by potstill on "
        f"{facts.calibration_rows:,} rows (tokens store `{facts.tokens_digest}`). **Not trained since**: it is where a "
        "student starts. Licence: that of the whole model decides what may be done with it.\n\n"
        f"{markdown_table(('', 'whole', 'kept'), sizes)}\n\n"
        "Width by the size of activations (outputs of norms, of heads, of the MLP's neurons), depth by "
        f"{DEPTH_WORDS[facts.depth_by]}: layers {', '.join(map(str, facts.layers))} of the whole model stay. Method: "
        "Minitron, arXiv 2407.14679. What was kept, by number: `potstill_prune.json`.\n"
    )
