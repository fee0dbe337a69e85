"""Engine `hf` with `tensor_parallel: N`: a transformers model whose layers are split over N ranks.

transformers splits by its own plan for the architecture: heads of attention, the inner size of an MLP, experts, and the
vocabulary of embeddings and head; two sums over the ranks for each layer make hidden states that all ranks have. The
head is gathered on the first rank, which applies it in chunks as a process alone does. See team.py for the ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from potstill.common.causal_lm import backbone
from potstill.common.errors import UserError
from potstill.teacher_dump.batches import TeacherBatch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.base import Head, TeacherOutput, TopKWanted
from potstill.teacher_dump.engines.hf import HfEngine, choose_device, load_weights, make_current
from potstill.teacher_dump.engines.team import Lines, Load, Team, TeamRanks, form_team
from potstill.teacher_dump.host_copies import to_device
from potstill.teacher_dump.identity import load_config

_PLACED = ("device_map", "quantization_config")
_HEADS = ("num_attention_heads", "num_key_value_heads")


class SplitEngine(HfEngine):
    """See TeacherEngine. `forward` is the first rank's, and the others take part in it by `follow`."""

    def __init__(self, model: Any, *, teacher: TeacherConfig, device: torch.device, team: Team) -> None:
        super().__init__(model, teacher=teacher, device=device)
        self._team = team
        if not team.is_first:
            self.head: Head | None = None  # gathered for the checks, and needed by the first only

    def forward(self, batch: TeacherBatch) -> TeacherOutput:
        """As HfEngine. Raises WalkEndedError where another rank is lost."""
        with self._team.together(Lines(batch.input_ids, batch.position_ids, whole=self.head is None)):
            return super().forward(batch)

    @torch.no_grad()
    def follow(self, lines: Lines) -> None:
        """Take part in a pass of the first rank."""
        input_ids, position_ids = (to_device(ids, self.device) for ids in (lines.input_ids, lines.position_ids))
        self._lines(self.model if lines.whole else backbone(self.model), input_ids, position_ids)


def join_group(teacher: TeacherConfig) -> TeamRanks:
    """The ranks that hold this teacher; nothing is loaded yet. Raises UserError without a launcher."""
    team = form_team(teacher.tensor_parallel, _device(teacher))
    return TeamRanks(team, lambda: load(teacher))


def load(teacher: TeacherConfig, wanted: TopKWanted | None = None) -> SplitEngine:
    """Load this rank's part of the weights. Raises UserError. Collective."""
    from transformers.distributed import DistributedConfig

    device = _device(teacher)
    team = form_team(teacher.tensor_parallel, device)
    _refuse_what_cannot_be_split(teacher)
    with team.together(Load()):
        model = load_weights(
            teacher, {**teacher.load_options, "distributed_config": DistributedConfig(tp_size=team.size)}
        )
        team.wait_for_all()
        return SplitEngine(model, teacher=teacher, device=device, team=team)


def _device(teacher: TeacherConfig) -> torch.device:
    """This rank's device, by the rule that transformers has for it: the rank's GPU if there are any."""
    found, wanted = choose_device("auto"), teacher.device
    if wanted not in ("auto", found.type):
        raise UserError(
            f"device {wanted!r} with tensor_parallel={teacher.tensor_parallel}: each rank takes a {found.type} of "
            "its own; use auto"
        )
    make_current(found)
    return found


def _refuse_what_cannot_be_split(teacher: TeacherConfig) -> None:
    parts = teacher.tensor_parallel
    if placed := [key for key in _PLACED if key in teacher.load_options]:
        raise UserError(f"load_options.{placed[0]} with tensor_parallel={parts}: leave one of the two out")
    text = load_config(teacher).get_text_config()
    heads = {key: getattr(text, key, None) for key in _HEADS}
    if odd := [f"{key}={count}" for key, count in heads.items() if isinstance(count, int) and count % parts]:
        raise UserError(
            f"teacher {teacher.model!r} has {' and '.join(odd)}, and tensor_parallel={parts} does not divide that: a "
            "head stands on one rank; use a smaller number, or engine zero3"
        )
