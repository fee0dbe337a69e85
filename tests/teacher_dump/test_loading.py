"""Ways to load a teacher: compiled, quantised, and with weights that are not all there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.common.errors import UserError
from potstill.storage import verify_store
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.batches import packed_batch
from potstill.teacher_dump.config import TeacherConfig
from potstill.teacher_dump.engines.loading import load_engine
from tests.teacher_dump.tiny import ROW_LENGTH, save_llama, token_rows

# Quantisations that transformers knows, and the package that each needs and that is not among our dependencies.
PACKAGES = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
    "torchao": ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "torchao"),
    "hqq": ({"quant_method": "hqq", "nbits": 4}, "hqq"),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler; there is no g++")
def test_a_compiled_teacher_gives_what_the_plain_one_gives(
    llama: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    rows = token_rows(tokens)
    plain = load_engine(TeacherConfig(model=llama, attention="eager"))
    compiled = load_engine(TeacherConfig(model=llama, attention="eager", compile=True))
    torch._dynamo.utils.counters.clear()
    for part in (rows, rows[:2]):  # the last batch of a unit may be smaller
        batch = packed_batch(part, length=ROW_LENGTH)
        found, expected = compiled.forward(batch).hidden, plain.forward(batch).hidden
        assert found is not None and expected is not None
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5 * float(expected.abs().max()))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"


def test_a_quantised_teacher_runs(tokens: Path, tmp_path: Path) -> None:
    """BitNet's ternary weights: the one quantisation of transformers that runs on a CPU without another package."""
    folder = save_llama(tmp_path / "model", sharpen=4.0)
    plain = load_engine(TeacherConfig(model=folder))
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with torch.compiler.set_stance("force_eager"):  # its layers ask for a C++ compiler's minute
        engine = load_engine(TeacherConfig(model=folder))
        names = {type(module).__name__ for module in engine.model.modules()}  # type: ignore[attr-defined]
        assert "AutoBitLinear" in names and engine.head is not None
        batch = packed_batch(token_rows(tokens), length=ROW_LENGTH)
        found, full = engine.forward(batch).hidden, plain.forward(batch).hidden
        assert found is not None and full is not None and not torch.allclose(found, full, rtol=0.05, atol=0.05)
        teacher = {"model": folder, "check_tokenizer": False}
        done = dump(DumpConfig(tokens=tokens, output=tmp_path / "out", teacher=teacher))
    assert done.sealed  # type: ignore[union-attr]
    assert verify_store(tmp_path / "out", deep=True).ok


@pytest.mark.parametrize("name", PACKAGES)
def test_a_quantisation_reaches_transformers_as_it_is(name: str, llama: Path) -> None:
    """Where its package is missing, the error is transformers' own, which names it."""
    settings, package = PACKAGES[name]
    given = json.loads(json.dumps(settings))
    config = TeacherConfig(model=llama, load_options={"quantization_config": given})
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(UserError, match=rf"(?i)cannot be loaded: .*{package}"):
            load_engine(config)
    else:
        pytest.skip(f"{package} is installed: this test is about its absence")
    assert config.load_options == {"quantization_config": settings}


def test_a_teacher_with_missing_weights_is_refused(tmp_path: Path) -> None:
    """transformers would go on with random numbers in their place."""
    from safetensors.torch import load_file, save_file

    folder = save_llama(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its weights are not in the checkpoint \(model\.layers\.1\.mlp\.up_proj"):
        load_engine(TeacherConfig(model=folder))
