"""Engine `zero3`: a teacher larger than one GPU, its weights spread over a group of ranks by DeepSpeed ZeRO-3.

Every forward pass gathers each layer from all ranks, so the ranks run the same number of passes: the group moves in
lock-step. Each rank has units of its own; one that has none left runs empty passes until the last is done. An error
on one rank ends the group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from potstill.common.causal_lm import backbone
from potstill.common.errors import UserError
from potstill.common.packed import as_lines
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, HiddenStates, TopKWanted
from potstill.teacher_dump.engines.head import (
    apply_head,
    packing_agrees,
    probe_line,
    read_head,
    relative_difference,
    tolerance,
)
from potstill.teacher_dump.engines.hf import choose_device, make_current
from potstill.teacher_dump.engines.loaded import check_loaded
from potstill.teacher_dump.host_copies import to_device
from potstill.teacher_dump.identity import computing_dtype, load_config
from potstill.teacher_dump.placing import WorkerPlace, worker_place

if TYPE_CHECKING:
    from potstill.teacher_dump.job import WorkerSummary

log = logging.getLogger(__name__)


class Group:
    """See Ranks: together they are one worker, each of them with units of its own."""

    in_step = True

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._device = device

    def run(self, work: Callable[[], WorkerSummary]) -> WorkerSummary:
        return work()

    def place(self, worker: int | None, num_workers: int | None) -> WorkerPlace:
        # RANK and WORLD_SIZE count the ranks of the group, so only arguments say which worker the group is.
        whole = worker_place(worker or 0, num_workers or 1)
        source = f"{whole.source}, group of {self.world}"
        return WorkerPlace(whole.worker * self.world + self.rank, whole.num_workers * self.world, source)

    def largest(self, value: int) -> int:
        """The largest of the ranks' values."""
        shared = torch.tensor([value], dtype=torch.int64, device=self._device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return int(shared)

    def agree_to_stop(self, reason: str | None) -> str | None:
        """Stop on all ranks at the same pass when any of them was asked to."""
        return (reason or "a signal to another rank") if self.largest(int(reason is not None)) else None

    def barrier(self) -> None:
        self.largest(0)


def join_group(teacher: TeacherConfig) -> Group:
    """Join the launcher's process group (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); UserError without a launcher."""
    import os

    device = choose_device(teacher.device)
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"engine zero3 needs a launcher such as torchrun: {', '.join(missing)} are not set")
        import deepspeed
        import deepspeed.ops

        if device.type == "cpu":
            # Else a communication op that gloo does not need is compiled for a minute.
            deepspeed.ops.__compatible_ops__ = {}
        make_current(device)
        # DEEPSPEED_TIMEOUT (minutes, 10) bounds how long a rank waits for one that is cut off, in the first group.
        # DeepSpeed makes others without a word on time: they take torch's default.
        timeout = deepspeed.constants.default_pg_timeout
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False)
    return Group(device)


class Zero3Engine:
    """See TeacherEngine. `forward` is a collective call of the group."""

    name = "zero3"

    def __init__(self, engine: Any, *, teacher: TeacherConfig, device: torch.device, keep: Any) -> None:
        self._engine, self._keep = engine, keep  # transformers holds its DeepSpeed settings by a weak reference
        self.device = device
        self.model = engine.module
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        self.dtype = str(dtype).removeprefix("torch.")
        self.vocab_size = int(self.model.config.get_text_config().vocab_size)
        self._hidden: torch.Tensor | None = None
        backbone(self.model).register_forward_hook(self._catch_hidden)
        self.head = self._gathered_head()
        self._check(teacher, dtype)

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> HiddenStates:
        """Hidden states at the batch's target positions."""
        input_ids, position_ids, positions = (
            to_device(array, self.device) for array in (batch.input_ids, batch.position_ids, batch.positions)
        )
        hidden = self._run(input_ids, position_ids)
        return HiddenStates(hidden.reshape(-1, hidden.shape[-1])[positions], self.head)

    @torch.no_grad()
    def idle_pass(self) -> None:
        """Take part in a pass of the others without rows of one's own."""
        empty = torch.zeros(1, 2, dtype=torch.int64)
        self._run(empty, torch.arange(2)[None])

    def _run(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        # Through the whole model, because ZeRO-3 counts its passes there; one logit keeps its head cheap.
        options = {"logits_to_keep": 1} | options
        input_ids, position_ids = as_lines(self.model.config, input_ids, position_ids)
        self._engine(
            input_ids=input_ids.to(self.device), position_ids=position_ids.to(self.device), use_cache=False, **options
        )
        assert self._hidden is not None
        hidden, self._hidden = self._hidden, None
        return hidden

    def _catch_hidden(self, module: Any, arguments: Any, output: Any) -> None:
        self._hidden = output[0]

    def _gathered_head(self) -> Head:
        import deepspeed

        layer = self.model.get_output_embeddings()
        with deepspeed.zero.GatheredParameters(list(layer.parameters())):
            head = read_head(self.model)
            if head is None:
                raise UserError(f"teacher {type(self.model).__name__} has no plain linear head, which zero3 needs")
            bias = None if head.bias is None else head.bias.clone()
            return Head(head.weight.clone(), bias, head.soft_cap, head.logit_scale)

    @torch.no_grad()
    def _check(self, teacher: TeacherConfig, dtype: torch.dtype) -> None:
        ids = probe_line(self.vocab_size, self.device)
        logits = self._engine(input_ids=ids, use_cache=False).logits.float()
        assert self._hidden is not None
        difference = relative_difference(apply_head(self._hidden, self.head).float(), logits)
        if not difference <= tolerance(dtype):
            raise UserError(
                f"teacher {type(self.model).__name__} gives logits that are not head(hidden) (relative difference "
                f"{difference:.2g}); engine zero3 cannot run it"
            )
        if teacher.documents == "packed":
            difference = packing_agrees(self._engine, self.vocab_size)
            if not difference <= tolerance(dtype):
                raise UserError(f"teacher {type(self.model).__name__} mixes packed documents; set documents=apart")


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None) -> Zero3Engine:
    """Load the weights by shards over the group. Raises UserError. Collective."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    join_group(teacher)
    device = choose_device(teacher.device)
    dtype = computing_dtype(teacher, load_config(teacher))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
    }
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False} | dict(teacher.load_options)
    if teacher.attention is not None:
        options["attn_implementation"] = teacher.attention
    options["ignore_mismatched_sizes"] = True  # check_loaded refuses them, and can say which
    keep = HfDeepSpeedConfig(settings)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(teacher.model, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"teacher {teacher.model!r} cannot be loaded: {error}") from error
    check_loaded(teacher, model, found)
    engine, *_ = deepspeed.initialize(model=model.eval(), config=settings)
    engine.eval()
    return Zero3Engine(engine, teacher=teacher, device=device, keep=keep)
