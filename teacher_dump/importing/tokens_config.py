"""Settings of `potstill import tokens`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from potstill.common.config import StorePlace, StrictModel
from potstill.common.named_entries import NameIn
from potstill.teacher_dump.config import PackingRule, PackingWindow, PlaceText, TooLong, UntrainedFraction
from potstill.teacher_dump.importing.token_formats import TOKEN_FORMATS, describe_formats


class ImportTokensConfig(StrictModel):
    """Files of token ids that another program wrote -> tokens stores `train/` and `heldout/` under `output`."""

    input: list[PlaceText] = Field(
        min_length=1, description="Files, prefixes of .bin/.idx, folders or globs, read in the order given"
    )
    format: Annotated[str, NameIn(TOKEN_FORMATS)] | None = Field(
        default=None, description=f"None: by the name of each file. {describe_formats()}"
    )
    output: StorePlace = Field(
        description="Folder (or URL) for the stores train/ and heldout/; a folder gets tokenizer/ as well"
    )
    tokenizer: PlaceText = Field(
        min_length=1, description="Hugging Face tokenizer that made the ids (folder or hub id): no format records it"
    )
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"] | None = Field(
        default=None,
        description="Type of the ids, little-endian, in files that do not say it; None: uint16 up to 65,536 entries of "
        "the tokenizer, else uint32",
    )
    bounds: Literal["auto", "recorded", "end_token", "none"] = Field(
        default="auto",
        description="Where documents end. recorded: as the file or its index says; end_token: after each end token; "
        "none: a file (a record of a table) is one document; auto: recorded, else end_token, else none",
    )
    end_token: int | None = Field(
        default=None, ge=0, description="Id that ends a document; None: the tokenizer's eos token"
    )
    append_eos: bool = Field(
        default=False, description="Put the end token after each document that does not end with it"
    )
    ids_column: str | None = Field(
        default=None, description="Column of the ids (tables, JSON lines); None: input_ids, tokens, token_ids or ids"
    )
    mask_column: str | None = Field(
        default=None,
        description="Column that says what is trained on: 1 or 0 for each token, or labels (-100: not trained on)",
    )
    attention_column: str | None = Field(
        default=None,
        description="Column whose zeros are padding, which is left out, and whose other values number the documents of "
        "a record; None: attention_mask, where there is one",
    )
    row_length: int = Field(default=1024, ge=2, le=1 << 20, description="Tokens per row")
    rows_per_unit: int = Field(default=256, ge=1, le=1 << 20, description="Rows per unit of work and of commit")
    packing: PackingRule = "cut"
    packing_window: PackingWindow = 1024
    too_long: TooLong = None
    max_untrained_fraction: UntrainedFraction = 0.05
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of documents held out, chosen by hash")
    heldout_documents: int = Field(
        default=0, ge=0, description="Or: hold out this many documents, those of smallest hash"
    )
    split_salt: str = Field(
        default="potstill", description="Goes into the hash of the split; another salt, another split"
    )
    max_bad_lines: int = Field(default=0, ge=0, description="Broken records skipped before an error")
    force: bool = Field(default=False, description="Delete stores that stand at the output and begin again")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if self.heldout_fraction and self.heldout_documents:
            raise ValueError("give at most one of heldout_fraction and heldout_documents")
        if self.packing == "rows" and self.append_eos:
            raise ValueError("packing rows keeps each record as it stands: leave append_eos out, or let rows be packed")
        if self.packing != "whole" and self.too_long is not None:
            raise ValueError(f"too_long is of packing=whole, and packing is {self.packing}; leave it out")
        return self
