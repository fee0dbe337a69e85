"""What one rank of a group does in the tests; importable, because it runs in processes of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from potstill.teacher_dump import DumpConfig, dump


def dump_as_group(tokens: str, output: str, model: str, dtype: str) -> dict[str, Any]:
    """Dump with engine zero3; how many units this rank did, whether it sealed, and how much of the model it held."""
    from potstill.teacher_dump.engines import zero3

    held: list[float] = []
    load = zero3.load

    def spying_load(teacher: Any, wanted: Any) -> Any:
        engine = load(teacher, wanted)
        parameters = list(engine.model.parameters())
        held.append(sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters))
        return engine

    zero3.load = spying_load  # in a process of its own
    teacher = {"model": model, "engine": "zero3", "dtype": dtype, "batch_rows": 2, "check_tokenizer": False}
    selection = {"mode": "top_k", "k": 8}
    config = DumpConfig(tokens=tokens, output=Path(output), teacher=teacher, selection=selection)
    summary: Any = dump(config)
    return {"units": summary.units, "sealed": summary.sealed, "held": held[0] if held else None}
