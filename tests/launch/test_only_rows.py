"""`potstill dump --only-rows-of RUN.yaml`: a checkpoint's store holds what the run reads of it, and no more."""

from __future__ import annotations

from pathlib import Path

import yaml

from potstill.launch.cli import main
from potstill.storage import StoreReader, held_rows
from tests.teacher_dump.tiny import VOCAB, make_tokens, save_llama


def test_checkpoints_are_dumped_for_the_rows_of_their_stages(tmp_path: Path, capsys) -> None:
    make_tokens(tmp_path / "tokens", [(16,)] * 24)
    for seed, name in enumerate(("early", "late")):
        save_llama(tmp_path / "teacher" / name, seed=seed)
    student = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    run = {
        "run": {"output_dir": str(tmp_path / "run"), "max_steps": 4},
        "model": {"config": {**student, "num_attention_heads": 2, "num_key_value_heads": 2}},
        "data": {
            "tokens": str(tmp_path / "tokens"),
            "targets": {name: str(tmp_path / "series" / name) for name in ("early", "late")},
            "global_batch_rows": 4,
        },
        "curriculum": [{"until": 1, "targets": "early"}, {"targets": "late"}],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    words = ["dump", "--tokens", str(tmp_path / "tokens"), "--teacher", str(tmp_path / "teacher")]
    words += ["--output", str(tmp_path / "series"), "--k", "8"]
    words += ["--set", "teacher.checkpoints=[early, late]", "teacher.check_tokenizer=false"]
    assert main([*words, "--only-rows-of", str(tmp_path / "run.yaml")]) == 0
    held = {name: held_rows(StoreReader(tmp_path / "series" / name)) for name in ("early", "late")}
    assert len(held["early"]) == 4 and len(held["late"]) == 12 and not set(held["early"]) & set(held["late"])
    assert StoreReader(tmp_path / "series" / "early").vocab_size == VOCAB
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 0
    run["run"]["max_steps"] = 5
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--dry-run"]) == 1
    assert "store 'late': the run reads 4 rows that it lacks" in capsys.readouterr().err
    assert main([*words, "--as", "early"]) == 1 and "--only-rows-of" in capsys.readouterr().err
