"""Every command of docs/cluster/ray.md, as it stands there, from rows and a teacher to targets and a student."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from potstill.storage import StoreReader
from tests.clusters.pages import blocks, commands
from tests.clusters.ray_cluster import end_of, ray_folder, started
from tests.student_train import tiny as students
from tests.teacher_dump.tiny import make_tokens, save_llama

pytest.importorskip("ray")


def student_tree() -> dict[str, object]:
    return {
        "run": {"output_dir": "run", "max_steps": 6, "num_threads": 1},
        "model": {"config": dict(students.STUDENT)},
        "data": {
            "tokens": "data/train",
            "targets": {"teacher": "data/targets"},
            "global_batch_rows": 4,
            "micro_batch_rows": 2,
        },
        "curriculum": [{"targets": "teacher"}],
        "logging": {"every_steps": 1},
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_the_page_says_works(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    make_tokens(tmp_path / "data/train", [(16,), (9, 7)] * 10)
    save_llama(tmp_path / "models/teacher")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(student_tree()))
    (script,) = blocks("ray", "python")
    (tmp_path / "fit.py").write_text(script.text)
    first, *others = commands("ray")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with ray_folder() as environment:
        environment["PATH"] = path
        with started(["bash", "-ec", first], environment, tmp_path) as shell:
            code, text = end_of(shell, tmp_path, seconds=300)
        assert code == 0, text[-3000:]
        digest = StoreReader(tmp_path / "data/targets").digest
        (tmp_path / "data/targets").rename(tmp_path / "data/alone")
        # The student too: the cluster that RAY_ADDRESS names is there for it.
        lines = "\n".join([*others, f"{sys.executable} fit.py"])
        with started(["bash", "-ec", lines], environment, tmp_path) as shell:
            code, text = end_of(shell, tmp_path, seconds=600)
    assert code == 0, text[-3000:]
    assert StoreReader(tmp_path / "data/targets").digest == digest
    assert f"done 6 {tmp_path}/run/checkpoints/step_00000006" in text
