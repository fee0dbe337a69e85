"""A claim from its stores to its page: jobs, runs in warm children, evals, judgement, and nothing done twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.claims import report, runs
from benchmarks.claims.__main__ import run_claim
from benchmarks.claims.base import Arm, Bench, Claim, Outcome, Plot
from benchmarks.claims.paired import compare
from benchmarks.claims.runs import Runs
from potstill.common.errors import UserError
from potstill.common.jobs import Job
from tests.student_train.tiny import config_tree, write_all


def test_a_claim_runs_once_and_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
        monkeypatch.setenv(name, value)  # the runner sets them; they are as before after the test
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(report, "CLAIMS", ("tiny",))
    monkeypatch.setattr(report, "head", lambda name: "What it is.")
    stores = write_all(tmp_path / "stores")

    def build(bench: Bench) -> Iterator[list[Job]]:
        marker = bench.folder("tiny") / "verified"
        words = ("potstill", "verify", str(stores["tokens"]))
        yield [Job(name="verify", command=words, is_done=marker.is_file, marker=marker)]
        assert marker.is_file()  # what stands behind a `yield` finds its jobs done

    def arms(bench: Bench) -> dict[str, Arm]:
        def arm(**objective: float) -> Arm:
            tree = config_tree(stores, tmp_path / "none", objective=objective, curriculum=[{"targets": "teacher"}])
            tree["run"] = {"name": "tiny", "max_steps": 2}
            tree["eval"] = {"every_steps": 1, "max_rows": 2}
            return Arm(config=tree, evals={"again": ("--heldout", str(stores["heldout"]), "--max-rows", "2")})

        return {"kd": arm(alpha=1.0), "labels": arm(alpha=0.0)}

    def judge(bench: Bench, runs: Runs) -> Outcome:
        # `potstill eval` of a finished run says what the run said of the same rows at its end
        ends = [found["heldout_loss"] for found in runs.evaluated("kd", "again")]
        assert ends == pytest.approx(runs.final("kd"), rel=1e-6)
        assert [len(curve) for curve in runs.curves("kd")] == [2, 2]
        plot = Plot(name="loss", title="loss", x="step", y="nats", curves={"kd": runs.curves("kd")})
        return Outcome(findings=(compare("kd ahead", runs.final("kd"), runs.final("labels")),), plots=(plot,))

    claim = Claim(name="tiny", title="KD helps", build=build, arms=arms, judge=judge, needs=("text",))
    bench = Bench(work=tmp_path / "work", data=tmp_path / "data", scale="quick", seeds=(1, 2))
    output = tmp_path / "results"

    def run() -> dict[str, object]:
        return run_claim(claim, bench, parallel=2, any_source=False, output=output)

    with pytest.raises(UserError, match=r"claim tiny reads .*text, which is not there; name its parent with --data"):
        run()
    (bench.data / "text").mkdir(parents=True)
    first = run()
    assert len(list((bench.work / "runs").glob("*/done.json"))) == 4
    capsys.readouterr()
    again = run()
    assert " $ potstill" not in capsys.readouterr().out  # nothing was run a second time
    assert again == first
    assert first["made_with"] and first["seeds"] == [1, 2]
    kept = json.loads((output / "claims.json").read_text())["tiny"]
    assert (kept["effect"], kept["pass"]) == (first["effect"], first["pass"])
    assert "KD helps" in (output / "claims.md").read_text()
    assert (output / "claims" / "tiny_loss.svg").is_file()


def test_a_store_of_another_command_line_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed size of a setting, or shape of a model, does not go with what was built before."""
    monkeypatch.setattr(runs, "run_jobs", lambda jobs, work, parallel: None)  # all are done, or told to be
    bench = Bench(work=tmp_path / "work", data=tmp_path / "data", scale="quick", seeds=(1, 2))
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_text("64 wide")
    done = False

    def train(steps: int) -> None:
        words = ("potstill", "train", "--steps", str(steps), "--model-config", str(tmp_path / "shape"))
        runs.run_setting([Job(name="train-small", command=words, is_done=lambda: done)], bench, 1)

    train(500)
    train(600)  # not done yet: it may still change
    done = True
    train(600)
    with pytest.raises(UserError, match=r"train-small: what stands below .* was made by another .*--steps 800"):
        train(800)
    train(600)
    (tmp_path / "shape" / "config.json").write_text("96 wide")
    with pytest.raises(UserError, match="another command line"):
        train(600)
