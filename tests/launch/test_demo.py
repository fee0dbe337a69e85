"""The demo, whole and tiny: every job runs, a killed one continues, a finished one costs nothing to repeat."""

from __future__ import annotations

import base64
import difflib
import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.launch.cli import main
from potstill.launch.demo.corpus import CorpusSummary, library_modules, write_corpus
from potstill.launch.demo.ngrams import ngram_losses, pairs
from potstill.launch.demo.noise import NOISES, add_noise, passages
from potstill.launch.demo.report import ARM_NAMES, selector_verdict, verdict
from potstill.launch.demo.run import run_demo
from potstill.launch.demo.sizes import ARMS, FULL, QUICK, DemoSize, make_jobs, student_config, student_names
from potstill.teacher_dump.split import Split

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def demo_process(folder: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "potstill.launch", "demo", "--quick", "--output", str(folder)]
    with log.open("ab") as sink:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=sink, stderr=sink, start_new_session=True)


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, f"no {text!r} after {seconds} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.05)


def children_of_the_demo(folder: Path) -> list[str]:
    """Command lines of processes that were started with the folder in their environment's current command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace")
            files = [os.readlink(link) for link in (entry / "fd").iterdir()]
        except OSError:
            continue
        if int(entry.name) != os.getpid() and any(str(folder) in name for name in [words, *files]):
            found.append(words)
    return found


@pytest.mark.timeout(420)  # some 25 s of work; the rest is patience with a busy machine
def test_killed_in_the_middle_it_goes_on_and_repeated_it_has_nothing_to_do(tmp_path: Path) -> None:
    folder, log = tmp_path / "demo folder", tmp_path / "log"  # a space in the name must not matter
    log.touch()
    first = demo_process(folder, log)
    try:
        wait_for(log, "train-teacher: done in", first, seconds=150)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        deadline = time.monotonic() + 20
        while children_of_the_demo(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert children_of_the_demo(folder) == []
        before = json.loads((folder / "runs" / "teacher" / "done.json").read_text())

        second = demo_process(folder, log)
        try:
            assert second.wait(timeout=170) == 0, log.read_text()[-3000:]
        finally:
            second.kill()
    finally:
        first.kill()
    said = log.read_text()
    assert "prepare: done before" in said
    assert "train-teacher: done before" in said
    assert json.loads((folder / "runs" / "teacher" / "done.json").read_text()) == before
    check_report(folder, said)

    began = time.monotonic()
    third = demo_process(folder, log)
    assert third.wait(timeout=30) == 0
    assert time.monotonic() - began < 10
    repeated = log.read_text()[len(said) :]
    assert "$ potstill" not in repeated
    assert repeated[repeated.index("model ") :] == said[said.index("model    ") :]


def check_report(folder: Path, said: str) -> None:
    """The table says what the files say."""

    def figures(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "eval" / f"{name}.json").read_text())
        return found

    losses = {arm: [figures(f"{arm}-{seed}")["heldout_loss"] for seed in QUICK.seeds] for arm in ARMS}
    for title, names in [
        ("teacher", ["teacher"]),
        ("slm", ["slm"]),
        *((ARM_NAMES[arm], [f"{arm}-{seed}" for seed in QUICK.seeds]) for arm in ARMS),
    ]:
        line = next(line for line in said.splitlines() if line.startswith(f"{title}  "))
        assert f"{figures(names[0])['num_parameters']:,}" in line
        assert f"{statistics.mean(figures(name)['heldout_loss'] for name in names):.4f}" in line
    assert f"± {statistics.stdev(losses['labels']):.4f}" in said
    assert verdict(losses) in said and selector_verdict(losses) in said
    # The same rows and positions as those of the references, and of the evaluations in the runs.
    ngrams = json.loads((folder / "ngrams.json").read_text())
    assert all(figures(name)["positions"] == ngrams["positions"] for name in ("teacher", *student_names(QUICK.seeds)))
    done = json.loads((folder / "runs" / "kd-2" / "done.json").read_text())
    assert done["heldout"]["heldout_loss"] == pytest.approx(figures("kd-2")["heldout_loss"], abs=1e-4)
    assert all(f"{ngrams[name]:.4f}" in said for name in ("unigram", "bigram"))
    assert len(set(losses["labels"])) == len(QUICK.seeds)  # the seeds reach the initial weights
    manifest = json.loads((folder / "targets" / "train" / "manifest.json").read_text())
    assert f"{manifest['num_bytes'] / manifest['num_tokens']:.1f} bytes/token" in said
    assert json.loads((folder / "demo.json").read_text())["noise"] == QUICK.noise
    # Each line that it tells people to go on with is understood by the command.
    from potstill.launch.cli import parse

    advice = said[said.index("Go on with:") :].splitlines()[1:]
    assert len(advice) >= 4
    for line in advice:
        assert parse(shlex.split(line)[1:])


def test_the_arms_differ_in_name_targets_and_curriculum_only(tmp_path: Path) -> None:
    labels, *others = (student_config(FULL, tmp_path, arm) for arm in ARMS)
    for other in others:
        assert labels["run"] | {"name": "", "output_dir": ""} == other["run"] | {"name": "", "output_dir": ""}
        for key in ("model", "optimizer", "schedule", "eval", "checkpoint"):
            assert labels[key] == other[key]
        assert labels["data"].items() <= other["data"].items()
        assert set(other) - set(labels) == {"objective", "curriculum"}
    kd, distilled = others
    assert kd["objective"] == distilled["objective"]
    assert "rows" not in kd["curriculum"][0] and "rows" in distilled["curriculum"][0]


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_every_job_needs_jobs_before_it_and_each_run_has_its_seed_and_name(size: DemoSize, tmp_path: Path) -> None:
    known: set[str] = set()
    for job in make_jobs(size, tmp_path):
        assert set(job.needs) <= known, job.name
        known.add(job.name)
    assert {f"train-{arm}-{seed}" for arm in ARMS for seed in size.seeds} <= known
    command = next(job.command for job in make_jobs(size, tmp_path) if job.name == "train-distilled-2")
    assert {"run.seed=2", "run.name=distilled-2", f"run.output_dir={tmp_path}/runs/distilled-2"} <= set(command)


def test_the_corpus_is_the_same_each_time_and_bounded(tmp_path: Path) -> None:
    first = write_corpus(tmp_path / "a.jsonl", max_bytes=200_000)
    assert 200_000 <= first.text_bytes < 300_000 and first.noise_characters == {}
    assert write_corpus(tmp_path / "b.jsonl", max_bytes=200_000) == first
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    documents = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(re.fullmatch(r"[\w./-]+\.py", document["id"]) and document["text"] for document in documents)
    assert all(document["noise"] == [] for document in documents)


def noisy_corpus(path: Path, share: float) -> tuple[CorpusSummary, list[dict[str, Any]]]:
    summary = write_corpus(path, max_bytes=600_000, noise=share, heldout_fraction=0.2)
    return summary, [json.loads(line) for line in path.read_text().splitlines()]


def test_noise_is_declared_reaches_the_asked_share_and_never_the_heldout_text(tmp_path: Path) -> None:
    clean, noisy = (noisy_corpus(tmp_path / f"{share}.jsonl", share) for share in (0.0, 0.5))
    assert noisy == noisy_corpus(tmp_path / "again.jsonl", 0.5)
    split = Split.by_fraction(0.2, salt="potstill")  # as `prepare` splits
    held = [[document["text"] for document in found if split.held_out(document["text"])] for _, found in (clean, noisy)]
    assert held[0] == held[1] and held[0]
    assert all(document["noise"] == [] for document in noisy[1] if split.held_out(document["text"]))
    for before, after in zip(clean[1], noisy[1], strict=True):
        at, clean_parts = 0, []
        for start, end, kind in after["noise"]:
            assert at <= start < end <= len(after["text"]) and kind in NOISES
            clean_parts.append(after["text"][at:start])
            at = end
        clean_parts.append(after["text"][at:])
        # What no span names is the module's own text, in its order.
        position = 0
        for part in clean_parts:
            position = before["text"].index(part, position) + len(part)
    characters = noisy[0].noise_characters
    assert set(characters) == set(NOISES)
    assert 0.35 < sum(characters.values()) / noisy[0].train_characters < 0.65


def test_each_kind_of_noise_is_what_it_says() -> None:
    passage = "".join(f"def name{number}(value):\n    return value + {number}\n" for number in range(100))
    made = {kind: make(passage, random.Random(3)) for kind, make in NOISES.items()}
    assert all(text != passage and 0.8 < len(text) / len(passage) < 1.3 for text in made.values())
    assert made == {kind: make(passage, random.Random(3)) for kind, make in NOISES.items()}
    assert all(len(base64.b64decode(line, validate=True)) == 57 for line in made["base64"].splitlines())
    assert sorted(made["shuffle"].split()) == sorted(passage.split())
    assert len(set(made["repeat"].splitlines())) == 1
    assert len(set(made["boilerplate"].splitlines())) <= 10
    assert all(
        re.match(r"2024-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ \[worker-", line) for line in made["log"].splitlines()
    )
    matched = difflib.SequenceMatcher(None, passage[:2000], made["ocr"][:2000], autojunk=False).ratio()
    assert 0.8 < matched < 0.97


def test_passages_are_the_text_and_no_share_leaves_it_alone() -> None:
    text = "".join(f"line {number} of a text\n" for number in range(2000))
    assert "".join(passages(text)) == text and len(passages(text)) > 5
    assert passages("") == [] and passages("short") == ["short"] and passages("x" * 9000) == ["x" * 9000]
    assert add_noise(text, share=0.0, seed=1, name="a") == (text, [])
    everything, spans = add_noise(text, share=1.0, seed=1, name="a")
    assert [spans[0].start, spans[-1].end] == [0, len(everything)]
    assert all(one.end == other.start for one, other in itertools.pairwise(spans))
    assert (
        add_noise(text, share=1.0, seed=2, name="a")
        != (everything, spans)
        != add_noise(text, share=1.0, seed=1, name="b")
    )


def test_ngram_losses_are_those_of_a_count_by_hand() -> None:
    draws = np.random.default_rng(5)
    vocab_size = 7

    def rows(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        # Token 6 is never in the training rows' documents of two: an unseen token, and an unseen one before it.
        return [(draws.integers(0, 6, 12).astype(np.int32), np.array([5, 1, 6], np.int32)) for _ in range(count)]

    train, heldout = rows(4), [*rows(3), (np.array([6, 1, 6, 2], np.int32), np.array([4], np.int32))]
    found = ngram_losses(pairs(train), pairs(heldout), vocab_size=vocab_size)

    def by_hand(packed: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[int, int]]:
        seen = []
        for tokens, lengths in packed:
            begun = 0
            for length in lengths:
                document = tokens[begun : begun + length].tolist()
                seen += list(itertools.pairwise(document))
                begun += length
        return seen

    counted = by_hand(train)
    single = {w: (sum(b == w for _, b in counted) + 1) / (len(counted) + vocab_size) for w in range(vocab_size)}
    unigram, bigram = [], []
    for before, after in by_hand(heldout):
        followers = [b for a, b in counted if a == before]
        different = len(set(followers))
        unigram.append(-math.log(single[after]))
        if followers:
            mixed = (followers.count(after) + different * single[after]) / (len(followers) + different)
            bigram.append(-math.log(mixed))
        else:
            bigram.append(-math.log(single[after]))
    assert found.positions == len(unigram) == 3 * 9 + 3
    assert found.unigram == pytest.approx(statistics.mean(unigram))
    assert found.bigram == pytest.approx(statistics.mean(bigram))
    # For every token before, the probabilities of all tokens after it sum to 1.
    for before in range(vocab_size):
        every = (np.full(vocab_size, before), np.arange(vocab_size))
        losses = [
            ngram_losses(pairs(train), (every[0][w : w + 1], every[1][w : w + 1]), vocab_size=7) for w in every[1]
        ]
        assert sum(math.exp(-loss.bigram) for loss in losses) == pytest.approx(1.0)


def test_the_verdicts_say_what_came_out() -> None:
    losses = {"labels": [3.70, 3.74, 3.72], "kd": [3.50, 3.52, 3.51], "distilled": [3.45, 3.48, 3.46]}
    assert "0.2567 ± 0.0058 nats ahead of" in verdict(losses)
    assert "worth it here? yes: plain KD minus distilled is +0.0467 ± 0.0058" in selector_verdict(losses)
    worse = {**losses, "kd": [3.40, 3.42, 3.41], "labels": [3.40, 3.42, 3.41]}
    assert "nats BEHIND" in verdict(worse)
    assert "worth it here? no:" in selector_verdict(worse)
    assert "cannot be told" in selector_verdict({**losses, "kd": [3.50, 3.47, 3.46]})


def test_a_share_of_noise_that_means_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--noise", "1.5", "--output", str(tmp_path / "demo")]) == 1
    assert "expected a share of the passages, 0 to 1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_a_library_without_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    assert list(library_modules(tmp_path / "lib")) == []
    with pytest.raises(UserError, match="no source of the standard library"):
        write_corpus(tmp_path / "c.jsonl", max_bytes=10, folder=tmp_path / "lib")
    assert list(tmp_path.glob("*.jsonl*")) == []


def test_a_folder_that_is_not_a_demo_is_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("kept")
    assert main(["demo", "--output", str(tmp_path), "--force"]) == 1
    assert "holds no demo" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "kept"


def test_another_size_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(UserError, match="demo of other sizes"):
        run_demo(tmp_path, QUICK, force=False)
