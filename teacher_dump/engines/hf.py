"""Engine `hf`: a transformers causal language model on one device."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pickle import UnpicklingError
from typing import Any

import torch

from potstill.common.causal_lm import backbone
from potstill.common.errors import UserError
from potstill.common.packed import as_lines
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, HiddenStates, Logits, TeacherOutput, TopKWanted
from potstill.teacher_dump.engines.head import choose_head, packing_agrees, probe_line, tolerance
from potstill.teacher_dump.engines.loaded import check_loaded
from potstill.teacher_dump.host_copies import to_device
from potstill.teacher_dump.identity import computing_dtype, load_config
from potstill.teacher_dump.placing import local_device_index

log = logging.getLogger(__name__)


class HfEngine:
    """See TeacherEngine. Never passes an attention mask: transformers then builds one from the position ids."""

    name = "hf"

    def __init__(self, model: Any, *, teacher: TeacherConfig, device: torch.device) -> None:
        self.model = model
        self.device = device
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = str(dtype).removeprefix("torch.")
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        if teacher.documents == "packed":
            _require_packing(model, vocab_size=self.vocab_size, dtype=dtype)
        self.head: Head | None = choose_head(model, wanted=teacher.head, vocab_size=self.vocab_size, dtype=dtype)
        if self.head is None:
            ids = probe_line(self.vocab_size, device)
            self._of_next_token(model(input_ids=ids, use_cache=False).logits, ids)
        self._run = model if self.head is None else backbone(model)
        if teacher.compile:
            self._run = torch.compile(self._run)

    @torch.no_grad()
    def forward(self, batch: TeacherBatch) -> TeacherOutput:
        """Hidden states or logits at the batch's target positions."""
        input_ids, position_ids, positions = (
            to_device(array, self.device) for array in (batch.input_ids, batch.position_ids, batch.positions)
        )
        output = self._lines(self._run, input_ids, position_ids)
        if self.head is None:
            return Logits(self._of_next_token(output.logits, input_ids)[positions])
        return HiddenStates(output[0].reshape(-1, output[0].shape[-1])[positions], self.head)

    def _of_next_token(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """The logits [B * L, V] of a model that gives [B, L, V or more]: those of further tokens stand behind."""
        lines_of_one = logits.ndim == 3 and logits.shape[:2].numel() == input_ids.numel()  # perhaps joined by as_lines
        if not lines_of_one or logits.shape[-1] < self.vocab_size:
            raise UserError(
                f"teacher {type(self.model).__name__} gives logits {list(logits.shape)} for ids "
                f"{list(input_ids.shape)}; expected one row of {self.vocab_size} or more for each id, that of the next "
                "token: a model that predicts several tokens at once must be saved with the head of the next one alone"
            )
        return logits[..., : self.vocab_size].reshape(-1, self.vocab_size)

    def _lines(self, run: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        input_ids, position_ids = as_lines(self.model.config, input_ids, position_ids)
        return run(input_ids=input_ids, position_ids=position_ids, use_cache=False)

    def idle_pass(self) -> None:
        """Nothing to do: there is no group."""


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None) -> HfEngine:
    """Load the weights onto the worker's device. Raises UserError when that is not possible."""
    device = choose_device(teacher.device)
    make_current(device)
    options = dict(teacher.load_options)
    placed = "device_map" in options or "quantization_config" in options
    if "quantization_config" in options:
        options.setdefault("device_map", {"": str(device)})
    model = load_weights(teacher, options)
    if not placed:
        model = model.to(device)
    return HfEngine(model, teacher=teacher, device=device)


def load_weights(teacher: TeacherConfig, options: Mapping[str, Any]) -> Any:
    """The model, loaded with these options of from_pretrained and fit to run. Raises UserError."""
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": False, **options}
    # The dtype that run.json names, also where "auto" could mean something else to another version of transformers.
    options.setdefault("dtype", computing_dtype(teacher, load_config(teacher)))
    if teacher.attention is not None:
        options["attn_implementation"] = teacher.attention
    options["ignore_mismatched_sizes"] = True  # check_loaded refuses them, and can say which
    try:
        model, found = AutoModelForCausalLM.from_pretrained(teacher.model, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, RuntimeError, UnpicklingError) as error:
        raise UserError(f"teacher {teacher.model!r} cannot be loaded: {error}") from error
    check_loaded(teacher, model, found)
    return model.eval().requires_grad_(False)


def choose_device(wanted: str) -> torch.device:
    """`auto`: this process's GPU if there is one, else the CPU. Raises UserError for a device that is not there."""
    if wanted == "auto":
        wanted = f"cuda:{local_device_index() % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"device {wanted!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device {wanted!r}: this machine shows {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device


def make_current(device: torch.device) -> None:
    """Make a worker's GPU the current one: kernels are launched, and events recorded, on the current device.

    With several GPUs in sight of every worker (torchrun, SLURM) that is GPU 0 for all of them otherwise. A device
    without an index is the current one by definition, and torch refuses to set it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def _require_packing(model: Any, *, vocab_size: int, dtype: torch.dtype) -> None:
    difference = packing_agrees(model, vocab_size)
    if not difference <= tolerance(dtype):
        raise UserError(
            f"teacher {type(model).__name__} does not keep packed documents apart: its logits for two documents in one "
            f"line differ from those apart by {difference:.2g} of the largest logit; set documents=apart"
        )
