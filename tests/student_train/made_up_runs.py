"""Run folders with metrics that no training made: for pages that need many runs, odd figures, or long ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from potstill.common.config import build_config, dump_config
from potstill.student_train.config.train import TrainConfig
from tests.student_train import tiny

STORES = ("tokens", "teacher", "scores", "heldout", "heldout_teacher")


def write_run(folder: Path, records: Sequence[dict[str, Any]], *, done: bool = False, **changes: Any) -> Path:
    """A run folder with these lines of metrics."""
    stores = {name: Path("stores") / name for name in STORES}
    tree = tiny.config_tree(stores, folder, **changes)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(build_config(TrainConfig, tree, source="test")))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        (folder / "done.json").write_text(json.dumps({"step": records[-1]["step"]}))
    return folder


def records(
    *, steps: int, every: int = 10, eval_every: int = 50, floor: float = 3.0, phase: float = 0.0, teacher: bool = True
) -> list[dict[str, Any]]:
    """Lines of a run whose loss falls to `floor` with a small wave on it."""
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        where = {"step": step, "tokens": step * 4096, "runtime_seconds": 0.4 * step + 0.3 * math.sin(step + phase)}
        loss = floor + 4.0 * math.exp(-step / (0.2 * steps)) + 0.05 * math.sin(0.9 * step + phase)
        lines.append(
            {
                "kind": "train",
                **where,
                "loss": loss,
                "ce": loss + 0.1,
                "kd": loss - 0.2 if teacher else None,
                "agreement": 0.7 - 0.1 * loss if teacher else None,
                "selected_share": 1.0 if step > steps / 2 else 0.6,
                "row_share": min(1.0, 0.5 + step / steps),
                "lr": 3e-3 * min(1.0, step / 50),
                "grad_norm": 1.0 + 0.5 * math.sin(step + phase),
                "tokens_per_second": 9000 + 500 * math.sin(step),
                "skipped_steps": 0,
                "peak_memory_bytes": 812_345_678,
            }
        )
        if step % eval_every == 0 or step == steps:
            heldout = loss + 0.05
            figures = {"perplexity": math.exp(heldout), "accuracy": 0.3, "rows": 32.0, "positions": 4000.0}
            compared = {"agreement": 0.6 - 0.05 * heldout, "teacher_kl": heldout - 2.0} if teacher else {}
            lines.append({"kind": "eval", **where, "heldout_loss": heldout, **figures, **compared})
            lines.append({"kind": "sample", **where, "temperature": 0.0, "samples": texts(step, phase)})
    return lines


def texts(step: int, phase: float) -> list[dict[str, Any]]:
    """Two samples, one of them with signs that HTML must not take for its own."""
    story = "there was a little dog who wanted to play. " * (1 + step // 100)
    return [
        {"source": "given", "prompt": "Once upon a time,", "text": f" at {phase:g}, {story}", "ended": False},
        {
            "source": "held-out row 3",
            "prompt": "</script><b>She said:\n",
            "text": f"<i>yes</i> & no ({step})",
            "ended": True,
        },
    ]
