"""The report: one page, every run and figure in it, nothing loaded from elsewhere; trackers get the same figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from potstill.common.errors import UserError
from potstill.student_train.report.build import labels_of, write_report
from potstill.student_train.report.charts import AXES, CHARTS, COLOURS, FEW_POINTS, marker_sizes
from potstill.student_train.report.page import STYLE
from potstill.student_train.run.metrics import read_metrics
from tests.chromium import Chromium, find_chromium
from tests.dist_harness import run_ranks
from tests.student_train import tiny, workers
from tests.student_train.made_up_runs import records, write_run


class Page(HTMLParser):
    """The page taken apart: balanced tags, addresses that it would load, JSON that stands in it, text of the cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.loads: list[str] = []
        self.metas: dict[str, str] = {}
        self.scripts: dict[str, str] = {}
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag == "meta":
            self.metas[str(found.get("name"))] = str(found.get("content"))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "br", "line"):
            self.open.append((tag, found))

    def handle_endtag(self, tag: str) -> None:
        if tag != "line":
            assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[str(attributes.get("id"))] = data
            return
        self.text += data
        if tag in ("td", "th"):
            self.rows[-1][-1] += data

    def charts(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The charts by (kind of record, figure)."""
        return {(chart["kind"], chart["name"]): chart for chart in json.loads(self.scripts["charts"])}


@pytest.fixture(scope="module")
def runs(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for name, curriculum in (("labels", [{}]), ("<distilled>", [{"targets": "teacher"}])):
        run = folder / name
        tree = tiny.config_tree(stores, run, curriculum=curriculum, logging={"tensorboard": name == "labels"})
        tree["eval"] = {"every_steps": 4}
        run_ranks(workers.train_run, tree, world=1)
        found.append(run)
    return found


def test_one_page_with_all_runs_that_loads_nothing(runs: list[Path], tmp_path: Path) -> None:
    text = write_report(runs, tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.loads == [] and "@import" not in STYLE and "url(" not in STYLE
    assert "width=device-width" in page.metas["viewport"]
    assert "labels, <distilled>" in page.text and "<distilled>" not in text
    heldout = [r for r in read_metrics(runs[1]) if r["kind"] == "eval"][-1]["heldout_loss"]
    assert f"{heldout:.4g}" in next(row for row in page.rows if row[0] == "loss (nats)")
    assert ["curriculum.0.targets", "-", "teacher"] in page.rows
    assert "optimizer.lr" not in page.text, "only what differs is listed"
    assert len(page.charts()) >= 12
    with pytest.raises(UserError, match="exists"):
        write_report(runs, tmp_path / "report.html")


def test_every_curve_has_the_numbers_of_the_metrics(runs: list[Path], tmp_path: Path) -> None:
    charts = Page(write_report(runs, tmp_path / "report.html").read_text()).charts()
    for chart in CHARTS:
        expected = {}
        for index, run in enumerate(runs):
            lines = [r for r in read_metrics(run) if r["kind"] == chart.kind and chart.figure in r]
            if any(line[chart.figure] is not None for line in lines):
                expected[index] = lines
        assert ((chart.kind, chart.figure) in charts) == bool(expected)
        if not expected:
            continue
        drawn = charts[chart.kind, chart.figure]
        traces = drawn["figure"]["data"]
        assert [trace["meta"]["run"] for trace in traces] == list(expected)
        for place, (trace, lines) in enumerate(zip(traces, expected.values(), strict=True)):
            assert trace["y"] == [line[chart.figure] for line in lines]
            assert trace["x"] == [line["tokens"] for line in lines]
            for axis in AXES:
                assert drawn["x"][axis][place] == [line[axis] for line in lines]


def test_short_curves_and_lone_points_have_markers_and_gaps_stay_gaps(tmp_path: Path) -> None:
    lines = records(steps=1000)
    losses = [line for line in lines if line["kind"] == "train"]
    for number in (20, 22):
        losses[number]["loss"] = None
    run = write_run(tmp_path / "run", lines, run={"max_steps": 1000})
    charts = Page(write_report([run], tmp_path / "report.html").read_text()).charts()
    (loss,), (ce,) = charts["train", "loss"]["figure"]["data"], charts["train", "ce"]["figure"]["data"]
    assert loss["y"][20] is None and loss["y"][22] is None and loss["connectgaps"] is False
    assert [n for n, size in enumerate(loss["marker"]["size"]) if size] == [21] and "markers" in loss["mode"]
    assert ce["mode"] == "lines", "a long curve without gaps needs no markers"
    (heldout,) = charts["eval", "heldout_loss"]["figure"]["data"]
    assert len(heldout["y"]) == 20 <= FEW_POINTS and heldout["mode"] == "lines+markers" and heldout["marker"]["size"]
    assert marker_sizes([1.0]) and marker_sizes([None] * 100 + [1.0]) and marker_sizes([1.0] * 100) is None


def test_runs_that_have_not_begun_or_broke_down_are_in_the_page(runs: list[Path], tmp_path: Path) -> None:
    fresh = write_run(tmp_path / "fresh", [], run={"max_steps": 8})
    with pytest.raises(UserError, match="fresh: no metrics yet"):
        write_report([fresh], tmp_path / "none.html")
    lines = [record for record in read_metrics(runs[0]) if record["kind"] == "train"]
    lines[-1] |= {"loss": None, "ce": None, "grad_norm": None}
    broken = write_run(tmp_path / "broken", lines, run={"max_steps": 8})
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    text = write_report([fresh, broken, runs[1]], tmp_path / "report.html").read_text()
    page = Page(text)
    assert ["state", "not done (0 of 8 steps)", "not done (8 of 8 steps)", "done"] in page.rows
    assert next(row for row in page.rows if row[0] == "last loss")[1:3] == ["-", "-"]
    assert "NaN" not in page.scripts["charts"] and "nan" not in page.text.split()
    one = records(steps=10)[:1]
    page = Page(write_report([write_run(tmp_path / "one", one)], tmp_path / "one.html").read_text())
    assert "No evaluation yet." in page.text
    assert page.charts()["train", "loss"]["figure"]["data"][0]["y"] == [one[0]["loss"]]


def test_samples_stand_by_prompt_and_run_and_no_text_becomes_markup(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / name, records(steps=100, phase=phase), run={"name": name, "max_steps": 100})
        for name, phase in (("one", 0.0), ("two", 1.0))
    ]
    text = write_report(folders, tmp_path / "report.html").read_text()
    page = Page(text)
    shown = page.text[page.text.index("Samples of text") :]
    assert shown.index("Once upon a time,") < shown.index("at 0, there was") < shown.index("at 1, there was")
    assert "</script><b>She said:" in shown and "<i>yes</i> & no (100)" in shown and "<i>yes" not in text
    assert "Earlier samples of one (1)" in shown and "<i>yes</i> & no (50)" in shown
    # The wrong prompt would have ended the element that the data of the curves stand in.
    assert len(page.charts()) > 5
    without = [line for line in records(steps=100) if line["kind"] != "sample"]
    plain = write_report([write_run(tmp_path / "three", without)], tmp_path / "plain.html").read_text()
    assert "Samples of text" not in Page(plain).text


def test_runs_are_called_by_their_names_and_by_folders_where_names_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a/x", "b/x", "c"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paths = [Path("a/x"), Path("b/x"), Path("c")]

    def called(*names: str) -> list[str]:
        return labels_of(list(zip(names, paths, strict=True)))

    assert called("labels", "distilled", "salt") == ["labels", "distilled", "salt"]
    assert called("lm", "salt", "lm") == ["lm (x)", "salt", "lm (c)"]
    assert called("lm", "lm", "salt") == ["lm (a/x)", "lm (b/x)", "salt"]
    assert called("run", "salt", "run") == ["x", "salt", "c"], "run is what a run is called that was given no name"
    assert called("run", "run", "c") == ["x (a/x)", "x (b/x)", "c"]
    monkeypatch.chdir(tmp_path / "c")
    assert labels_of([("run", Path("."))]) == ["c"]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_stand_out_in_light_and_dark() -> None:
    backs = re.findall(r"--back: (#\w{6})", STYLE)
    assert len(backs) == 2
    for colour in COLOURS:
        for back in backs:
            high, low = sorted((luminance(colour), luminance(back)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3.0, (colour, back)


def test_a_browser_shows_it_on_a_desk_and_on_a_phone_in_light_and_dark(tmp_path: Path) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    folders = [
        write_run(tmp_path / "a", records(steps=400), run={"name": "labels only", "max_steps": 400}),
        write_run(tmp_path / "b", records(steps=400, phase=1.0), run={"name": "a name " * 9, "max_steps": 400}),
    ]
    page = write_report(folders, tmp_path / "report.html")
    with Chromium(program, seconds=150) as browser:
        browser.look_as(width=390, height=844, phone=True)
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") == 390, "nothing is wider than a phone"
        hidden = "divs.filter(div => div.querySelectorAll('.scatterlayer .trace').length === 0).length"
        assert browser.ask(hidden) == 0, "every chart has drawn its curves"
        browser.ask("document.querySelectorAll('button.run')[1].click()")
        shown = "[...new Set(divs.flatMap(div => div.data.filter(t => t.visible !== false).map(t => t.meta.run)))]"
        assert browser.ask(shown) == [0], "one click switches a run off in every chart"
        assert browser.ask("[...document.querySelectorAll('[data-run=\"1\"]')].every(e => e.hidden)")
        browser.ask("document.querySelectorAll('button.run')[1].click()")
        assert sorted(browser.ask(shown)) == [0, 1]
        browser.ask("axis.value = 'step'; axis.dispatchEvent(new Event('change'))")
        assert browser.ask("divs.every((div, n) => div.data.every((t, m) => t.x === charts[n].x.step[m]))")
        assert browser.ask("divs[0].layout.xaxis.title.text") == "step"

        light = browser.ask("[getComputedStyle(document.body).backgroundColor, divs[0].layout.font.color]")
        browser.look_as(width=1280, dark=True)
        browser.ask("new Promise(done => requestAnimationFrame(() => setTimeout(done, 300)))")  # the page is told
        dark = browser.ask("[getComputedStyle(document.body).backgroundColor, divs[0].layout.font.color]")
        assert light == ["rgb(255, 255, 255)", "#1f2328"] and dark == ["rgb(20, 23, 28)", "#dfe3e8"]
        assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
        assert browser.errors() == []
        assert browser.requests() == [page.resolve().as_uri()], "the page itself, and nothing else"


def test_tensorboard_gets_the_figures(runs: list[Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0] / "tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in read_metrics(runs[0]) if record["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        write_report([tmp_path], tmp_path / "report.html")
