"""The claim `pruned`: what it asks `prune` for, and what it makes of finished runs."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.claims import pruned
from benchmarks.claims.base import Bench
from benchmarks.claims.runs import Runs
from benchmarks.claims.text import Text
from potstill.common.options import read_config
from potstill.launch import cli
from potstill.student_train.config.prune import PruneConfig
from tests.student_train.tiny import write_all

SEEDS = (1, 2, 3)


def bench_of(tmp_path: Path) -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path, scale="cpu", seeds=SEEDS)


def test_both_cuts_are_half_of_the_teacher(tmp_path: Path) -> None:
    text = Text(bench_of(tmp_path))
    teacher = text.size.teacher.shape
    asked = {}
    for cut in pruned.CUTS:
        words = pruned.prune_job(text, cut).command[1:]
        asked[cut] = read_config(PruneConfig, cli.parse(words))
        assert asked[cut].output_dir == text.model(f"pruned-{cut}") and not asked[cut].check
    assert (asked["width"].hidden_size, asked["width"].num_layers) == (teacher.hidden // 2, teacher.layers)
    assert (asked["depth"].hidden_size, asked["depth"].num_layers) == (teacher.hidden, teacher.layers // 2)
    models = {name: arm.config["model"] for name, arm in pruned.arms(bench_of(tmp_path)).items()}
    for cut in pruned.CUTS:
        assert models[f"pruned {cut}, KD"] == {"path": str(text.model(f"pruned-{cut}"))}
        random = models[f"random {cut}, KD"]["config"]
        assert random["num_attention_heads"] == asked[cut].num_heads
        assert random["intermediate_size"] == asked[cut].intermediate_size
        assert random["hidden_size"] // random["num_attention_heads"] == teacher.hidden // (teacher.hidden // 32)


def test_the_verdict_is_of_four_pairs(tmp_path: Path) -> None:
    bench = bench_of(tmp_path)
    text, stores = Text(bench), write_all(tmp_path / "stores")
    for place, made in ((text.tokens, "tokens"), (text.targets(pruned.TEACHER), "teacher")):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(stores[made])
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "num_parameters": 1000, "loss": 6.5}
    for cut in pruned.CUTS:
        folder = text.model(f"pruned-{cut}")
        folder.mkdir(parents=True)
        (folder / "potstill_prune.json").write_text(json.dumps({"whole": sizes, "pruned": {**sizes, "loss": 7.25}}))
    ends = {"pruned width, KD": 3.0, "pruned width, labels": 3.2, "pruned depth, KD": 3.1, "pruned depth, labels": 3.1}
    runs = Runs(bench, pruned.arms(bench))
    for name in runs.arms:
        for seed in SEEDS:
            folder = runs.run(name, seed).folder
            folder.mkdir(parents=True)
            end = ends.get(name, 3.5) + seed / 1000 + (0.01 if name == "pruned depth, KD" and seed == 2 else 0)
            lines = [
                {"kind": "eval", "step": step, "tokens": 8 * step, "heldout_loss": loss, "runtime_seconds": step}
                for step, loss in ((10, 3.45 if name in ends else 5.0), (20, end))
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    outcome = pruned.judge(bench, runs)
    rules = {finding.text: finding.passed for finding in outcome.findings if finding.rule}
    assert rules == {
        "KD from weights pruned by width ends below KD from random ones": True,
        "KD from weights pruned by width ends below labels from the same": True,
        "KD from weights pruned by depth ends below KD from random ones": True,
        "KD from weights pruned by depth ends below labels from the same": False,
    }
    assert not outcome.passed
    at_equal_tokens, price, cuts = outcome.tables
    assert at_equal_tokens.rows[0] == ("pruned width, KD", "3.0020 ± 0.0010", "10/10/10")
    assert at_equal_tokens.rows[2][2] == "20/20/20", "random width, KD comes to its own end at its end"
    assert price.rows[1][-1] == "0.000" and price.rows[0][-1] != "0.000"
    assert cuts.rows[1] == ("pruned by width", "2 x 64, 2 heads", "1,000", "7.2500")
    assert [plot.name for plot in outcome.plots] == ["width", "depth"] and len(outcome.plots[0].curves) == 4
