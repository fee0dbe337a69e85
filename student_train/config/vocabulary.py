"""Configuration of a student whose vocabulary is not the teacher's."""

from __future__ import annotations

from pydantic import Field

from potstill.common.config import LocalPath, StrictModel


class VocabularyConfig(StrictModel):
    """Read stores made with the teacher's tokenizer as the student's tokenizer numbers the same tokens."""

    tokenizer: LocalPath = Field(description="Folder of the student's tokenizer; its size is the student's vocab_size")
    teacher_tokenizer: LocalPath | None = Field(
        default=None, description="Folder of the stores' tokenizer; null takes the copy beside the tokens store"
    )
    subset: bool = Field(
        default=False,
        description="The student may lack tokens of the teacher: what the teacher gives them joins the tail",
    )
    check_rows: int = Field(
        default=8, ge=0, le=4096, description="Rows whose text both tokenizers must cut alike; 0 leaves the check out"
    )
