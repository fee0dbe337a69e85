"""Where k stops a prefix below p: counted as a full distribution says, and told in the dump, its summary and stats."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.launch.cli import main
from potstill.storage import StoreReader, TargetsRow, store_stats
from potstill.teacher_dump import DumpConfig, ScoreConfig, dump, score
from potstill.teacher_dump.dumping import DumpJob
from tests.teacher_dump.tiny import VOCAB

K, P = 8, 0.8


def config(tokens: Path, output: Path, model: Path, **selection: Any) -> DumpConfig:
    teacher = {"model": model, "check_tokenizer": False, "batch_rows": 2}
    return DumpConfig(tokens=tokens, output=output, teacher=teacher, selection=selection)


@pytest.fixture(scope="module")
def truth(tokens: Path, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    """Share of positions whose K best hold less than P, and the mean mass kept, from the whole distributions."""
    store = tmp_path_factory.mktemp("whole") / "targets"
    dump(config(tokens, store, llama, mode="top_k", k=VOCAB))
    reader = StoreReader(store)
    bound, kept = [], []
    for row in reader.rows(range(reader.num_rows)):
        assert isinstance(row, TargetsRow)
        offsets, probabilities = row.targets.offsets, np.exp(row.targets.logprobs.astype(np.float64))
        for start, stop in itertools.pairwise(offsets):
            if stop > start:
                mass = np.cumsum(np.sort(probabilities[start:stop])[::-1])[:K]
                reached = np.flatnonzero(mass >= P)
                bound.append(not len(reached))
                kept.append(mass[reached[0]] if len(reached) else mass[-1])
    return float(np.mean(bound)), float(np.mean(kept))


def test_the_summary_the_warning_and_stats_tell_the_share(
    tokens: Path, llama: Path, tmp_path: Path, truth: tuple[float, float], caplog: pytest.LogCaptureFixture
) -> None:
    share, kept = truth
    assert 0.25 < share < 1  # or the test would say nothing
    with caplog.at_level(logging.WARNING, logger="potstill"):
        summary = dump(config(tokens, tmp_path / "out", llama, k=K, p=P))
    assert summary.k_bound is not None  # type: ignore[union-attr]
    # Values of the whole store are on a grid of 1/16 nat: a position near P may fall on the other side.
    assert summary.k_bound.share == pytest.approx(share, abs=0.06)  # type: ignore[union-attr]
    assert summary.k_bound.kept_mass == pytest.approx(kept, abs=0.03)  # type: ignore[union-attr]
    (warning,) = [record.getMessage() for record in caplog.records if "after the first unit" in record.getMessage()]
    assert "p = 0.8 was asked" in warning and "k = 8 ends" in warning and "B/token; raise k (255 at most" in warning
    manifest = StoreReader(tmp_path / "out").manifest
    text = summary.format()
    assert f"{summary.k_bound.share:.1%} of positions" in text  # type: ignore[union-attr]
    assert f"{manifest.num_bytes / manifest.num_tokens:.1f} B/token; raise k" in text
    stats = store_stats(tmp_path / "out")
    assert stats.k_bound is not None and stats.k_bound.share == pytest.approx(share, abs=0.06)
    assert "raise k" in stats.format()


@pytest.mark.parametrize("selection", [{"k": VOCAB, "p": 0.9}, {"mode": "top_k", "k": K}, {"mode": "sample"}])
def test_nothing_is_said_where_k_does_not_bind(
    selection: dict[str, Any], tokens: Path, llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="potstill"):
        summary = dump(config(tokens, tmp_path / "out", llama, **selection))
    assert "after the first unit" not in caplog.text and "raise k" not in summary.format()
    assert "B/token" in summary.format()
    stats = store_stats(tmp_path / "out")
    assert "raise k" not in stats.format()
    if selection.get("mode") is None:
        assert summary.k_bound is not None and summary.k_bound.share == 0  # type: ignore[union-attr]


def test_records_hold_what_they_held_before(tokens: Path, llama: Path, tmp_path: Path) -> None:
    from potstill.storage import StoreWriter

    dump(config(tokens, tmp_path / "out", llama, k=K, p=P))
    records = StoreWriter.create(tmp_path / "out", StoreReader(tmp_path / "out").spec).committed()
    assert all(set(record.extra["figures"]) == {"excluded_mass", "positions"} for record in records.values())


def test_dump_and_score_make_the_folders_above_their_output(tokens: Path, llama: Path, tmp_path: Path) -> None:
    assert dump(config(tokens, tmp_path / "a" / "b" / "t", llama)).sealed  # type: ignore[union-attr]
    settings = ScoreConfig(
        tokens=tokens, output=tmp_path / "c" / "d" / "s", model={"model": llama, "check_tokenizer": False}
    )
    assert score(settings).sealed


PATHS = [
    ("--tokens {tokens} --{model} {llama} --output {tmp}/notes", "holds other files (a.txt)"),
    ("--tokens {tokens} --{model} {llama} --output {tmp}/notes/a.txt", "is a file, expected a folder"),
    ("--tokens {tokens} --{model} {llama} --output {tokens}", "is the tokens store itself"),
    ("--tokens {tokens} --{model} {llama} --output {tokens} --force", "is the tokens store itself"),
    ("--tokens {tmp}/nope --{model} {llama} --output {tmp}/o", "does not exist"),
    ("--tokens {tokens} --{model} {tmp}/nope --output {tmp}/o", "this folder does not exist"),
    ("--tokens {tokens} --{model} {tmp}/notes --output {tmp}/o", "holds none of config.json"),
]


@pytest.mark.parametrize(("words", "message"), PATHS)
@pytest.mark.parametrize(("command", "model"), [("dump", "teacher"), ("score", "slm")])
def test_paths_are_refused_before_the_stage_is_imported(
    command: str,
    model: str,
    words: str,
    message: str,
    tokens: Path,
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    before = StoreReader(tokens).digest

    def imported() -> None:
        raise AssertionError("the stage was reached")

    # The modules that import torch: reaching for their function is an error here.
    monkeypatch.setattr("potstill.teacher_dump.dumping.dump", imported)
    monkeypatch.setattr("potstill.teacher_dump.scoring.score", imported)
    filled = words.format(tokens=tokens, llama=llama, tmp=tmp_path, model=model)
    assert main([command, *filled.split()]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert StoreReader(tokens).digest == before and not (tmp_path / "o").exists()


def test_what_looks_early_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, potstill.teacher_dump.early, potstill.teacher_dump.preparing\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    path = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_score_runs_one_model(tokens: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="score runs one model"):
        ScoreConfig(tokens=tokens, output=tmp_path / "o", model={"model": llama, "checkpoints": ["a"]})


def test_the_limit_of_k_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dump", "--help"])
    assert capsys.readouterr().out.count("Entries per token at most, 1 to 255") == 2  # the flag's, and the key's


@pytest.mark.parametrize("engine", ["hf", "vllm_logprobs"])
def test_draws_are_advised_where_the_engine_can_make_them(engine: str) -> None:
    teacher = {"model": "m", "engine": engine}
    settings = DumpConfig(tokens="t", output="o", teacher=teacher, entropy=False, selection={"k": K, "p": P})
    bound = DumpJob(settings).k_bound({"positions": 4.0, "k_bound": 3.0, "kept_mass": 2.0})
    assert bound is not None and bound.much
    advice = bound.describe(None)
    assert "raise k (255 at most" in advice and "lower p to what k can reach" in advice
    assert ("mode sample" in advice) == (engine == "hf")
