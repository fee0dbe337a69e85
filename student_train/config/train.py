"""The configuration of training, evaluation and export: one strict tree each, every key described.

Validators are pure: they look at values only, never at files, devices or process groups (see stores.py and
model_checks.py).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from potstill.common.config import LocalPath, StorePlace, StrictModel
from potstill.student_train.config.answers import AnswersConfig
from potstill.student_train.config.clocks import SWITCHES
from potstill.student_train.config.lr_schedule import LrSchedule
from potstill.student_train.config.optimizers import OptimizerConfig
from potstill.student_train.config.rescoring import Rescoring
from potstill.student_train.config.sources import (
    NamedSource,
    SourceConfig,
    check_sources,
    check_stage_stores,
    check_store_names,
    named_sources,
)
from potstill.student_train.config.stages import Objective, Stage
from potstill.student_train.config.vocabulary import VocabularyConfig

Dtype = Literal["float32", "bfloat16"]
LossBackend = Literal["auto", "torch", "triton", "triton_compiled"]  # kernels.backends.BACKENDS, compared by a test


def _plain_off(value: Any) -> Any:
    """YAML 1.1 reads a plain `off` as false; here it is the word."""
    return "off" if value is False else value


WordOff = BeforeValidator(_plain_off)


class RunConfig(StrictModel):
    """Where the run lives and how long it goes."""

    name: str = Field(default="run", description="Name in logs and reports", min_length=1)
    output_dir: LocalPath = Field(description="Run folder: metrics, checkpoints, resolved configuration")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of the initial weights and of the order of rows")
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps; give this or max_tokens")
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens to train on, rounded up to whole steps, as if all rows were full (shorter: fewer)",
    )
    max_runtime_minutes: float | None = Field(
        default=None, gt=0, description="Save and stop (exit code 75) after this time"
    )
    force: bool = Field(default=False, description="Delete what stands in output_dir and start anew")
    self_check: bool = Field(
        default=True,
        description="At start see that the model keeps packed documents apart and that the loss works on its logits; "
        "compare each stage's loss path with float64 on its first batch",
    )
    num_threads: int | None = Field(
        default=None, ge=1, description="torch CPU threads per rank; null leaves torch's own choice"
    )

    @model_validator(mode="after")
    def _one_length(self) -> RunConfig:
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of run.max_steps and run.max_tokens")
        return self


class ModelConfig(StrictModel):
    """The student: a configuration with random weights, or a folder with weights."""

    config: LocalPath | dict[str, Any] | None = Field(
        default=None,
        description="Hugging Face config folder or config.json, or an inline mapping with model_type; random init",
    )
    path: LocalPath | None = Field(default=None, description="Hugging Face folder with weights to start from")
    dtype: Dtype = Field(
        default="float32", description="Weights and arithmetic; float32 master weights are kept under bfloat16"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        default="sdpa", description="Attention implementation"
    )
    gradient_checkpointing: bool = Field(default=False, description="Recompute activations in the backward pass")
    init: Literal["auto", "width", "width_residual", "config"] = Field(
        default="auto",
        description="Random weights: std 1/sqrt(hidden size) (width), the projections into the residual stream also "
        "divided by sqrt(2 x layers) (width_residual), or the configuration's initializer_range (config); auto is "
        "width_residual unless the configuration names initializer_range",
    )
    init_std: float | None = Field(
        default=None, gt=0, le=1, description="Std of random weights; null leaves it to model.init"
    )
    compile: bool = Field(default=False, description="torch.compile the backbone")
    loss_backend: LossBackend = Field(
        default="auto",
        description="Code that computes the loss (docs/kernels.md); auto is triton on a GPU and torch on a CPU",
    )
    router_aux_loss: float | None = Field(
        default=None,
        ge=0,
        description="Mixture of experts: weight of its load balancing loss; null takes the model's "
        "router_aux_loss_coef, 0 switches it off",
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.config is None) == (self.path is None):
            raise ValueError("give exactly one of model.config (random weights) and model.path (weights)")
        if self.path is not None and self.init_std is not None:
            raise ValueError("model.init_std is for random weights; remove it or use model.config")
        if self.path is not None and self.init != "auto":
            raise ValueError("model.init is for random weights; remove it or use model.config")
        if self.init_std is not None and self.init != "auto":
            raise ValueError(f"model.init_std and model.init {self.init} both set the std; give one of them")
        return self


class DataConfig(StrictModel):
    """Stores to read and the shape of a batch."""

    tokens: StorePlace | None = Field(
        default=None, description="Sealed tokens store: folder or URL, as all stores here; this, or sources"
    )
    sources: dict[str, SourceConfig] = Field(
        default_factory=dict,
        description="Name -> tokens store with its targets and scores, in place of data.tokens, targets and scores",
    )
    heldout: StorePlace | None = Field(default=None, description="Tokens store for evaluation")
    heldout_targets: StorePlace | None = Field(
        default=None, description="Targets store over heldout: adds agreement and KL"
    )
    targets: dict[str, StorePlace] = Field(default_factory=dict, description="Name -> targets store over tokens")
    scores: dict[str, StorePlace] = Field(default_factory=dict, description="Name -> scores store over tokens")
    vocabulary: VocabularyConfig | None = Field(
        default=None, description="The student's own vocabulary, where it is not the one of the stores"
    )
    global_batch_rows: int = Field(ge=1, description="Rows per optimizer step over all ranks")
    micro_batch_rows: int = Field(
        default=1, ge=1, description="Rows per forward on one rank; accumulation follows from it"
    )
    order: Literal["global", "block", "sequential"] = Field(default="global", description="How rows are shuffled")
    prefetch_batches: int = Field(default=2, ge=1, le=64, description="Batches that threads read ahead")
    num_threads: int = Field(default=2, ge=1, le=64, description="Reading threads per rank")
    cache_dir: Literal["auto"] | LocalPath | None = Field(
        default="auto",
        description="Folder on a local disk in which the ranks of a machine, and later runs, share row statistics, "
        "row pools, and of stores on object storage the indexes and the rows that are read; auto: potstill-UID below "
        "TMPDIR, for all but those rows; null shares nothing",
    )
    cache_gib: float = Field(
        default=64.0, ge=0, description="Size that cache_dir is held to, in GiB; 0: shares nothing"
    )

    @model_validator(mode="after")
    def _names(self) -> DataConfig:
        if self.tokens is None and not self.sources:
            raise ValueError(
                "data.tokens is needed and missing: name a tokens store there, or several under data.sources"
            )
        beside = [key for key in ("tokens", "targets", "scores") if getattr(self, key)] if self.sources else []
        if beside:
            raise ValueError(
                f"data.sources and data.{beside[0]} are both given; each source names its own tokens, targets and "
                f"scores: move data.{beside[0]} into one, or remove data.sources"
            )
        check_store_names(self.targets, self.scores, key="data.")
        check_sources(self.sources)
        if self.heldout_targets is not None and self.heldout is None:
            raise ValueError("data.heldout_targets needs data.heldout")
        return self

    def named_sources(self) -> tuple[NamedSource, ...]:
        """Where rows come from, in the order of their ids: one source for data.tokens, or those of data.sources."""
        return named_sources(self.tokens, self.targets, self.scores, self.sources)


class CheckpointConfig(StrictModel):
    """What is saved, what is kept, what a start looks for."""

    every_steps: int | None = Field(
        default=None, ge=1, description="Save each so many steps; the last step is always saved"
    )
    keep_last: int = Field(default=2, ge=1, description="Newest checkpoints that are kept")
    permanent_every_steps: int | None = Field(
        default=None, ge=1, description="Checkpoints at multiples of this are never deleted"
    )
    resume: Literal["auto", "never"] | Path = Field(
        default="auto", description="auto, never, or the folder of a checkpoint"
    )

    @model_validator(mode="after")
    def _multiple(self) -> CheckpointConfig:
        if self.permanent_every_steps is not None and (
            self.every_steps is None or self.permanent_every_steps % self.every_steps
        ):
            raise ValueError("checkpoint.permanent_every_steps must be a multiple of checkpoint.every_steps")
        return self


class LoggingConfig(StrictModel):
    """Metrics; the JSON lines are always written."""

    every_steps: int = Field(default=10, ge=1, description="Steps per line of metrics")
    tensorboard: bool = Field(default=False, description="Also write TensorBoard events (extra: tracking)")
    wandb: Annotated[Literal["off", "offline", "online"], WordOff] = Field(
        default="off", description="Also send to Weights & Biases"
    )


class HeldoutConfig(StrictModel):
    """Evaluation during the run, on data.heldout."""

    every_steps: int | None = Field(
        default=None, ge=1, description="Evaluate each so many steps; null: at the end only"
    )
    max_rows: int | None = Field(default=None, ge=1, description="Rows of data.heldout to use; null takes all")
    samples: int = Field(
        default=0,
        ge=0,
        le=64,
        description="Texts that the student writes at each evaluation, after the beginnings of so many held-out rows",
    )
    sample_prompts: tuple[str, ...] = Field(
        default=(), max_length=64, description="Texts to go on from at each evaluation, beside those rows or without"
    )
    sample_tokens: int = Field(default=48, ge=1, le=1024, description="Tokens of each sample")
    sample_prompt_tokens: int = Field(default=24, ge=1, description="Tokens of a held-out row that make a prompt")
    sample_temperature: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="0 takes the most probable token each time; above 0 draws, by run.seed alike at each evaluation",
    )
    tokenizer: LocalPath | None = Field(
        default=None, description="Tokenizer folder for samples and grades; null looks beside the tokens store"
    )
    answers: AnswersConfig = Field(
        default_factory=AnswersConfig, description="Answers written after the prompts of held-out rows with masks"
    )


# Keys of a DeepSpeed configuration that follow from ours, and the key of ours that decides each.
OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "data.global_batch_rows",
    "train_micro_batch_size_per_gpu": "data.micro_batch_rows",
    "gradient_accumulation_steps": "data.global_batch_rows and data.micro_batch_rows",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "data_types": "model.dtype",
    "torch_autocast": "model.dtype",
    "checkpoint": "checkpoint",
    "steps_per_print": "logging.every_steps",
    "zero_optimization.stage": "zero_stage",
}

# Keys that would change what a rank reads or how gradients are scaled, and why they are refused.
_WHOLE_ROWS = (
    "every rank reads whole rows: DeepSpeed's sequence parallelism drops the mask that keeps packed documents apart"
)
REFUSED_DEEPSPEED_KEYS = {"sequence_parallel_size": _WHOLE_ROWS, "data_parallel_size": _WHOLE_ROWS}


class TrainConfig(StrictModel):
    """Everything about one student run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: Objective = Field(default_factory=Objective, description="Loss settings that stages do not override")
    curriculum: tuple[Stage, ...] = Field(
        default=(Stage(),), min_length=1, description="Stages in order; one is plain training"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW or Muon")
    schedule: LrSchedule = Field(default_factory=LrSchedule, description="Learning rate")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="Saving and resuming")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="Metrics")
    eval: HeldoutConfig = Field(default_factory=HeldoutConfig, description="Held-out evaluation during the run")
    rescoring: Rescoring | None = Field(
        default=None, description="Scores of rows and documents by the student in training; null: none"
    )
    nan_policy: Literal["stop", "skip"] = Field(
        default="stop",
        description="A loss that is not finite: stop with an error, or drop that step's update and count it",
    )
    spike_policy: Annotated[Literal["off", "warn", "stop"], WordOff] = Field(
        default="off",
        description="A loss above mean + spike_sigma * std of the last losses: count and warn, or stop with an error",
    )
    spike_window: int = Field(default=128, ge=8, le=4096, description="Steps that a loss is judged by, within a stage")
    spike_sigma: float = Field(default=6.0, gt=0, description="Standard deviations above the mean that make a spike")
    zero_stage: Literal[0, 1, 2, 3] = Field(default=1, description="DeepSpeed ZeRO stage")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="Passed on to DeepSpeed unchanged")

    @model_validator(mode="after")
    def _owned_keys(self) -> TrainConfig:
        flat = set(self.deepspeed) | {f"zero_optimization.{k}" for k in self.deepspeed.get("zero_optimization", {})}
        for key in sorted(flat & set(OWNED_DEEPSPEED_KEYS)):
            raise ValueError(f"deepspeed.{key} is set by the trainer; use {OWNED_DEEPSPEED_KEYS[key]} instead")
        for key in sorted(set(self.deepspeed) & set(REFUSED_DEEPSPEED_KEYS)):
            raise ValueError(f"deepspeed.{key} is not supported ({REFUSED_DEEPSPEED_KEYS[key]}); remove it")
        return self

    @model_validator(mode="after")
    def _samples(self) -> TrainConfig:
        if self.eval.samples and self.data.heldout is None:
            raise ValueError(
                "eval.samples takes its prompts from data.heldout; name that store, or eval.sample_prompts"
            )
        return self

    @model_validator(mode="after")
    def _rescoring(self) -> TrainConfig:
        if self.rescoring is None:
            return self
        name = self.rescoring.name
        taken = frozenset({"student"}).union(*(source.store_names for source in self.data.named_sources()))
        if name in taken:
            raise ValueError(f"rescoring.name is {name!r}, which names a store already, or the student; take another")
        if not any(self.rescoring.is_read_by(stage) for stage in self.curriculum):
            raise ValueError(
                f"rescoring is on, but no stage reads {name!r}; name it in weights.store or rows.score.of of a stage, "
                "or remove rescoring"
            )
        return self

    @model_validator(mode="after")
    def _answers(self) -> TrainConfig:
        own = (source.heldout for source in self.data.sources.values())
        if self.eval.answers.generate and self.data.heldout is None and all(place is None for place in own):
            raise ValueError("eval.answers takes its prompts from held-out rows; name data.heldout, or leave it out")
        return self

    @model_validator(mode="after")
    def _skip(self) -> TrainConfig:
        if self.nan_policy == "skip" and self.zero_stage not in (1, 2):
            raise ValueError(
                f"nan_policy skip works with zero_stage 1 and 2, found {self.zero_stage}; use one, or stop"
            )
        return self

    @model_validator(mode="after")
    def _muon(self) -> TrainConfig:
        if self.optimizer.kind != "muon":
            if self.optimizer.muon_lr is not None:
                raise ValueError("optimizer.muon_lr is for optimizer.kind muon; set that, or remove it")
            return self
        zero = self.deepspeed.get("zero_optimization", {})
        if self.zero_stage == 3:
            raise ValueError(
                "optimizer.kind muon works with zero_stage 0, 1 and 2, found 3, which cuts every matrix; use one of "
                "them, or optimizer.kind adamw"
            )
        for key in ("offload_optimizer", "round_robin_gradients"):
            if zero.get(key):
                raise ValueError(
                    f"deepspeed.zero_optimization.{key} does not work with optimizer.kind muon, which needs the order "
                    "of the parameters and gathers updates on the device; remove it, or use optimizer.kind adamw"
                )
        return self

    @model_validator(mode="after")
    def _restarts(self) -> TrainConfig:
        offload = self.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
        if offload.get("device") == "nvme" and any(stage.restart_optimizer for stage in self.curriculum):
            raise ValueError(
                "restart_optimizer of a stage does not reach moments on a disk "
                "(deepspeed.zero_optimization.offload_optimizer.device nvme); keep them in memory (cpu), or do without"
            )
        return self

    @model_validator(mode="after")
    def _stages(self) -> TrainConfig:
        for number, stage in enumerate(self.curriculum):
            last = number == len(self.curriculum) - 1
            # An int is a step: 1 would be the first step, though it looks like the whole run.
            if last and stage.until is not None and not (isinstance(stage.until, float) and stage.until == 1.0):
                raise ValueError(
                    f"curriculum.{number}.until is {stage.until!r}: the last stage must reach the end (null or 1.0; "
                    "an int is a step), else steps are left without a stage"
                )
            if not last and stage.until is None:
                raise ValueError(f"curriculum.{number}.until is missing: only the last stage may go to the end")
            key, scored = f"curriculum.{number}", None if self.rescoring is None else self.rescoring.name
            if self.rescoring is not None:
                self.rescoring.check_stage(stage, key=key)
            check_stage_stores(stage, self.objective, self.data.named_sources(), key=key, scored=scored)
            self._check_clock(stage, key=f"{key}.targets_clock")
        shares = [stage.until for stage in self.curriculum if isinstance(stage.until, float)]
        if any(after <= before for before, after in pairwise(shares)):
            raise ValueError(f"curriculum: the stages' until {shares} must rise, else stages overlap")
        return self

    def _check_clock(self, stage: Stage, *, key: str) -> None:
        """A clock that looks at evaluations needs some."""
        if stage.targets_clock is None or not SWITCHES[stage.targets_clock.switch_on].decided:
            return
        has_rows = self.data.heldout is not None or any(source.heldout for source in self.data.sources.values())
        if self.eval.every_steps is None or not has_rows:
            missing = "eval.every_steps" if has_rows else "data.heldout"
            switch = stage.targets_clock.switch_on
            raise ValueError(f"{key}.switch_on {switch} looks at evaluations during the run; set {missing}")


