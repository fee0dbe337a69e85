"""The report: one page, every run and figure in it, nothing loaded from elsewhere; trackers get the same figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from potstill.common.errors import UserError
from potstill.student_train.chart import chart, tick_label, ticks, value_range
from potstill.student_train.metrics import read_metrics
from potstill.student_train.report import labels_of, write_report
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers


class Balance(HTMLParser):
    """Fails on a tag that is closed without being open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def runs(stores, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, curriculum in (("labels", [{}]), ("<distilled>", [{"targets": "teacher"}])):
        run = folder / name
        tree = tiny.config_tree(stores, run, curriculum=curriculum, logging={"tensorboard": name == "labels"})
        tree["eval"] = {"every_steps": 4}
        run_ranks(workers.train_run, tree, world=1)
        found.append(run)
    return found


def test_one_page_with_all_runs(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "report.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert "&lt;distilled&gt;" in page and "<distilled>" not in page
    assert "http" not in page and "<script" not in page
    heldout = [r for r in read_metrics(runs[1]) if r["kind"] == "eval"][-1]["heldout_loss"]
    assert f"{heldout:.4g}" in page
    assert "curriculum.0.targets" in page and "optimizer.lr" not in page, "only what differs is listed"
    assert page.count("<polyline") >= 12
    with pytest.raises(UserError, match="exists"):
        write_report(runs, tmp_path / "report.html")


def test_a_curve_is_where_its_numbers_are() -> None:
    svg = chart("x", [("a", [(0.0, 1.0), (5.0, 3.0), (10.0, 2.0)])])
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg).group(1).split()]
    assert points[0][0] == 62 and points[2][0] == 534 and points[1][0] == 298
    assert points[1][1] < points[2][1] < points[0][1], "larger is higher"
    assert chart("x", [("a", [])]) == ""


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert [tick_label(x) for x in ticks(20480, 818_998)] == ["200k", "400k", "600k", "800k"]
    assert [tick_label(y) for y in ticks(0.0, 0.003)] == ["0", "0.001", "0.002", "0.003"]
    assert [tick_label(v) for v in (1.5e6, 2e9, 9999.0, -25000.0, 0.66)] == ["1.5M", "2G", "9999", "-25k", "0.66"]
    low, high = value_range([0.491, 7.47])
    assert low == 0.0 and high == 8.0
    for value in (1.0, 0.0, -3.0, 1e-7):
        low, high = value_range([value, value])
        assert low < value < high, "a curve that never changes is in the middle"


@pytest.mark.parametrize("points", [[(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(5.0, 1e-9), (5e9, 3e9)]])
def test_labels_stay_inside_the_figure(points: list[tuple[float, float]]) -> None:
    svg = chart("x", [("a", points), ("b", points)])
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)"[^>]*>([^<]*)<', svg)
    assert len(labels) == svg.count("<text") >= 4
    for x, y, anchor, text in labels:
        width = 6.5 * len(text)
        left = float(x) - (width if anchor == "end" else width / 2)
        assert left >= 0 and left + width <= 560 and 0 < float(y) < 240, (text, x, y)
    assert svg.count("stroke-dasharray") == (len(points) > 1), "the second run shows the first below it"


def test_tensorboard_gets_the_figures(runs: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0] / "tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in read_metrics(runs[0]) if record["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        write_report([tmp_path], tmp_path / "report.html")


def test_a_line_breaks_where_nothing_was_measured() -> None:
    nan = float("nan")
    svg = chart("x", [("a", [(0.0, 1.0), (1.0, 2.0), (2.0, nan), (3.0, 2.0), (4.0, nan), (5.0, 1.0), (6.0, 3.0)])])
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 1 and "nan" not in svg
    assert chart("x", [("a", [(0.0, nan)])]) == ""
    assert chart("x", [("a", [(0.0, nan)]), ("b", [(0.0, 1.0)])]).count("<circle") == 1


def test_runs_that_have_not_begun_or_broke_down_are_in_the_page(runs: list[Path], tmp_path: Path) -> None:
    for name in ("fresh", "broken"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text((runs[0] / "config.yaml").read_text())
    with pytest.raises(UserError, match="fresh: no metrics yet"):
        write_report([tmp_path / "fresh"], tmp_path / "none.html")
    records = [record for record in read_metrics(runs[0]) if record["kind"] == "train"]
    records[-1] |= {"loss": None, "ce": None, "grad_norm": None}
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "broken" / "metrics.jsonl").write_text(lines + '{"kind": "train", "st')
    page = write_report([tmp_path / "fresh", tmp_path / "broken", runs[1]], tmp_path / "report.html").read_text()
    assert "not done (0 of 8 steps)" in page and "not done (8 of 8 steps)" in page
    assert "<tr><td>last loss</td><td>-</td><td>-</td>" in page
    assert "nan" not in page.lower().replace("tokens", "")


def test_a_run_is_named_by_its_folder_also_from_inside(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs[0])
    assert labels_of([Path("."), runs[1]]) == ["labels", "<distilled>"]
