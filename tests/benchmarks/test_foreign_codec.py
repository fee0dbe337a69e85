"""The table of foreign files: their errors are those of their own readers, and the store takes fewer bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.foreign_codec import Sample, compare, run_foreign


@pytest.mark.parametrize(
    ("folder", "mean", "largest"),
    [("distillkit/normalize_t", 0.0138, 0.336), ("distillkit/fp32_exact_k8", 0.0, 0.0)],
)
def test_a_foreign_file_beside_the_store(shared_data: Path, folder: str, mean: float, largest: float) -> None:
    root = shared_data / "foreign"
    if not root.is_dir():
        pytest.skip(f"no files of other writers: {root} does not exist")
    found = compare(Sample(folder), root)
    assert found.positions == 762
    assert found.theirs.mean == pytest.approx(mean, abs=6e-5) and found.theirs.largest == pytest.approx(
        largest, abs=1e-3
    )
    assert found.ours.largest <= 1 / 32 + 1e-6 and found.ours.kl_tail is not None and found.ours.kl_tail < 3e-4
    assert found.ours.bytes_per_position < 0.7 * found.theirs.bytes_per_position


def test_without_the_files_it_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    assert run_foreign(lines.append, tmp_path / "nowhere") == {}
    assert len(lines) == 1 and "left out" in lines[0] and "nowhere" in lines[0]