class EvalConfig(StrictModel):
    """Evaluate a run or a Hugging Face folder on held-out rows."""

    model: Path = Field(description="Run folder (its newest checkpoint), a checkpoint folder, or a Hugging Face folder")
    heldout: StorePlace = Field(description="Sealed tokens store")
    targets: StorePlace | None = Field(
        default=None, description="Targets store over heldout: adds agreement and KL to the teacher"
    )
    tokenizer: Path | None = Field(
        default=None, description="Tokenizer folder, for bits per byte; null: the model's own or the one beside heldout"
    )
    vocabulary: VocabularyConfig | None = Field(
        default=None, description="The model's own vocabulary, as in data.vocabulary; null takes that of its run"
    )
    max_rows: int | None = Field(default=None, ge=1, description="Rows to use; null takes all")
    batch_rows: int = Field(default=4, ge=1, description="Rows per forward")
    answers: AnswersConfig = Field(
        default_factory=AnswersConfig, description="Answers written after the prompts of rows with masks"
    )
    dtype: Dtype = Field(default="float32", description="Arithmetic")
    output: Path | None = Field(default=None, description="JSON file to write the figures to")
    force: bool = Field(default=False, description="Overwrite output")
    num_threads: int | None = Field(default=None, ge=1, description="torch CPU threads; null leaves torch's own choice")


