"""Run by itself: `prompt_logprobs` of a vLLM that lives in this process only, written to a folder.

Reads `task.json`, writes `answer.npz`: of run 0 (all prompts in one call) and run 1 (each alone), for each prompt, the
ids int64 [P - 1, R] and log-probabilities float32 [P - 1, R] at its positions but the last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import import_vllm, logprob_arguments


def main(folder: Path) -> None:
    """See above."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    teacher = TeacherConfig.model_validate(task["teacher"])
    vllm = import_vllm()
    best = int(task["best"])
    llm = vllm.LLM(**logprob_arguments(teacher, dtype=task["dtype"], row_length=task["row_length"], best=best))
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=best, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    together = llm.generate(prompts, sampling, use_tqdm=False)
    alone = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    arrays: dict[str, NDArray[Any]] = {}
    for run, outputs in enumerate((together, alone)):
        for number, output in enumerate(outputs):
            if list(output.prompt_token_ids) != task["prompts"][number]:
                raise SystemExit(f"prompt {number} of run {run} came back with other ids")
            ids, logprobs = _arrays(output.prompt_logprobs, best)
            arrays |= {f"ids{run}_{number}": ids, f"logprobs{run}_{number}": logprobs}
    np.savez(folder / "answer.npz", **arrays)  # type: ignore[arg-type]


def _arrays(told: Any, best: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """vLLM says nothing of the first token, and of each other one the best ids and itself."""
    rows = []
    for position in told[1:]:
        ranked = sorted(position.items(), key=lambda pair: -pair[1].logprob)[:best]
        rows.append([(int(token), float(entry.logprob)) for token, entry in ranked])
    table = np.array(rows, dtype=np.float64)  # [P - 1, R, 2]; ids are exact in float64
    return table[..., 0].astype(np.int64), table[..., 1].astype(np.float32)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
