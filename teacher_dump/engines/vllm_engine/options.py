"""Which of `teacher.load_options` reach vLLM, which change nothing of a store, and which would break the engine.

Read by the table of engines, so nothing heavy is imported here.
"""

from __future__ import annotations

# Memory, batching and the place of workers and files: what they change lies within the engine's own noise.
IDLE_OPTIONS = frozenset(
    {
        "aggregate_engine_logging",
        "cpu_offload_gb",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "log_level",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_partial_prefills",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "safetensors_load_strategy",
        "seed",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "use_tqdm_on_load",
    }
)
# Where a model is: read by identity.py, and turned into the folder that vLLM is given.
PLACE_OPTIONS = frozenset({"revision", "token", "cache_dir", "local_files_only", "trust_remote_code"})
_OURS = "the engine sets it itself, so that hidden states come out"
REFUSED_OPTIONS: dict[str, str] = {
    **dict.fromkeys(("runner", "convert", "task", "pooler_config", "override_pooler_config"), _OURS),
    **dict.fromkeys(("model", "hf_config_path", "model_weights"), "set teacher.model instead"),
    "enable_prefix_caching": "states of a cached prefix are not computed, and would be missing",
    "skip_tokenizer_init": "pooling fails without a tokenizer",
    "tensor_parallel_size": "set teacher.tensor_parallel instead",
    "attention_backend": "set teacher.attention instead",
    "attention_config": "set teacher.attention instead",
    "load_format": "the head is read from the same safetensors files",
    "data_parallel_size": "run a worker for each instead",
    "pipeline_parallel_size": "it is not tried with pooling; use teacher.tensor_parallel",
    "prefill_context_parallel_size": "it is not tried with pooling; use teacher.tensor_parallel",
    "decode_context_parallel_size": "it is not tried with pooling; use teacher.tensor_parallel",
    "speculative_config": "nothing is generated",
    "enable_lora": "merge the adapter into the checkpoint",
    "worker_extension_cls": "the engine asks its workers through one of its own",
    "subfolder": "name the folder itself as teacher.model",
    **dict.fromkeys(("device_map", "max_memory"), "it is of transformers; see vLLM's own options"),
}
