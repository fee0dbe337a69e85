"""How a global batch is cut: rows per forward x accumulation x ranks. Imports nothing heavy: it is said at once."""

from __future__ import annotations

from potstill.common.errors import ConfigError
from potstill.student_train.config.train import TrainConfig


def accumulation_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per rank and step. Raises ConfigError when the global batch does not divide."""
    data = config.data
    per_forward = data.micro_batch_rows * world_size
    if data.global_batch_rows % per_forward:
        lower, upper = (data.global_batch_rows // per_forward + more for more in (0, 1))
        rows = " or ".join(str(count * per_forward) for count in (lower, upper) if count)
        raise ConfigError(
            f"data.global_batch_rows {data.global_batch_rows} is not a multiple of data.micro_batch_rows "
            f"{data.micro_batch_rows} x {world_size} ranks = {per_forward}; set data.global_batch_rows to {rows}, or "
            "take fewer ranks or a smaller data.micro_batch_rows"
        )
    return data.global_batch_rows // per_forward
