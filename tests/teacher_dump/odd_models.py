"""Small random models of the kinds that large teachers are of: mixtures of experts, latent attention, odd heads.

Heads of 32 features, the least that vLLM's attention has on a CPU. The spread of the initial weights is large, so that
experts and layers matter to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.teacher_dump.tiny import VOCAB, save_model

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def llama(**settings: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **settings}))


def qwen3_moe(**settings: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SIZES, **experts, "norm_topk_prob": True, **settings}))


def mixtral(**settings: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, **experts, **settings}))


def deepseek_v3(**settings: Any) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    latent = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    experts = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    # As the published ones say: vLLM goes by it, transformers knows no other way.
    ways = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    sizes = {**SIZES, "num_key_value_heads": 4, "head_dim": 64, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**{**sizes, **latent, **experts, **ways, **settings}))


def gemma2(**settings: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    cap = {"final_logit_softcapping": 5.0, "sliding_window": 4, "query_pre_attn_scalar": 32}
    return Gemma2ForCausalLM(Gemma2Config(**{**SIZES, **cap, **settings}))


def granite(**settings: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 128}
    return GraniteForCausalLM(GraniteConfig(**{**sizes, "logits_scaling": 4.0, **settings}))


def cohere(**settings: Any) -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return CohereForCausalLM(CohereConfig(**{**SIZES, **ids, "hidden_size": 128, "logit_scale": 0.25, **settings}))


def phi(**settings: Any) -> Any:
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    sizes = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 128}
    model = PhiForCausalLM(PhiConfig(**{**sizes, "num_key_value_heads": 4, **settings}))
    torch.nn.init.normal_(model.lm_head.bias)
    return model


EXPERTS: dict[str, Callable[..., Any]] = {"qwen3-moe": qwen3_moe, "mixtral": mixtral, "deepseek-v3": deepseek_v3}
HEADS: dict[str, Callable[..., Any]] = {
    "llama": llama,
    "llama, tied": lambda **settings: llama(tie_word_embeddings=True, **settings),
    "gemma2, tied, soft cap": gemma2,
    "granite, logits divided": granite,
    "cohere, logit scale": cohere,
    "phi, bias": phi,
}


def saved(make: Callable[..., Any], folder: Path, *, sharpen: float = 1.0, seed: int = 0, **settings: Any) -> Path:
    """The model that `make` makes of this seed, in a folder of its own."""
    import torch

    torch.manual_seed(seed)
    return save_model(make(**settings), folder, sharpen=sharpen)


def with_tokenizer(folder: Path) -> Path:
    """A tokenizer of one word for each id, in the model's folder: vLLM does not load a model without one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Let `change` edit the checkpoint's tensors by name."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def add_prediction_layer(weights: dict[str, Any], *, layers: int = 3) -> None:
    """A layer for the token after the next, as DeepSeek-V3 saves it: random weights, numbered beyond the last layer."""
    import torch

    last = [name for name in weights if name.startswith(f"model.layers.{layers - 1}.")]
    own = {name.replace(f".{layers - 1}.", f".{layers}.", 1): torch.randn_like(weights[name]) for name in last}
    width = weights["model.norm.weight"].shape[0]
    prefix = f"model.layers.{layers}"
    own[f"{prefix}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    own[f"{prefix}.shared_head.head.weight"] = torch.randn_like(weights["lm_head.weight"])
    own[f"{prefix}.shared_head.norm.weight"] = torch.randn(width)
    own[f"{prefix}.enorm.weight"], own[f"{prefix}.hnorm.weight"] = torch.randn(width), torch.randn(width)
    own[f"{prefix}.eh_proj.weight"] = torch.randn(width, 2 * width)
    weights.update(own)
