"""Process group and DeepSpeed engine: the only place that knows launchers, devices and ds_config."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import distributed_c10d

from potstill.common.errors import ConfigError, UserError
from potstill.common.processes import free_port
from potstill.student_train.config.batch_arithmetic import accumulation_steps
from potstill.student_train.config.optimizers import OPTIMIZERS
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.parameter_groups import tell_layout

log = logging.getLogger(__name__)
TIMEOUT_VARIABLE = "DEEPSPEED_TIMEOUT"  # in minutes; DeepSpeed's own name, whose default of 10 is short for a save
DEFAULT_TIMEOUT_MINUTES = 30  # must outlast the longest save (trainer notes 4.4)


@dataclass(frozen=True)
class Topology:
    """Place of this process among the ranks."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> tuple[int, int]:
    """(rank, world size) from RANK and WORLD_SIZE, (0, 1) without a launcher. Raises UserError on half a launcher."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment holds some launcher variables but not {', '.join(missing)}; start with deepspeed or "
            "torchrun, or unset RANK and WORLD_SIZE for a single process"
        )
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def group_timeout() -> timedelta:
    """How long a rank waits for another that does not answer, a host that is cut off for one. Raises UserError."""
    text = os.environ.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_MINUTES))
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"environment variable {TIMEOUT_VARIABLE} is {text!r}, expected whole minutes, 1 or more")
    return timedelta(minutes=int(text))


def start_distributed() -> Topology:
    """Join (or, without a launcher, form alone) the process group: NCCL with a GPU, gloo without."""
    rank, world_size = world_from_environment()
    if world_size == 1 and "MASTER_PORT" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    timeout = group_timeout()  # before DeepSpeed reads the same variable, and fails without words
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls two collectives that torch 2.13 marks as old, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        # This table alone makes init_distributed compile a shared-memory op on CPU, which gloo does not need.
        deepspeed.ops.__compatible_ops__ = {}
        device, backend = torch.device("cpu"), "gloo"
    if not torch.distributed.is_initialized():
        # DeepSpeed makes groups of its own (ZeRO's among them) and says nothing of time: they take torch's default.
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
        deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=timeout)
    return Topology(rank, world_size, device)


def stop_distributed() -> None:
    """Leave the process group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks, in place."""
    torch.distributed.all_reduce(values)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_main(topology: Topology, function: Any, *args: Any) -> None:
    """Run a function on rank 0, to whose end all ranks wait; its UserError or OSError is raised on every rank."""
    error: UserError | OSError | None = None
    if topology.is_main:
        try:
            function(*args)
        except (UserError, OSError) as caught:
            error = caught
    error = broadcast_object(error)
    if error is not None:
        raise error


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, by rank, on every rank."""
    box = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(box, value)
    return box


def deepspeed_config(config: TrainConfig, *, world_size: int, load_universal: bool = False) -> dict[str, Any]:
    """The dictionary for DeepSpeed: the passthrough, and the keys that follow from our own."""
    passed = {key: value for key, value in config.deepspeed.items() if key != "zero_optimization"}
    if config.optimizer.kind != "adamw" and config.zero_stage > 0:
        passed = {"zero_allow_untested_optimizer": True, **passed}  # DeepSpeed knows its own and torch's by class
    return {
        **passed,
        "train_micro_batch_size_per_gpu": config.data.micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": {
            "overlap_comm": False,  # faster where it works, but it had races (deepspeedai/DeepSpeed#5241, #8061)
            **config.deepspeed.get("zero_optimization", {}),
            "stage": config.zero_stage,
        },
        "zero_force_ds_cpu_optimizer": passed.get("zero_force_ds_cpu_optimizer", False),
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 2**31 - 1,
    }


def check_deepspeed(ds_config: dict[str, Any]) -> None:
    """Let DeepSpeed read its ZeRO options before a model exists. Raises ConfigError with the keys it refuses."""
    from deepspeed.runtime.zero.config import get_zero_config
    from pydantic import ValidationError

    try:
        get_zero_config(ds_config)
    except ValidationError as error:
        found = "; ".join(
            f"deepspeed.zero_optimization.{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()
        )
        raise ConfigError(f"DeepSpeed refuses its options: {found}; correct or remove these keys") from error


@contextmanager
def zero3_construction(ds_config: dict[str, Any]) -> Iterator[None]:
    """While open, transformers builds models partitioned (ZeRO-3 only); the handle must stay alive meanwhile."""
    if ds_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    handle = HfDeepSpeedConfig(dict(ds_config))
    try:
        yield
    finally:
        del handle
        unset_hf_deepspeed_config()


def build_engine(module: nn.Module, config: TrainConfig, ds_config: dict[str, Any], topology: Topology) -> Any:
    """Wrap the student in a DeepSpeed engine."""
    import deepspeed

    optimizer = OPTIMIZERS[config.optimizer.kind](module, config.optimizer, topology.device)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=dict(ds_config))
    tell_layout(optimizer, groups, rank=topology.rank, cut=config.zero_stage > 0)
    if config.nan_policy == "skip":
        # DeepSpeed's own check, which it switches on for bfloat16 only: the step is dropped whole, on all ranks.
        engine.optimizer.check_grad_overflow = True
    return engine


def set_learning_rate(engine: Any, lr: float) -> None:
    """Write the learning rate of the next optimizer step; a group may have one that is `lr_scale` times as high."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def plain_gradient_norm(engine: Any) -> torch.Tensor | None:
    """Norm of the averaged gradients before clipping (0-d), to be asked between backward and step.

    None where DeepSpeed's own optimizers keep it (get_global_grad_norm), and before the last micro-batch of a step.
    With torch's optimizer alone (ZeRO 0 in float32) DeepSpeed 0.19 clips and forgets the norm.
    """
    if hasattr(engine.optimizer, "_global_grad_norm") or not engine.is_gradient_accumulation_boundary():
        return None
    grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(grads)
