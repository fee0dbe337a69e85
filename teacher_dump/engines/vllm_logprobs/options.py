"""Which of `teacher.load_options` this engine sets itself, beside those that engine `vllm` refuses.

Read by the table of engines, so nothing heavy is imported here.
"""

from __future__ import annotations

LOGPROBS_OPTIONS = ("max_logprobs", "logprobs_mode", "skip_tokenizer_init")
