"""Engine vllm_logprobs by vLLM itself: real text against engine hf in float32, an MLA teacher, and a whole dump."""

from __future__ import annotations

import itertools
import json
import lzma
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from potstill.kernels.topk import TopK
from potstill.storage import StoreReader, TargetsRow
from potstill.teacher_dump import PrepareConfig, prepare
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.on_device import batch_topk
from tests.teacher_dump.tiny import make_tokens, save_model, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
ROWS, K = 12, 64

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here: `make test-vllm` installs it"),
]


def run(*words: str) -> str:
    """A Python process with vLLM in it, bounded in time; what it wrote."""
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    return text


def told(folder: Path, teacher: dict[str, Any], tokens: Path, *, rows: int, k: int) -> dict[str, np.ndarray]:
    """What the engine gives of the first rows, by name."""
    settings = {"engine": "vllm_logprobs", "check_tokenizer": False, **teacher}
    task = {"teacher": settings, "tokens": str(tokens), "rows": rows, "k": k, "output": str(folder / "told.npz")}
    (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
    log = run("-m", "tests.vllm.told_child", str(folder / "task.json"))
    assert "engine vllm_logprobs: against transformers in float32" in log
    with np.load(folder / "told.npz") as found:
        return dict(found)


def by_hf(teacher: dict[str, Any], tokens: Path, *, rows: int, k: int, dtype: str = "float32") -> TopK:
    """The same by transformers, each document in a line of its own row."""
    reader = StoreReader(tokens)
    engine = load_engine(TeacherConfig.model_validate({**teacher, "engine": "hf", "dtype": dtype, "device": "cpu"}))
    batch = packed_batch(reader.tokens_rows(range(rows)), length=reader.spec.row_length)
    options: Any = {"k": k, "vocab_size": reader.spec.vocab_size, "temperatures": (), "chunk_bytes": None}
    return batch_topk(engine, batch, **options).wait()


def same_sets(a: np.ndarray, b: np.ndarray) -> float:
    """Share of the positions whose ids [M, k] are the same set."""
    return float((np.sort(a, 1) == np.sort(b, 1)).all(1).mean())


@pytest.fixture(scope="module")
def novels(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of real text as long as the teacher's context: documents that fill one, and short ones."""
    out = tmp_path_factory.mktemp("novels")
    teacher = shared_data / "models" / "teacher-7m"
    with lzma.open(shared_data / "novels" / "valid.jsonl.xz", "rt") as stream:
        texts = [json.loads(next(stream))["text"][:16000]]
    with lzma.open(shared_data / "tinystories" / "valid.jsonl.xz", "rt") as stream:
        texts += [json.loads(line)["text"] for line in itertools.islice(stream, 24)]
    source = write_jsonl(out / "texts.jsonl", texts)
    prepare(PrepareConfig(input=[source], output=out / "rows", tokenizer=teacher, row_length=512))
    return out / "rows" / "train"


def test_real_text_in_float32_is_what_transformers_says(shared_data: Path, novels: Path, tmp_path: Path) -> None:
    teacher = {"model": str(shared_data / "models" / "teacher-7m"), "dtype": "float32"}
    found, truth = told(tmp_path, teacher, novels, rows=ROWS, k=K), by_hf(teacher, novels, rows=ROWS, k=K)
    assert len(found["ids"]) == len(truth.ids) > ROWS * 500
    assert same_sets(found["ids"], truth.ids.numpy()) >= 0.999
    assert np.abs(found["logprobs"] - truth.logprobs.numpy()).max() < 1e-4
    assert np.abs(found["label_logprob"] - truth.label_logprob.numpy()).max() < 1e-4
    assert np.abs(np.exp(found["log_tail"]) - truth.log_tail.exp().numpy()).max() < 1e-5
    capped = np.minimum(found["label_rank"], 255) != np.minimum(truth.label_rank.numpy(), 255)
    assert capped.mean() < 0.005  # near equals in another order of adding up


def test_bf16_is_no_worse_than_transformers_own(shared_data: Path, novels: Path, tmp_path: Path) -> None:
    """Against float32; the head is applied in float32, so that log-probabilities are not steps of bfloat16."""
    teacher = {"model": str(shared_data / "models" / "teacher-7m"), "dtype": "bfloat16"}
    found = told(tmp_path, teacher, novels, rows=ROWS, k=K)
    truth, rounded = (by_hf(teacher, novels, rows=ROWS, k=K, dtype=dtype) for dtype in ("float32", "bfloat16"))
    own, theirs = (same_sets(ids, truth.ids.numpy()) for ids in (found["ids"], rounded.ids.numpy()))
    assert own >= theirs - 0.02
    labels = (found["label_logprob"], rounded.label_logprob.numpy())
    errors = [float(np.abs(one - truth.label_logprob.numpy()).mean()) for one in labels]
    assert errors[0] <= 1.2 * errors[1]
    assert len(np.unique(found["logprobs"])) > 0.5 * found["logprobs"].size


def deepseek(folder: Path) -> Path:
    """A random DeepSeek-V3 of two layers, one of them with experts, in bfloat16."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=512,  # with the next one the only size of MLA heads that vLLM has kernels for
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        rope_scaling=None,
        topk_method="noaux_tc",  # read by vLLM; transformers knows no other
        scoring_func="sigmoid",
    )
    return save_model(DeepseekV3ForCausalLM(config).to(torch.bfloat16), folder)


def test_an_mla_teacher_with_experts(tmp_path: Path) -> None:
    model = deepseek(tmp_path / "model")
    tokens = make_tokens(tmp_path / "tokens", [(64,), (30, 34), (10, 54), (1, 63)], vocab_size=512, row_length=64)
    teacher = {"model": str(model), "dtype": "bfloat16"}
    found = told(tmp_path, teacher, tokens, rows=4, k=32)
    truth, rounded = (by_hf(teacher, tokens, rows=4, k=32, dtype=dtype) for dtype in ("float32", "bfloat16"))
    labels = (found["label_logprob"], rounded.label_logprob.numpy())
    errors = [float(np.abs(one - truth.label_logprob.numpy()).mean()) for one in labels]
    assert errors[0] <= 2 * errors[1] and errors[0] < 0.1


def test_a_whole_dump_is_that_of_engine_hf(shared_data: Path, tmp_path: Path) -> None:
    """By the command, documents of every length; the store has no entropies, and says what made it."""
    model = shared_data / "models" / "teacher-7m"
    rows = [(512,), (100, 412), (1, 30, 481), (2, 510), (512,)]
    tokens = make_tokens(tmp_path / "tokens", rows, vocab_size=8192, row_length=512)
    for engine in ("hf", "vllm_logprobs"):
        teacher = {"model": str(model), "engine": engine, "dtype": "float32", "check_tokenizer": False}
        sets = [f"teacher.{key}={json.dumps(value)}" for key, value in teacher.items()]
        sets += ["entropy=false", "selection.mode=top_k", "selection.k=32"]
        words = ["--tokens", str(tokens), "--output", str(tmp_path / engine)]
        run("-m", "potstill.launch", "dump", *words, *(word for one in sets for word in ("--set", one)))
    own, hf = StoreReader(tmp_path / "vllm_logprobs"), StoreReader(tmp_path / "hf")
    assert own.spec.teacher is not None and own.spec.teacher["engine_pins"]["head_dtype"] == "float32"
    assert own.spec.stats == hf.spec.stats and "mean_entropy" not in own.spec.stats
    for a, b in zip(own.rows(range(5)), hf.rows(range(5)), strict=True):
        assert isinstance(a, TargetsRow) and isinstance(b, TargetsRow)
        assert np.array_equal(a.targets.offsets, b.targets.offsets) and a.targets.entropy is None
        assert (a.targets.ids != b.targets.ids).mean() < 0.002
        for name in ("log_tail", "label_logprob"):
            assert np.abs(getattr(a.targets, name) - getattr(b.targets, name)).max() <= 1 / 16
