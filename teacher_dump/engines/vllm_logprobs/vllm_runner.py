"""The real runner: a `vllm.LLM` that tells `prompt_logprobs`.

A prompt is a document without its last token, as long as a model's context; vLLM takes no longer one, because it always
generates a token. So that token is made to be the document's last (`allowed_token_ids`), and its log-probability, which
vLLM takes before it looks at what is allowed, is that of the last position.

Legend: P tokens of a prompt, R best ids of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.vllm_engine.runner import ADVICE, WrongAnswerError
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import (
    WORKER_REPORT,
    Devices,
    model_arguments,
    start_llm,
    worker_notes,
)
from potstill.teacher_dump.engines.vllm_logprobs.runner import Answer, Question


def telling_arguments(teacher: TeacherConfig, *, dtype: str, row_length: int | None) -> dict[str, Any]:
    """What the `vllm.LLM` that tells log-probabilities is made with."""
    arguments = model_arguments(teacher, dtype=dtype, row_length=row_length)
    return arguments | {
        "runner": "generate",
        "skip_tokenizer_init": True,  # ids in, ids out
        "max_logprobs": -1,
        "logprobs_mode": "raw_logprobs",
        # Logits that are not rounded to the type of the weights, as the other engines have them.
        "hf_overrides": {"head_dtype": "float32", **arguments.get("hf_overrides", {})},
        "worker_extension_cls": WORKER_REPORT,
    }


class VllmLogprobsRunner:
    """See LogprobsRunner."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        config = llm.llm_engine.vllm_config
        self.head_size = int(config.model_config.get_vocab_size())
        self.longest = int(config.model_config.max_model_len) - 1  # a token is generated behind it
        self.at_once: int | None = config.scheduler_config.max_num_batched_tokens

    def logprobs(self, questions: Sequence[Question], num_best: int) -> list[Answer]:
        """See LogprobsRunner."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": question.ids} for question in questions],
            [_sampling(question, num_best) for question in questions],
            use_tqdm=False,
        )
        return [_answer(output, num_best) for output in outputs]

    def notes(self) -> Mapping[str, Any]:
        """See vllm_engine: model class and attention backends."""
        return worker_notes(self.llm)


def _sampling(question: Question, num_best: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=num_best,
        logprobs=num_best,
        allowed_token_ids=[question.after],
        flat_logprobs=True,
        detokenize=False,
        ignore_eos=True,
    )


def _answer(output: Any, num_best: int) -> Answer:
    """Of each position vLLM lists the label, then the R best; of the first token of a prompt it lists nothing."""
    ids, logprobs, ranks = [], [], []
    for flat in (output.prompt_logprobs, output.outputs[0].logprobs):
        ids.append(np.asarray(flat.token_ids, dtype=np.int64))
        logprobs.append(np.asarray(flat.logprobs, dtype=np.float32))
        ranks.append(np.asarray(flat.ranks, dtype=np.int64))
    width, given = num_best + 1, sum(len(part) for part in ids)
    if given % width:
        raise WrongAnswerError(
            f"vLLM gave {given} log-probabilities to a prompt of {len(output.prompt_token_ids)} tokens, expected "
            f"{width} for each; {ADVICE}"
        )
    table = [torch.from_numpy(np.concatenate(parts)).view(-1, width) for parts in (ids, logprobs, ranks)]
    return Answer(
        ids=list(output.prompt_token_ids),
        labels=table[0][:, 0],
        label_logprob=table[1][:, 0],
        label_rank=table[2][:, 0],
        best=table[0][:, 1:],
        logprobs=table[1][:, 1:],
    )


def start_logprobs_runner(
    teacher: TeacherConfig, devices: Devices, *, dtype: str, row_length: int | None
) -> VllmLogprobsRunner:
    """Load the weights into vLLM. Raises UserError where vLLM refuses them or its options."""
    return VllmLogprobsRunner(
        start_llm(teacher, devices, telling_arguments(teacher, dtype=dtype, row_length=row_length))
    )
