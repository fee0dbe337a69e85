"""Configuration of pruning: a smaller model out of a teacher's own weights, for a student to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from potstill.common.config import StorePlace, StrictModel
from potstill.student_train.config.train import Dtype

DepthBy = Literal["cosine", "loss"]


class PruneConfig(StrictModel):
    """Cut a model to a smaller size by what its activations on some rows say; sizes that are null stay."""

    model: Path = Field(description="Hugging Face folder, run folder (its newest checkpoint), or checkpoint folder")
    tokens: StorePlace = Field(description="Sealed tokens store whose rows measure what is important")
    output_dir: Path = Field(description="Folder to create: a Hugging Face folder for model.path of a student")
    hidden_size: int | None = Field(default=None, ge=1, description="Channels of the residual stream to keep")
    intermediate_size: int | None = Field(default=None, ge=1, description="Neurons of each MLP to keep")
    num_heads: int | None = Field(
        default=None, ge=1, description="Query heads of each layer to keep; null: those of the key heads that stay"
    )
    num_kv_heads: int | None = Field(
        default=None,
        ge=1,
        description="Key and value heads of each layer to keep, each with its queries; null: all, or with one key head "
        "for each query head as many as num_heads",
    )
    num_layers: int | None = Field(default=None, ge=1, description="Layers to keep")
    depth_by: DepthBy = Field(
        default="cosine",
        description="A layer's importance: cosine = 1 - cosine of its input and output, loss = how much the loss "
        "rises without it (one more pass over the rows per layer)",
    )
    calibration_rows: int = Field(default=128, ge=1, description="Rows to measure on, spread evenly over the store")
    batch_rows: int = Field(default=4, ge=1, description="Rows per forward")
    dtype: Dtype | None = Field(default=None, description="Type of the stored weights; null takes the model's")
    force: bool = Field(default=False, description="Replace output_dir")
    check_tokenizer: bool = Field(
        default=True, description="Refuse rows that were made with another tokenizer than the one in the model's folder"
    )
    check: bool = Field(default=True, description="Load the folder in a fresh process and compare logits")
    num_threads: int | None = Field(default=None, ge=1, description="torch CPU threads; null leaves torch's own choice")