class ExportConfig(StrictModel):
    """Turn a checkpoint into a Hugging Face folder."""

    run: Path = Field(description="Run folder (its newest checkpoint) or one checkpoint folder")
    output_dir: Path = Field(description="Folder to create")
    dtype: Dtype | None = Field(default=None, description="Type of the stored weights; null takes the run's")
    tokenizer: Path | None = Field(default=None, description="Tokenizer folder to copy; null looks in the tokens store")
    max_shard_bytes: int = Field(default=5 * 2**30, ge=2**12, description="Largest safetensors file")
    force: bool = Field(default=False, description="Replace output_dir, and with push the files of the repository")
    check: bool = Field(default=True, description="Load the folder in a fresh process and compare logits")
    push: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+/[\w.-]+$",
        description="Hub repository, ORG/NAME, to push the checked folder to",
    )
    push_revision: str | None = Field(default=None, min_length=1, description="Branch to push to; null is main")
    private: bool = Field(default=False, description="Make the repository of push a private one")
    license: str | None = Field(
        default=None, min_length=1, description="Licence of the model card, as the hub writes it: apache-2.0"
    )

    @model_validator(mode="after")
    def _pushed(self) -> Self:
        if self.push is None and (self.private or self.push_revision is not None):
            raise ValueError("private and push_revision speak of a repository; name it as push: ORG/NAME")
        if self.push is not None and not self.check:
            raise ValueError("push needs check: a folder that was not loaded and compared is not pushed")
        if self.push is not None and self.license is None:
            raise ValueError("push needs license, such as apache-2.0: the hub refuses a model card without one")
        return self
