"""A Megatron corpus and DistillKit's targets, both as their own writers left them, train one student."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from potstill.storage import StoreReader
from potstill.student_train.run.metrics import read_metrics
from potstill.teacher_dump import DumpConfig, dump
from potstill.teacher_dump.importing.targets import ImportTargetsConfig, import_targets
from potstill.teacher_dump.importing.tokens import import_tokens
from potstill.teacher_dump.importing.tokens_config import ImportTokensConfig
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


def test_foreign_tokens_and_foreign_targets_train_a_student(shared_data: Path, tmp_path: Path) -> None:
    foreign, tokenizer = shared_data / "foreign", str(shared_data / "tokenizers" / "demo-bpe-8k")
    import_targets(
        ImportTargetsConfig(
            input=[str(foreign / "distillkit" / "recommended")],
            output=tmp_path / "distillkit",
            teacher="teacher-7m",
            tokenizer=tokenizer,
        )
    )
    row_length = StoreReader(tmp_path / "distillkit" / "tokens").spec.row_length
    import_tokens(
        ImportTokensConfig(
            input=[str(foreign / "megatron_indexed" / "novels_uint16")],
            output=tmp_path / "megatron",
            tokenizer=tokenizer,
            row_length=row_length,
        )
    )
    with np.load(foreign / "megatron_indexed" / "truth.npz") as truth:
        assert StoreReader(tmp_path / "megatron" / "train").num_tokens == len(truth["tokens"])
    dump(
        DumpConfig(
            tokens=str(tmp_path / "megatron" / "train"),
            output=str(tmp_path / "megatron_targets"),
            teacher={"model": str(shared_data / "models" / "slm-2m")},
        )
    )
    # The tree of the tiny stores, whose data are replaced.
    places = dict.fromkeys(("tokens", "heldout", "heldout_teacher", "teacher", "scores"), tmp_path)
    tree = tiny.config_tree(places, tmp_path / "run")
    tree["model"]["config"]["max_position_embeddings"] = row_length
    tree["run"] |= {"max_steps": 12}
    tree["optimizer"] = {"lr": 1e-2}
    tree["data"] = {
        "sources": {
            "distillkit": {
                "tokens": str(tmp_path / "distillkit" / "tokens"),
                "targets": {"teacher": str(tmp_path / "distillkit" / "targets")},
            },
            "megatron": {
                "tokens": str(tmp_path / "megatron" / "train"),
                "targets": {"teacher": str(tmp_path / "megatron_targets")},
            },
        },
        "global_batch_rows": 8,
        "micro_batch_rows": 8,
    }
    tree["curriculum"] = [{"mix": {"distillkit": 0.5, "megatron": 0.5}, "targets": "teacher"}]
    run_ranks(workers.train_run, tree, world=1)
    lines = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "train"]
    for name in ("distillkit", "megatron"):
        kd = [line["sources"][name]["kd"] for line in lines]
        # Both teachers teach: from a student that knows nothing, the divergence falls in both sources.
        assert np.isfinite(kd).all() and kd[-1] < kd[0] - 0.3, (name, kd)
