"""Settings of the teacher stage: `prepare`, `dump` and `score`, one strict tree each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.common.config import StorePlace, StrictModel
from potstill.common.named_entries import NameIn
from potstill.teacher_dump.engines.table import ENGINES, describe_engines, entry_of, refusal_text
from potstill.teacher_dump.packing.table import PACKINGS, describe_packings
from potstill.teacher_dump.records.table import kind_key


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


# A folder, or s3://, gs://, az://: kept as text, because a Path would eat one of the two slashes.
PlaceText = Annotated[str, BeforeValidator(_as_text)]


class TrainTokenizer(StrictModel):
    """How to train a byte-level BPE on the training side of the input."""

    vocab_size: int = Field(ge=257, le=1 << 20, description="Entries, the 256 bytes and <|endoftext|> among them")
    min_frequency: int = Field(default=2, ge=1, description="A pair seen less often than this is never merged")
    max_bytes: int = Field(
        default=1 << 30, ge=1, description="Stop reading after this much text; bounds time and memory"
    )


class DatasetInput(StrictModel):
    """A Hugging Face data set to read instead of text files (`pip install 'potstill[datasets]'`)."""

    path: PlaceText = Field(
        min_length=1,
        description="Folder of save_to_disk (memory-mapped), or folder with data files or hub name (streamed)",
    )
    config: str | None = Field(default=None, description="Its configuration (subset); None: the only one")
    split: str | None = Field(default=None, description="Its split; None: the only one, or train")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit on the hub; None: the newest, whose commit the stores record"
    )


# How documents become rows: for whatever writes tokens stores.
PackingRule = Annotated[str, NameIn(PACKINGS), Field(description=describe_packings())]
WINDOW = 1024
PackingWindow = Annotated[
    int, Field(ge=1, le=1 << 20, description="Packing whole: documents that are fitted together; memory holds them")
]
TooLong = Annotated[
    Literal["split", "cut", "drop"] | None,
    Field(
        description="Packing whole: documents longer than a row are split in pieces, cut to their start, or dropped; "
        "None: split, or cut where documents have masks"
    ),
]
UntrainedFraction = Annotated[
    float,
    Field(ge=0, le=1, description="Share of rows (documents, if whole) without a trained token before an error"),
]


def check_packing(packing: str, *, window: int, too_long: str | None) -> None:
    """Raise ValueError where a key is set that this rule does not read."""
    for name, is_set in (("too_long", too_long is not None), ("packing_window", window != WINDOW)):
        if packing != "whole" and is_set:
            raise ValueError(f"{name} is of packing=whole, and packing is {packing}; leave it out")


class PrepareConfig(StrictModel):
    """Text files or a data set -> tokens stores `train/` and `heldout/` under `output`."""

    input: list[PlaceText] = Field(default_factory=list, description="Files, folders or globs, read in the order given")
    dataset: DatasetInput | None = Field(default=None, description="Or a Hugging Face data set")
    output: StorePlace = Field(
        description="Folder (or URL) for the stores train/ and heldout/; a folder gets tokenizer/ as well"
    )
    text_field: str | None = Field(
        default=None,
        min_length=1,
        description="Field (JSON lines) or column (Parquet, data sets) with the text; None: text",
    )
    prompt_field: str | None = Field(
        default=None, min_length=1, description="Instead of text: field with the prompt, which is read, not trained on"
    )
    response_field: str | None = Field(
        default=None, min_length=1, description="With prompt_field: field with the response, which is trained on"
    )
    prompt_format: str | None = Field(
        default=None, description="With prompt_field: text round {prompt}; None: {prompt} as it stands"
    )
    response_format: str | None = Field(
        default=None, description="With prompt_field: text round {response}; None: {response} as it stands"
    )
    messages_field: str | None = Field(
        default=None,
        min_length=1,
        description="Instead of text: field with chat messages (role, content), for the tokenizer's chat template",
    )
    train_on: Literal["responses", "marked"] | None = Field(
        default=None,
        description="With messages_field: every assistant turn, or what the template marks as generated; "
        "None: responses",
    )
    tokenizer: PlaceText | None = Field(default=None, description="Hugging Face tokenizer: folder or hub id")
    train_tokenizer: TrainTokenizer | None = Field(default=None, description="Train a tokenizer instead of naming one")
    row_length: int = Field(default=1024, ge=2, le=1 << 20, description="Tokens per row")
    rows_per_unit: int = Field(default=256, ge=1, le=1 << 20, description="Rows per unit of work and of commit")
    packing: PackingRule = "cut"
    packing_window: PackingWindow = WINDOW
    too_long: TooLong = None
    max_untrained_fraction: UntrainedFraction = 0.05
    heldout_fraction: float = Field(default=0.0, ge=0, lt=1, description="Share of documents held out, chosen by hash")
    heldout_documents: int = Field(
        default=0, ge=0, description="Or: hold out this many documents, those of smallest hash"
    )
    split_salt: str = Field(
        default="potstill", description="Goes into the hash of the split; another salt, another split"
    )
    append_eos: bool | None = Field(
        default=None,
        description="End each document with the tokenizer's eos token; None: yes, but for chat (the template ends it)",
    )
    add_bos: bool = Field(default=False, description="Begin each document with the tokenizer's bos token")
    max_bad_lines: int = Field(
        default=0, ge=0, description="Broken records (lines, rows, files) skipped before an error"
    )
    force: bool = Field(default=False, description="Delete stores that stand at the output and begin again")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if bool(self.input) == (self.dataset is not None):
            raise ValueError("give exactly one of input and dataset")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise ValueError("give exactly one of tokenizer and train_tokenizer")
        if self.train_tokenizer is not None and isinstance(self.output, str):
            raise ValueError(
                "train_tokenizer writes a folder that later stages load, which an object store cannot hold: train it "
                "with a local output first, then name that folder as tokenizer"
            )
        if self.heldout_fraction and self.heldout_documents:
            raise ValueError("give at most one of heldout_fraction and heldout_documents")
        return self

    @model_validator(mode="after")
    def _one_kind_of_record(self) -> Self:
        kind_key(dict(self))
        if self.prompt_field is not None and self.prompt_field == self.response_field:
            raise ValueError(f"prompt_field and response_field are both {self.prompt_field!r}; name two fields")
        words = {"prompt_format": "{prompt}", "response_format": "{response}"}
        for name, word in words.items():
            text = getattr(self, name)
            if text is not None and text.count(word) != 1:
                raise ValueError(f"{name} is {text!r}; expected a text with {word} in it, once")
            other = next((one for one in words.values() if one != word and one in (text or "")), None)
            if other is not None:
                raise ValueError(f"{name} is {text!r}; {other} would be written there as it stands; take it out")
        check_packing(self.packing, window=self.packing_window, too_long=self.too_long)
        return self

    @property
    def record_key(self) -> str:
        """The key that decides what a record is; see RECORD_KINDS."""
        return kind_key(dict(self))


class EnsembleMember(StrictModel):
    """A further teacher, run with the settings of the first one."""

    model: PlaceText = Field(min_length=1, description="Hugging Face causal language model: folder or hub id")
    weight: float = Field(default=1.0, gt=0, description="Its share in the mixture, beside the other weights")


class TeacherConfig(StrictModel):
    """One model that reads rows: where it is and how it runs."""

    model: PlaceText = Field(min_length=1, description="Hugging Face causal language model: folder or hub id")
    engine: Annotated[str, NameIn(ENGINES)] = Field(default="hf", description=describe_engines())
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: as the model was saved"
    )
    device: str = Field(
        default="auto", description="auto, cpu, cuda or cuda:N; auto takes the worker's GPU if there is one"
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        description="Parts that every layer is split into; hf: ranks of torchrun, vllm: GPUs of one worker",
    )
    attention: str | None = Field(default=None, description="Attention backend of transformers; None lets it choose")
    documents: Literal["packed", "apart"] = Field(
        default="packed",
        description="packed: one row, positions restart per document; apart: each document is its own line",
    )
    head: Literal["auto", "hidden", "logits"] = Field(
        default="auto",
        description="hidden: the head is applied in chunks; logits: the model's own; auto: hidden if they agree",
    )
    batch_rows: int = Field(default=8, ge=1, description="Rows per forward pass")
    compile: bool = Field(default=False, description="Run the backbone through torch.compile")
    chunk_bytes: int | None = Field(
        default=None, ge=1 << 16, description="Memory for one piece of the logits; None: by device"
    )
    check_tokenizer: bool = Field(
        default=True, description="Refuse a model whose own tokenizer is not that of the rows"
    )
    load_options: dict[str, Any] = Field(
        default_factory=dict, description="Passed on to from_pretrained (engine vllm: to vllm.LLM)"
    )
    checkpoints: list[PlaceText] = Field(
        default_factory=list, description="Checkpoints of `model` (folders, or revisions), each into OUTPUT/NAME"
    )
    weight: float = Field(default=1.0, gt=0, description="Share of `model` in an ensemble")
    ensemble: list[EnsembleMember] = Field(
        default_factory=list, description="Further teachers: targets are of the weighted mixture of all"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        engine = entry_of(self.engine, self.tensor_parallel)
        if self.ensemble and (self.checkpoints or engine.mixture is None):
            able = " or ".join(name for name, entry in ENGINES.items() if entry.mixture is not None)
            raise ValueError(f"an ensemble has no checkpoints and runs on engine {able}, with tensor_parallel=1")
        named = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attention"}
        for option in self.load_options.keys() & named.keys():
            raise ValueError(f"load_options.{option} is not recorded in the store; set teacher.{named[option]} instead")
        if any(getattr(self, key) in values for key, values in engine.refuses.items()):
            raise ValueError(refusal_text(self.engine, self.tensor_parallel))
        for option in self.load_options.keys() & engine.refuses_options.keys():
            why = engine.refuses_options[option]
            raise ValueError(f"engine {self.engine} does not take load_options.{option}: {why}")
        return self


class SelectionConfig(StrictModel):
    """Which entries of a distribution are kept."""

    mode: Literal["top_k", "top_p_k", "sample"] = Field(
        default="top_p_k", description="top_p_k: the smallest prefix with mass p, k at most; sample: unbiased draws"
    )
    k: int = Field(default=100, ge=1, le=255, description="Entries per token at most, 1 to 255")
    p: float = Field(default=0.95, gt=0, le=1, description="Mass to reach in mode top_p_k")
    num_draws: int = Field(
        default=50, ge=1, le=255, description="Draws per token in mode sample, 1 to 255 (with replacement, at T = 1)"
    )
    power: float = Field(
        default=1.0, ge=0.5, le=1.5, description="Draws of mode sample come from p^power; not 1: weights, not counts"
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="Key of the draws in mode sample, with row and position")

    @model_validator(mode="after")
    def _power_of_draws(self) -> Self:
        if self.power != 1.0 and self.mode != "sample":
            raise ValueError(
                f"power {self.power} is of draws, and mode is {self.mode}; use mode sample, or leave it out"
            )
        return self


class WalkConfig(StrictModel):
    """What `dump` and `score` share: rows in, a store out, workers, and when to give up."""

    tokens: PlaceText = Field(description="Sealed tokens store to read")
    output: PlaceText = Field(description="Store to write")
    worker: int | None = Field(
        default=None, ge=0, description="Number of this worker; None: from the launcher's environment"
    )
    num_workers: int | None = Field(default=None, ge=1, description="How many workers share the units")
    max_rejected_fraction: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="Share of the store's rows that may be refused (NaN or Inf) before the run stops",
    )
    max_consecutive_failures: int = Field(
        default=3, ge=1, description="Units that fail in a row before the worker stops"
    )
    finish_threads: int = Field(
        default=2, ge=1, le=64, description="Threads that encode and commit beside the forward passes"
    )
    seal: bool = Field(default=True, description="Seal the store when all units are there (one worker only)")
    fast_seal: bool = Field(default=False, description="Seal without reading the units back (sizes only)")
    force: bool = Field(default=False, description="Delete a store that stands at the output and begin again")

    @model_validator(mode="after")
    def _worker_in_range(self) -> Self:
        if self.worker is not None and self.num_workers is not None and self.worker >= self.num_workers:
            raise ValueError(f"worker {self.worker} is not below num_workers {self.num_workers}")
        return self


class DumpConfig(WalkConfig):
    """Teacher over a tokens store -> targets store."""

    teacher: TeacherConfig
    selection: SelectionConfig = Field(default_factory=lambda: SelectionConfig.model_validate({}))
    temperatures: list[float] = Field(
        default_factory=list, max_length=16, description="Temperatures besides 1 whose tails are stored exactly"
    )
    entropy: bool = Field(
        default=True, description="Store the entropy; false is due where the engine sees log-probabilities alone"
    )
    frequency_ids: bool = Field(
        default=False,
        description="Store ids as their ranks by frequency in the text, which compress better (7 to 9 % of a store); "
        "readers of other programs must know the feature frequency_ids",
    )

    @model_validator(mode="after")
    def _drawn_by_us(self) -> Self:
        if self.selection.mode == "sample" and ENGINES[self.teacher.engine].gives_top_k:
            raise ValueError(
                f"engine {self.teacher.engine} gives a finished top-k, of which nothing can be drawn; use selection "
                "mode top_k or top_p_k, or engine hf"
            )
        return self

    @model_validator(mode="after")
    def _only_logprobs(self) -> Self:
        if not ENGINES[self.teacher.engine].only_logprobs:
            return self
        name = f"engine {self.teacher.engine} sees the best log-probabilities at temperature 1 alone"
        if self.temperatures:
            raise ValueError(
                f"{name}, which say nothing of the tails at temperatures {self.temperatures}; leave temperatures out, "
                "or use engine hf"
            )
        if self.entropy:
            raise ValueError(f"{name}, which say nothing of the entropy; set entropy=false, or use engine hf")
        return self

    @model_validator(mode="after")
    def _temperatures(self) -> Self:
        for value in self.temperatures:
            if not 0 < value <= 100 or value == 1:
                raise ValueError(f"temperature {value} must be in (0, 100] and not 1, which is always stored")
        if self.temperatures and self.selection.mode == "sample":
            raise ValueError("temperatures have no exact tails in mode sample; leave them out, or use top_p_k")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ValueError(f"temperatures {self.temperatures} name one twice")
        return self


class ScoreConfig(WalkConfig):
    """Small language model over a tokens store -> scores store."""

    model: TeacherConfig
    salt_rank: int = Field(
        default=10, ge=1, le=254, description="A label within this rank counts as learnable (SALT: k = 10)"
    )

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if self.model.checkpoints:
            raise ValueError("score runs one model: leave model.checkpoints out and run score once for each of them")
        if ENGINES[self.model.engine].only_logprobs:
            raise ValueError(
                f"engine {self.model.engine} gives no entropy, which a scores store holds of each token; use engine hf"
            )
        return self
