"""Engine `vllm`: hidden states by token pooling, a prompt for each document."""
