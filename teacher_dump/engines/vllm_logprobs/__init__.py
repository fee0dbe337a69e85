"""Engine `vllm_logprobs`: vLLM's `prompt_logprobs`, for teachers whose hidden states cannot be had."""
