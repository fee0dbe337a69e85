"""The machinery of the claims: pairs, rules, which run stands where, reports and plots."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.claims import report
from benchmarks.claims.__main__ import main, parse_seeds
from benchmarks.claims.base import Arm, Bench, Claim, Finding, Outcome, Plot, Table
from benchmarks.claims.paired import cohens_d, compare, count, most, steady
from benchmarks.claims.runs import Run, Runs, source_digest, value_of
from benchmarks.claims.svg import draw, mean_curve, ticks
from benchmarks.claims.table import CLAIMS, find_claim, head
from benchmarks.claims.tell import PAGES, PART, RESULTS, told
from potstill.common.errors import UserError


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(work=tmp_path / "work", data=tmp_path / "data", scale="quick", seeds=(1, 2))


def _tree(tokens: Path, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": "claim", "max_steps": 2},
        "model": {"config": {"model_type": "llama", "hidden_size": 8}},
        "data": {"tokens": str(tokens), "global_batch_rows": 2},
        **changes,
    }


def test_a_gain_must_lie_beyond_its_interval() -> None:
    finding = compare("a beats b", [1.0, 1.1, 0.9], [1.5, 1.62, 1.38])
    assert finding.passed
    assert finding.effect == pytest.approx(0.5)
    assert finding.interval is not None
    # by hand: sd of (.5, .52, .48) is .02, t = 4.303
    assert finding.interval[0] == pytest.approx(0.5 - 4.303 * 0.02 / math.sqrt(3), abs=1e-6)
    assert finding.standardised == pytest.approx(25.0)
    assert not compare("a beats b", [1.0, 1.1, 0.9], [1.5, 1.0, 0.95]).passed
    assert not compare("b beats a", [1.5, 1.62, 1.38], [1.0, 1.1, 0.9]).passed
    assert compare("higher", [0.9, 0.8], [0.5, 0.4], lower_is_better=False, beyond_interval=False).passed


def test_a_margin_and_at_least_as_good() -> None:
    near = [1.001, 0.999, 1.0]
    assert not compare("not worse", near, [1.0, 1.0, 1.0]).passed
    assert compare("not worse", near, [1.0, 1.0, 1.0], margin=0.01).passed
    assert compare("at least", near, [1.0, 1.0, 1.0], beyond_interval=False).passed
    assert not compare("at least", [1.01, 1.0, 1.0], [1.0, 1.0, 1.0], beyond_interval=False).passed


def test_seeds_are_counted() -> None:
    assert count("reaches", [True, True, True, True, False], 4).passed
    assert not count("reaches", [True, True, True, False, False], 4).passed
    assert not steady("labels", [3.0, 3.1]).passed
    assert steady("labels", [3.0, 3.02]).effect == pytest.approx(0.02 / math.sqrt(2))
    assert [most(number) for number in (2, 3, 5, 10)] == [2, 3, 4, 8]
    assert cohens_d([1.0]) is None
    assert cohens_d([1.0, 1.0]) is None


def test_only_rules_decide() -> None:
    good = Finding(text="", passed=True, effect=1.0, unit="nats")
    bad = dataclasses.replace(good, passed=False)
    assert Outcome(findings=(good, dataclasses.replace(bad, rule=False))).passed
    assert not Outcome(findings=(good, bad)).passed
    assert not Outcome(findings=(dataclasses.replace(good, rule=False),)).passed


def test_a_run_stands_where_its_configuration_and_stores_say(bench: Bench, tmp_path: Path) -> None:
    store = tmp_path / "tokens"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    tree = _tree(store)
    run = Run(bench=bench, arm=Arm(config=tree), seed=1)
    at_default = _tree(store, curriculum=[{}])
    assert Run(bench=bench, arm=Arm(config=at_default), seed=1).folder == run.folder
    others = [
        Run(bench=bench, arm=Arm(config=_tree(store, optimizer={"lr": 0.5})), seed=1).folder,
        Run(bench=bench, arm=Arm(config=tree), seed=2).folder,
    ]
    (store / "manifest.json").write_text('{"rows": 2}')  # the store was made anew
    others.append(Run(bench=bench, arm=Arm(config=tree), seed=1).folder)
    assert len({run.folder, *others}) == 4


def test_a_run_of_other_source_is_made_again(bench: Bench, tmp_path: Path) -> None:
    run = Run(bench=bench, arm=Arm(config=_tree(tmp_path)), seed=1)
    run.forget_other_source()
    assert run.made_with["source"] == source_digest()
    run.folder.mkdir()
    (run.folder / "done.json").write_text("{}")
    run.forget_other_source()
    assert run.is_done
    beside = run.folder.with_name(run.folder.name + ".made_with.json")
    beside.write_text('{"source": "other", "commit": "0"}')
    run.forget_other_source()
    assert not run.is_done
    assert run.made_with["source"] == source_digest()


def _finished(run: Run, losses: list[float]) -> None:
    run.folder.mkdir(parents=True)
    lines = [
        {"kind": "eval", "step": 10 * (place + 1), "heldout_loss": loss, "sources": {"a": {"heldout_loss": 2 * loss}}}
        for place, loss in enumerate(losses)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "done.json").write_text("{}")


def test_figures_of_runs(bench: Bench, tmp_path: Path) -> None:
    arms = {"labels": Arm(config=_tree(tmp_path)), "kd": Arm(config=_tree(tmp_path, optimizer={"lr": 0.5}))}
    runs = Runs(bench, arms)
    for seed, shift in ((1, 0.0), (2, 1.0)):
        _finished(runs.run("labels", seed), [3.0 + shift, 2.0 + shift])
        _finished(runs.run("kd", seed), [2.5 + 0.4 * shift, 1.5 + 2 * shift])
    assert runs.final("labels") == [2.0, 3.0]
    assert runs.final("kd", "a/heldout_loss") == [3.0, 7.0]
    assert runs.reach("kd", runs.final("labels")) == [20.0, 10.0]
    assert runs.reach("kd", [0.0, 0.0]) == [None, None]
    assert runs.reach("kd", [2.4, 2.4], falling=False) == [10.0, 10.0]
    with pytest.raises(UserError, match="step 10 has no 'accuracy'"):
        runs.final("kd", "accuracy")
    with pytest.raises(UserError, match="no arm 'salt'; there are labels, kd"):
        runs.run("salt", 1)
    assert value_of({"kind": "eval", "x": 1}, "x") == 1.0


def test_the_report_keeps_each_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    monkeypatch.setattr(report, "CLAIMS", ("first", "second"))
    monkeypatch.setattr(report, "head", lambda name: f"What {name} says.")
    outcome = Outcome(
        findings=(compare("a beats b", [1.0, 1.1], [1.5, 1.61]),),
        tables=(Table(title="Losses", header=("arm", "loss"), rows=(("a", "1.05"),)),),
        plots=(Plot(name="loss", title="t", x="step", y="nats", curves={"a": [[(1, 2.0), (2, 1.0)]]}),),
        notes=("A note.",),
    )
    runs = Runs(bench, {})
    for name in ("second", "first"):
        claim = Claim(name=name, title=f"title {name}", build=lambda _: iter(()), arms=dict, judge=lambda *_: outcome)  # type: ignore[arg-type]
        report.keep(tmp_path, claim, report.result_of(claim, bench, runs, outcome), outcome)
    kept = json.loads((tmp_path / "claims.json").read_text())
    assert list(kept) == ["first", "second"]
    assert {"pass", "effect", "interval", "seeds", "command", "commit", "date"} <= set(kept["first"])
    page = (tmp_path / "claims.md").read_text()
    for text in ("What first says.", "What second says.", "pass: a beats b: +0.5050 nats", "A note.", "title first"):
        assert text in page
    assert (tmp_path / "claims" / "first_loss.svg").is_file()


def test_a_plot_has_a_line_for_each_seed_and_the_mean() -> None:
    curves = {"labels": [[(1.0, 3.0), (2.0, 2.0)], [(1.0, 4.0), (2.0, 3.0)]], "a < b": [[(1.0, 1.0), (2.0, 1.5)]]}
    drawn = draw(Plot(name="loss", title="Loss & more", x="step", y="nats", curves=curves))
    lines = [node for node in ElementTree.fromstring(drawn).iter() if node.tag.endswith("polyline")]
    assert [line.get("stroke-width") for line in lines] == ["0.8", "0.8", "2.4", "0.8", "2.4"]
    assert mean_curve(curves["labels"]) == [(1.0, 3.5), (2.0, 2.5)]
    assert ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    with pytest.raises(ValueError, match="no point to draw"):
        draw(Plot(name="x", title="", x="", y="", curves={"a": [[]]}))


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_seeds("3,1") == (3, 1)
    for text in ("1", "1,1", "a,b", "-1,2"):
        with pytest.raises(Exception, match="two or more different seeds"):
            parse_seeds(text)
    assert main(["--list"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}\n" in told for name in CLAIMS)
    with pytest.raises(UserError, match="no claim 'nothing'"):
        find_claim("nothing")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_what_it_is(name: str) -> None:
    claim = find_claim(name)
    text = head(name)
    for word in ("Paper", "Set-up", "Arms", "Pass", "Cost"):
        assert f"{word}:" in text, f"{name}: its head has no line that begins with {word}:"
    assert claim.name == name


def test_pages_say_what_the_results_hold(tmp_path: Path) -> None:
    result: dict[str, Any] = {
        "pass": False,
        "title": "A helps",
        "headline": "a beats b",
        "effect": 0.0123,
        "unit": "nats",
        "interval": [-0.01, 0.03],
        "seeds": [1, 2],
        "command": "python -m benchmarks.claims --claim a",
        "plots": ["claims/a_loss.svg"],
        "findings": [vars(compare("a beats b", [1.0, 1.1], [1.5, 1.61]))],
    }
    page = tmp_path / "page.md"
    parts = ["# P", "<!-- claims -->", "of before", "<!-- end -->", "kept"]
    parts += [line for name in "ab" for line in (f"<!-- claim: {name} -->", "<!-- end -->")]
    page.write_text("\n".join([*parts, ""]))
    text = told(page, {"a": result})
    assert "of before" not in text and "\nkept\n" in text
    assert "| no | a beats b | +0.0123 nats | -0.0100 to +0.0300 | 2 |" in text
    assert "**Does not hold at this scale**: A helps." in text and "a_loss.svg)" in text
    assert text.count("Not run yet") == 1
    page.write_text(text)
    assert told(page, {"a": result}) == text


def test_readme_and_methods_page_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for page in PAGES:
        assert page.read_text() == told(page, results), f"{page.name}: run python -m benchmarks.claims --tell"
    marked = {found["name"] for found in PART.finditer(PAGES[1].read_text())}
    assert marked - {None} == set(CLAIMS)
