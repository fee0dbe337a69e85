"""Online against offline, by hand; parameters of large mixtures against those that their makers have published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.launch.calibrate import Measured
from potstill.launch.model_costs import model_costs, read_quantised
from potstill.launch.plan import PlanConfig, make_plan
from potstill.launch.plan_limits import FP8_GPUS, GPUS, fp8_speed
from potstill.launch.plan_online import Prices, fewest, gpus_that_hold, online_plan
from tests.launch.test_plan import middle_model
from tests.teacher_dump.tiny import save_llama

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}
# Shapes of config.json, and parameters in all and for a token, in units of 1e9, as the makers give them. gpt-oss counts
# the embeddings among all, but not among the active ones.
PUBLISHED: list[tuple[str, dict[str, Any], float, float]] = [
    (
        "MixtralConfig",  # Mixtral 8x7B (arXiv 2401.04088: 47 and 13)
        {"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
        46.7,
        12.9,
    ),
    (
        "Qwen3MoeConfig",  # Qwen3-235B-A22B (arXiv 2505.09388)
        {"vocab_size": 151_936, "hidden_size": 4096, "moe_intermediate_size": 1536, "num_hidden_layers": 94}
        | {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
        | {"num_experts": 128, "num_experts_per_tok": 8},
        235.0,
        22.0,
    ),
    (
        "DeepseekV3Config",  # DeepSeek-V3 (arXiv 2412.19437), without its layer of multi-token prediction
        {"vocab_size": 129_280, "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048}
        | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256, "num_experts_per_tok": 8}
        | {"n_shared_experts": 1, "num_nextn_predict_layers": 1, "num_attention_heads": 128, "q_lora_rank": 1536}
        | {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        | {"quantization_config": FP8},
        671.0,
        37.0,
    ),
    (
        "GptOssConfig",  # gpt-oss-120b (arXiv 2508.10925: 116.83 and 5.13, and a checkpoint of 60.8 GiB)
        {"vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36}
        | {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64}
        | {"num_local_experts": 128, "num_experts_per_tok": 4, "quantization_config": MXFP4},
        116.83,
        5.13 + 0.579,
    ),
]


def save(folder: Path, name: str, shape: dict[str, Any]) -> str:
    import transformers

    getattr(transformers, name)(**shape).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("name", "shape", "billions", "active"), PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_parameters_are_those_that_were_published(
    name: str, shape: dict[str, Any], billions: float, active: float, tmp_path: Path
) -> None:
    costs = model_costs(save(tmp_path, name, shape), row_length=4096)
    assert costs.parameters == pytest.approx(billions * 1e9, rel=0.002)
    assert costs.active_parameters == pytest.approx(active * 1e9, rel=0.02)
    if name == "GptOssConfig":
        assert costs.weight_bytes == pytest.approx(60.8 * 2**30, rel=0.005) and costs.fp8_flops == 0
        assert "mxfp4" in costs.describe() and "4 of 128 experts" in costs.describe()
    if name == "DeepseekV3Config":
        # One byte for each parameter but those of embeddings and head.
        assert costs.weight_bytes == pytest.approx(costs.parameters + 2 * 129_280 * 7168, rel=0.002)
        keys_and_values = 61 * 2 * 128 * (128 + 64 + 128) * 4096 / 2
        assert costs.forward_flops == pytest.approx(
            2 * (costs.active_parameters - 129_280 * 7168) + keys_and_values, rel=1e-6
        )
        # The head and the products with keys and values are none of FP8.
        rest = costs.forward_flops - costs.fp8_flops
        assert rest == pytest.approx(2 * 129_280 * 7168 + keys_and_values, rel=0.02)
        assert costs.flops_at(2.0) == pytest.approx(rest + costs.fp8_flops / 2)


def test_a_small_deepseek_counted_by_hand(tmp_path: Path) -> None:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 8}
    shape |= {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2}
    shape |= {"n_shared_experts": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 12}
    shape |= {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "n_group": 2}
    costs = model_costs(save(tmp_path, "DeepseekV3Config", shape), row_length=16)
    attention = 32 * 12 + 12 + 12 * 2 * (6 + 4) + 32 * (10 + 4) + 10 + 10 * 2 * (6 + 5) + 2 * 5 * 32
    expert, norms = 3 * 32 * 8, 2 * 32
    dense, sparse = 3 * 32 * 48, 8 * 32 + 2 * expert  # router and shared experts
    always = 3 * (attention + norms) + dense + 2 * sparse + 32 + 2 * 96 * 32
    assert costs.parameters == always + 2 * 8 * expert
    assert costs.active_parameters == always + 2 * 2 * expert and costs.experts == (2, 8)
    shape["num_experts_per_tok"] = 0
    with pytest.raises(UserError, match=r"does not say how many a token meets.*num_experts_per_tok"):
        model_costs(save(tmp_path, "DeepseekV3Config", shape), row_length=16)


@pytest.mark.parametrize(
    ("said", "bits", "fp8"),
    [
        (FP8, 8, True),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.125, False),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8, True),
        (
            {"quant_method": "compressed-tensors", "ignore": ["lm_head", "re:.*q_proj"], "config_groups": {"group_0":
             {"weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8, "type": "float"}}}},
            8,
            True,
        ),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}},
            4.5,
            False,
        ),
    ],
)  # fmt: skip
def test_a_quantised_checkpoint_is_known_by_its_configuration(said: dict[str, Any], bits: float, fp8: bool) -> None:
    from types import SimpleNamespace

    found = read_quantised(SimpleNamespace(quantization_config=said))
    assert found is not None and found.known and (found.bits, found.fp8) == (bits, fp8)
    assert found.holds("model.layers.0.mlp.up_proj.weight", dimensions=2)
    assert not found.holds("lm_head.weight", dimensions=2)
    assert not found.holds("model.layers.0.mlp.gate.weight", dimensions=2)
    assert found.holds("model.layers.0.self_attn.q_proj.weight", dimensions=2) == ("ignore" not in said)
    unknown = read_quantised(SimpleNamespace(quantization_config={"quant_method": "rotated"}))
    assert unknown is not None and not unknown.known and unknown.bits == 16


def test_fp8_is_faster_where_the_gpu_has_it(tmp_path: Path) -> None:
    shape = {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}
    shape |= {"num_key_value_heads": 8, "vocab_size": 32_000, "max_position_embeddings": 8192}
    plain = save(tmp_path / "plain", "LlamaConfig", shape)
    small = save(tmp_path / "fp8", "LlamaConfig", {**shape, "quantization_config": FP8})
    assert set(FP8_GPUS) <= set(GPUS) and fp8_speed("a100") == 1.0
    speeds = {}
    for gpu in ("h100", "a100"):
        one, other = (make_plan(PlanConfig(teacher=model, tokens=10**9, gpu=gpu)) for model in (plain, small))
        speeds[gpu] = one.dump_worker_seconds / other.dump_worker_seconds
        assert other.teacher_memory_bytes == pytest.approx(one.teacher_memory_bytes / 2, rel=0.02)
        fits_not = "engine vllm with tensor_parallel 4 or more, or engine zero3, groups of 3 GPUs or more"
        assert fits_not in one.format() and "do not fit" not in other.format()
        assert ("does not multiply FP8" in other.format()) == (gpu == "a100")
    assert 1.9 < speeds["h100"] < 2.0 and speeds["a100"] == pytest.approx(1.0)


def test_the_number_of_students_from_which_offline_is_cheaper() -> None:
    asked = {"student_tokens": 10**9, "dump_tokens": 10**9, "student_rate": 1e6, "step_rate": 1e6, "teacher_rate": 1e5}
    asked |= {"startup_seconds": 100.0, "num_gpus": 4, "store_bytes": 5e12, "device": "GPU", "least_gpus": (6, 2)}
    free = Prices(gpu_hour=None, tb_month=20.0, months=3.0)
    dump_hours = (10**9 / 1e5 + 100) * 4 / 3600
    even = online_plan(**asked, dump_hours=dump_hours, prices=free)
    assert even.own_hours == even.student_hours == pytest.approx(1000 * 4 / 3600)
    assert even.teacher_hours == pytest.approx(dump_hours) and even.saved_hours == pytest.approx(dump_hours)
    # As many hours with one student, as it sees each token once: cheaper from the second on.
    assert even.break_even() == 2 and even.rent == pytest.approx(5 * 20 * 3)
    assert (
        "6 or more" in next(even.notes()) and ("offline is cheaper", "from 2 students on (in GPU hours)") in even.rows()
    )
    with pytest.raises(ValueError, match="price of GPU hours"):
        even.break_even_money()
    # Two passes pay for the dump with the first student; a tenth of the tokens with the tenth or the one after.
    assert online_plan(**asked | {"student_tokens": 2e9}, dump_hours=dump_hours, prices=free).break_even() == 1
    tenth = online_plan(**asked | {"student_tokens": 1e8, "startup_seconds": 0.0}, dump_hours=10, prices=free)
    assert tenth.passes == pytest.approx(0.1) and tenth.break_even() == int(10 / (1000 * 4 / 3600)) + 1 == 10
    # A rent of 300 USD is that of 150 GPU hours at 2 USD.
    paid = Prices(gpu_hour=2.0, tb_month=20.0, months=3.0)
    money = online_plan(**asked, dump_hours=dump_hours, prices=paid)
    assert money.break_even_money() == int((dump_hours + 150) / dump_hours) + 1 == 15
    # A student that reading holds back more than a teacher would never saves anything.
    never = online_plan(**asked | {"student_rate": 1e4}, dump_hours=dump_hours, prices=free)
    assert never.break_even() is None and "never" in dict(never.rows())["offline is cheaper"]
    assert [fewest(once, 2.0) for once in (0.0, 1.9, 2.0, 2.1, 6.0)] == [1, 1, 2, 2, 4]
    assert gpus_that_hold(teacher_bytes=140e9, student_parameters=7e9, memory=80e9) == (5, 2)


def test_a_plan_prices_both_ways_with_the_same_rates(tmp_path: Path) -> None:
    teacher, student = middle_model(tmp_path / "model"), save_llama(tmp_path / "student")
    alone = make_plan(PlanConfig(teacher=teacher, tokens=10**9)).format()
    assert "name a student (--student MODEL)" in alone and "offline is cheaper" not in alone
    asked = {"teacher": teacher, "student": student, "tokens": 10**9, "num_gpus": 4, "price_per_gpu_hour": 2.0}
    plan = make_plan(PlanConfig(**asked, student_tokens=3 * 10**9))
    assert plan.online is not None and plan.online.passes == 3 and plan.online.break_even() == 1
    dumped = plan.dump_gpu_hours - plan.startup_seconds * 4 / 3600
    assert plan.online.teacher_hours == pytest.approx(3 * dumped + plan.startup_seconds * 4 / 3600)
    assert plan.online.student_hours == plan.student_gpu_hours
    assert plan.online.own_hours < plan.online.student_hours  # what reading costs so small a student
    assert "1 month of the store" in plan.format() and plan.online.rent == pytest.approx(23 * plan.dump_bytes / 1e12)
    # Measured on this machine: the dump and the teacher beside the student at that rate, without the host's bound.
    measured = Measured(tokens_per_second=500.0, bytes_per_token=50.0, startup_seconds=20.0)
    slow = make_plan(PlanConfig(**asked), measured=measured)
    assert slow.online is not None
    assert slow.online.teacher_hours == pytest.approx(slow.dump_gpu_hours) == pytest.approx((10**9 / 500 + 80) / 3600)
    # A teacher that the host holds back in a dump is not held back beside a student.
    tiny = make_plan(PlanConfig(teacher=student, student=student, tokens=10**9, row_length=64))
    assert tiny.online is not None and tiny.online.teacher_hours < tiny.dump_gpu_hours
