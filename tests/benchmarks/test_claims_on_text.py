"""The claims on the novels: what their arms are, which rows stand in which quarter, what the table of ends says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from benchmarks.claims import pd, pruned, salt
from benchmarks.claims.base import SCALES, Arm, Bench, Claim, Outcome, Scale
from benchmarks.claims.ends import ends_table, taught_steps
from benchmarks.claims.runs import Run, Runs
from benchmarks.claims.text import Text
from potstill.kernels.loss import sparse_loss
from potstill.storage import StoreReader
from tests.kernels.reference import make_targets
from tests.student_train.tiny import write_all


def _bench(tmp_path: Path, scale: Scale = "cpu") -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path / "data", scale=scale, seeds=(1, 2))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all(tmp_path_factory.mktemp("stores"))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("claim", [salt.CLAIM, pd.CLAIM, pruned.CLAIM], ids=lambda claim: claim.name)
def test_arms_are_configurations_that_share_their_schedule(claim: Claim, scale: Scale, tmp_path: Path) -> None:
    bench = _bench(tmp_path, scale)
    arms = claim.arms(bench)
    folders = {Run(bench=bench, arm=arm, seed=1).folder for arm in arms.values()}  # each builds the configuration
    assert len(folders) == len(arms)
    shared = {json.dumps([arm.config[key] for key in ("schedule", "optimizer")]) for arm in arms.values()}
    assert len(shared) == 1


def _finished(run: Run, losses: list[float]) -> None:
    run.folder.mkdir(parents=True)
    lines = [
        {"kind": "eval", "step": 10 * (place + 1), "heldout_loss": loss, "runtime_seconds": 2.0 * (place + 1)}
        for place, loss in enumerate(losses)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_ends_stand_beside_their_price(tmp_path: Path, stores: dict[str, Path]) -> None:
    bench = _bench(tmp_path)
    data = {"tokens": str(stores["tokens"]), "global_batch_rows": 2}
    taught = {**data, "targets": {"teacher": str(stores["teacher"])}}
    stages = [{"until": 0.25, "targets": "teacher"}, {"until": 15}, {"targets": "teacher"}]
    model = {"config": {"model_type": "llama", "hidden_size": 8}}
    common = {"run": {"name": "claim", "max_steps": 20}, "model": model}
    arms = {
        "labels": Arm(config={**common, "data": data, "curriculum": [{}]}),
        "kd": Arm(config={**common, "data": taught, "curriculum": stages}),
    }
    assert taught_steps(arms["labels"]) == 0
    assert taught_steps(arms["kd"]) == 5 + 5
    runs = Runs(bench, arms)
    for seed, shift in ((1, 0.0), (2, 0.5)):
        _finished(runs.run("labels", seed), [3.0, 2.5])
        _finished(runs.run("kd", seed), [2.4 + shift, 2.0 + shift])
    labels, kd = ends_table("ends", runs, dict.fromkeys(arms, "labels")).rows
    assert labels == ("labels", "2.5000 ± 0.0000", "", "20", "4 ± 0", "0.000")
    assert kd[:4] == ("kd", "2.2500 ± 0.3536", "0.2500 ± 0.3536", "15")
    teacher = stores["teacher"]
    size = sum(path.stat().st_size for path in teacher.rglob("*") if path.is_file())
    assert kd[5] == f"{10 * 2 * size / StoreReader(teacher).num_rows / 1e6:.3f}"


def test_quarters_hold_the_held_out_rows_from_easy_to_hard(tmp_path: Path, stores: dict[str, Path]) -> None:
    text = Text(_bench(tmp_path, "quick"))
    for place, made in ((text.heldout, "tokens"), (text.heldout_scores("small"), "scores")):
        place.parent.mkdir(parents=True)
        place.symlink_to(stores[made])
    assert [job.name for job in salt.quarter_jobs(text)] == [f"quarter-{name}" for name in salt.QUARTERS]
    losses = StoreReader(stores["scores"]).row_stats["mean_loss"]
    places = {
        tuple(row.tokens.tolist()): loss
        for row, loss in zip(StoreReader(stores["tokens"]).tokens_rows(range(len(losses))), losses, strict=True)
    }
    parts = []
    for name in salt.QUARTERS:
        lines = (text.folder / "quarters" / f"{name}.jsonl").read_text().splitlines()
        parts.append([places.pop(tuple(json.loads(line)["input_ids"])) for line in lines])
    assert not places
    for easier, harder in itertools.pairwise(parts):
        assert max(easier) <= min(harder)


def test_nll_and_kld_of_a_fixed_target_have_the_same_gradient() -> None:
    """Why the claim pd has no arm for NLL: the cross-entropy with the teacher differs from KLD by a constant."""
    targets = make_targets(5, 40, [6])
    assert targets.logprobs is not None and targets.log_tail is not None
    logits = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = logits.clone().requires_grad_()
    kld, _ = sparse_loss(logits=ours, targets=targets, labels=torch.zeros(5, dtype=torch.int64), alpha=1.0)
    kld.backward()
    nll_logits = logits.clone().requires_grad_()
    log_q = nll_logits.log_softmax(1)
    kept = torch.zeros(5, 40, dtype=torch.bool).scatter_(1, targets.ids.view(5, 6).long(), True)
    log_rest = log_q.masked_fill(kept, -torch.inf).logsumexp(1, keepdim=True)
    log_p = torch.cat([targets.logprobs.view(5, 6), targets.log_tail.view(5, 1)], dim=1).double().log_softmax(1)
    nll = -(log_p.exp() * torch.cat([log_q.gather(1, targets.ids.view(5, 6).long()), log_rest], dim=1)).sum() / 5
    nll.backward()
    entropy = -(log_p.exp() * log_p).sum() / 5
    assert float((nll - kld).detach()) == pytest.approx(float(entropy), rel=1e-5)
    torch.testing.assert_close(ours.grad, nll_logits.grad, rtol=1e-5, atol=1e-6)


def _made_up(claim: Claim, tmp_path: Path, store: Path, ends: dict[str, float], easy_gain: float) -> Outcome:
    """What a claim finds in runs of two seeds that end at these losses (1.0 where none is given)."""
    bench = _bench(tmp_path)
    text = Text(bench)
    for name in ("small", "teacher"):
        done = text.folder / "runs" / name / "done.json"
        done.parent.mkdir(parents=True)
        done.write_text(json.dumps({"heldout": {"heldout_loss": 0.5}}))
    for name in ("small", "teacher"):
        text.targets(name).parent.mkdir(exist_ok=True)
        text.targets(name).symlink_to(store)
    runs = Runs(bench, claim.arms(bench))
    for arm in runs.arms:
        for seed in bench.seeds:
            lines = []
            for step in (50, 150, 500):
                loss = ends.get(arm, 1.0) + 0.001 * seed + (0.5 if step < 500 else 0.0)
                gain = 0.0 if arm == "labels" else easy_gain
                sources = {name: {"heldout_loss": loss - gain * (name == "easy")} for name in salt.QUARTERS}
                lines.append({"step": step, "heldout_loss": loss, "runtime_seconds": 9.0, "sources": sources})
            folder = runs.run(arm, seed).folder
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text(
                "".join(json.dumps({"kind": "eval", **line}) + "\n" for line in lines)
            )
    return claim.judge(bench, runs)


SALT_HOLDS = {"labels": 1.0, "salt_34": 0.9, "salt_34_in_90": 0.95, "kd": 1.1}
PD_HOLDS = {"constant_1": 0.9, "wsd": 0.8, "mse_probs": 1.3, "wsd_wide": 0.7, "wsd_narrow": 0.95}


@pytest.mark.parametrize(
    ("claim", "ends", "changed", "easy_gain", "broken"),
    [
        (salt.CLAIM, SALT_HOLDS, {}, 0.1, None),
        (salt.CLAIM, SALT_HOLDS, {"salt_34_in_90": 1.01}, 0.1, "in 90 % of the steps"),
        (salt.CLAIM, SALT_HOLDS, {"kd": 0.85}, 0.1, "below KD throughout"),
        (salt.CLAIM, SALT_HOLDS, {}, -0.1, "easy quarter"),
        (pd.CLAIM, PD_HOLDS, {}, 0.0, None),
        (pd.CLAIM, PD_HOLDS, {"wsd": 0.91}, 0.0, "at or below constant"),
        (pd.CLAIM, PD_HOLDS, {"mse_probs": 0.99}, 0.0, "MSE of probabilities"),
        (pd.CLAIM, PD_HOLDS, {"wsd_wide": 0.97}, 0.0, "wide student gains more than the narrow"),
    ],
)
def test_each_rule_decides(
    claim: Claim,
    ends: dict[str, float],
    changed: dict[str, float],
    easy_gain: float,
    broken: str | None,
    tmp_path: Path,
    stores: dict[str, Path],
) -> None:
    outcome = _made_up(claim, tmp_path, stores["teacher"], ends | changed, easy_gain)
    failed = [finding.text for finding in outcome.findings if finding.rule and not finding.passed]
    assert outcome.passed == (broken is None)
    assert all(broken is not None and broken in text for text in failed) and len(failed) == (broken is not None)
    assert len(outcome.tables[0].rows) == len(claim.arms(_bench(tmp_path)))
