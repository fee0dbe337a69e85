"""Settings of `potstill import targets`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from potstill.common.config import StorePlace, StrictModel
from potstill.common.named_entries import NameIn
from potstill.teacher_dump.config import PlaceText
from potstill.teacher_dump.importing.target_formats import TARGET_FORMATS, describe_formats


class ImportTargetsConfig(StrictModel):
    """Foreign targets -> OUTPUT/targets, and OUTPUT/tokens where the files hold the tokens and no store is named."""

    input: list[PlaceText] = Field(min_length=1, description="Files or folders, read in the order given")
    output: StorePlace = Field(description="Folder (or URL) for the stores targets/ and tokens/")
    teacher: str = Field(min_length=1, description="Name of the teacher, which the files do not hold")
    format: Annotated[str, NameIn(TARGET_FORMATS)] | None = Field(
        default=None, description=f"None: by the names of the files and of their columns. {describe_formats()}"
    )
    tokens: PlaceText | None = Field(
        default=None, description="Sealed tokens store whose row r is their sequence r; None: made from the files"
    )
    tokenizer: PlaceText | None = Field(
        default=None, description="Hugging Face tokenizer of the ids: folder or hub id; not with tokens"
    )
    compression_config: PlaceText | None = Field(
        default=None, description="DistillKit's compression_config.yaml; None: beside the files"
    )
    k: int | None = Field(
        default=None, ge=1, le=255, description="Keep this many entries of each position; None: all, 255 at most"
    )
    values: Literal["auto", "logprobs", "logits", "probabilities"] = Field(
        default="auto", description="What the values are; auto: by format and name of the column"
    )
    normaliser: Literal["auto", "vocabulary", "kept"] = Field(
        default="auto",
        description="What they are relative to: the vocabulary, or the kept entries alone (the tail is lost then)",
    )
    tokens_column: str | None = Field(default=None, description="Column of token ids (topk_parquet)")
    ids_column: str | None = Field(default=None, description="Column of the ids of the entries (topk_parquet)")
    values_column: str | None = Field(default=None, description="Column of their values (topk_parquet)")
    normaliser_column: str | None = Field(
        default=None, description="Column of the log-sum of the raw logits over the vocabulary (topk_parquet)"
    )
    attention_column: str | None = Field(
        default=None,
        description="Column of document numbers 1, 2, .. (0: padding); None: attention_mask, if it is there",
    )
    row_length: int | None = Field(
        default=None, ge=2, le=1 << 20, description="Tokens per row at most; None: the longest sequence"
    )
    rows_per_unit: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="Rows per unit of work, of commit and of memory; None: about 262,144 tokens; with tokens: as there",
    )
    max_bad_lines: int = Field(default=0, ge=0, description="Broken records skipped before an error")
    force: bool = Field(default=False, description="Delete stores that stand at the output and begin again")

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if (self.tokens is None) == (self.tokenizer is None):
            raise ValueError(
                "give exactly one of tokens (a store of the same sequences, whose tokenizer is known) and tokenizer"
            )
        if self.tokens is not None and (self.row_length is not None or self.rows_per_unit is not None):
            raise ValueError("row_length and rows_per_unit are those of the tokens store; leave them out")
        return self
