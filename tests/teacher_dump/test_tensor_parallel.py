"""Engine hf with its layers split over two gloo ranks gives what one process gives."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import ConfigError, UserError
from potstill.launch.on_ray.driver import run_on_ray
from potstill.storage import StoreReader, StoreWriter, read_spec
from potstill.teacher_dump import RolloutConfig, dump
from potstill.teacher_dump.dumping import DumpJob
from potstill.teacher_dump.engine_mix import engine_mix
from potstill.teacher_dump.work import open_work
from tests.dist_harness import Ranks, run_ranks
from tests.teacher_dump.split_ranks import dump_all, lose_rank, settings
from tests.teacher_dump.test_engine_mix import records
from tests.teacher_dump.tiny import save_llama


@pytest.mark.xdist_group("ranks")
def test_two_ranks_to_a_teacher_give_what_one_gives(tmp_path: Path, tokens: Path) -> None:
    # The second head is tied to embeddings of a number of rows that two does not divide.
    models = [
        str(save_llama(tmp_path / "untied")),
        str(save_llama(tmp_path / "tied", vocab_size=65, tie_word_embeddings=True, sharpen=1.0)),
    ]
    series, begun, stopped = (str(tmp_path / name) for name in ("series", "begun", "stopped"))
    for name in ("untied", "tied"):
        dump(settings(str(tokens), str(tmp_path / f"calm_{name}"), str(tmp_path / name), tensor_parallel=1))
    dump(settings(str(tokens), begun, models[0], tensor_parallel=1), worker=2, num_workers=3)
    first, other = run_ranks(dump_all, str(tokens), series, begun, stopped, models, world=2)

    assert first["series"] == [(3, 0, True), (3, 0, True)] and other["series"] == [(0, 0, True), (0, 0, True)]
    assert [*first["held"], *other["held"]] == pytest.approx([0.5] * 4, abs=0.05)
    assert first["distance"]["hidden"] < 5e-6 and first["distance"]["head"] == 0
    for name in ("untied", "tied"):
        _same_rows(StoreReader(tmp_path / "series" / name), StoreReader(tmp_path / f"calm_{name}"))
        assert (read_spec(tmp_path / "series" / name).teacher or {})["tensor_parallel"] == 2

    # Only the first rank's signal counts, and both say the same of it.
    assert first["stopped"] == other["stopped"]
    assert first["stopped"].startswith("StoppedError: dump: stopped by SIGUSR1 after 2 of 3 units")

    # What one process began is continued where the split teacher agrees with it, and the other way round.
    assert "did 2 units, 4 rows" in first["begun"] and "rank 1 of 2 held its part" in other["begun"]
    summary: Any = dump(settings(str(tokens), stopped, models[0], tensor_parallel=1))
    assert summary.units == 1 and summary.sealed
    assert read_spec(begun).fingerprint == read_spec(tmp_path / "calm_untied").fingerprint
    for name, made_by in (("begun", ["hf tensor_parallel=2"] * 2 + [None]), ("stopped", [None, None, "hf"])):
        _same_rows(StoreReader(tmp_path / name), StoreReader(tmp_path / "calm_untied"))
        assert [one.extra.get("engine") for one in records(tmp_path / name)] == made_by


def _same_rows(split: StoreReader, calm: StoreReader) -> None:
    for name, values in calm.row_stats.items():
        np.testing.assert_allclose(split.row_stats[name], values, rtol=1e-5)
    for number in range(calm.num_rows):
        a: Any = split.row(number).targets  # type: ignore[union-attr]
        b: Any = calm.row(number).targets  # type: ignore[union-attr]
        assert np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1 / 16 + 1e-6)


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("lost", "words"),
    [(0, "gloo/transport"), (1, "WalkEndedError: another rank has ended, or does not answer any more")],
)
def test_a_lost_rank_ends_the_other(tmp_path: Path, tokens: Path, llama: Path, lost: int, words: str) -> None:
    output = tmp_path / "out"
    with Ranks(lose_rank, world=2, args=(str(tokens), str(output), str(llama), lost)) as ranks:
        deadline = time.monotonic() + 60  # and not LONGEST_SILENCE
        while not Path(f"{output}.seen").exists():
            assert time.monotonic() < deadline and ranks.processes[1 - lost].is_alive()
            time.sleep(0.05)
    assert words in Path(f"{output}.seen").read_text()


def test_what_does_not_go_together_is_refused(
    tmp_path: Path, tokens: Path, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(error: type[Exception], words: str, **teacher: Any) -> None:
        with pytest.raises(error, match=words):
            dump(settings(str(tokens), str(tmp_path / "out"), str(llama), **teacher))

    refused(ValueError, "engine zero3 does not know tensor_parallel=2: leave it out, or use engine hf", engine="zero3")
    refused(ValueError, "engine hf with tensor_parallel=2 does not know compile", compile=True)
    refused(ValueError, "an ensemble .* runs on engine hf, with tensor_parallel=1", ensemble=[{"model": str(llama)}])
    refused(UserError, "has num_attention_heads=4 and num_key_value_heads=2, and .*=3 does not", tensor_parallel=3)
    refused(UserError, "has num_key_value_heads=2, and tensor_parallel=4 does not divide that", tensor_parallel=4)
    refused(UserError, "load_options.device_map with tensor_parallel=2", load_options={"device_map": "auto"})
    refused(UserError, "each rank takes a cpu of its own; use auto", device="meta")
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    refused(UserError, "needs a launcher, as in `torchrun --nproc-per-node 2 .*: RANK, WORLD_SIZE, MASTER_ADDR")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    refused(UserError, "tensor_parallel is 2 and the launcher has started 3 ranks; expected 2 for each worker")
    assert not (tmp_path / "out").exists()
    model = {"model": str(llama), "tensor_parallel": 2}
    with pytest.raises(ValueError, match=r"one process: .* no tensor_parallel"):
        RolloutConfig(tokens=tokens, output=tmp_path / "out", model=model, grader={"kind": "exact"})
    with pytest.raises(ConfigError, match="--ray with engine hf and tensor_parallel=2: an actor holds a whole"):
        run_on_ray(None, settings(str(tokens), str(tmp_path / "out"), str(llama)), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("begun", "wanted"), [({}, {"tensor_parallel": 2}), ({"tensor_parallel": 4}, {})])
def test_another_number_of_parts_is_another_engine(
    tmp_path: Path, tokens: Path, llama: Path, begun: dict[str, int], wanted: dict[str, int]
) -> None:
    config = settings(str(tokens), str(tmp_path / "out"), str(llama), tensor_parallel=1)
    spec = open_work(config, config.teacher, DumpJob(config)).writer.spec
    assert spec.teacher is not None and "tensor_parallel" not in spec.teacher
    StoreWriter.create(tmp_path / "made", replace(spec, teacher={**spec.teacher, **begun}))
    mix = engine_mix(str(tmp_path / "made"), replace(spec, teacher={**spec.teacher, **wanted}))
    assert mix is not None and mix.settings().endswith(
        f"=hf and teacher.tensor_parallel={begun.get('tensor_parallel', 1)}"
    )
    assert (
        mix.spec(replace(spec, teacher={**spec.teacher, **wanted})).fingerprint
        == read_spec(tmp_path / "made").fingerprint
    )
