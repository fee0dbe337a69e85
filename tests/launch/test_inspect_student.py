"""What a run adds to the page of `inspect --html`: kept weights and the student's loss, against computing them anew."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from potstill.launch.cli import main
from potstill.storage import ScoresRow, StoreReader, TokensRow
from potstill.student_train.hf_export.weights import find_source, load_model
from potstill.student_train.model.hf_config import hf_config
from potstill.student_train.model.student import build_student
from potstill.student_train.run.checkpoint import checkpoint_folder, commit_checkpoint
from potstill.student_train.run.run_folder import pinned_values, write_start
from tests.chromium import Chromium, find_chromium
from tests.launch.test_inspect_page import data_of
from tests.student_train import tiny, workers

NUM_ROWS, STEPS = 40, 6
MAX_RANK = 3
CURRICULUM = [
    {
        "name": "easy",
        "until": 3,
        "targets": "teacher",
        "rows": {"score": {"kind": "stat", "of": [{"store": "slm"}]}, "keep": "lowest", "share": 0.5, "segments": 1},
        "tokens": {"policy": "label_rank", "source": "slm", "max_rank": MAX_RANK, "applies_to": "kd"},
    },
    {"name": "hard", "targets": "teacher", "tokens": {"policy": "top_loss", "share": 0.5, "floor": 0.25}},
]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny.write_all(tmp_path_factory.mktemp("stores"), num_rows=NUM_ROWS)


@pytest.fixture(scope="module")
def run(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps in two stages, with random weights in its checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    tree = tiny.config_tree(stores, folder, run={"max_steps": STEPS}, curriculum=CURRICULUM)
    tree["model"]["init_std"] = 0.2  # so that losses differ from token to token
    config = workers.config_of(tree)
    student_config = hf_config(config.model, vocab_size=tiny.VOCAB, row_length=tiny.ROW_LENGTH)
    student = build_student(config.model, student_config, seed=config.run.seed)
    checkpoint = checkpoint_folder(folder, STEPS)
    checkpoint.mkdir(parents=True)
    write_start(config, student_config, {}, [])
    torch.save({"module": student.state_dict()}, checkpoint / "mp_rank_00_model_states.pt")
    commit_checkpoint(checkpoint, {"loop": {"step": STEPS}, "data": {}, "pinned": pinned_values(config)})
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    """The same weights as a Hugging Face folder."""
    load_model(find_source(run), dtype="float32").save_pretrained(run.parent / "hf")
    return run.parent / "hf"


def inspect(stores: dict[str, Path], page: Path, *options: str | Path, rows: str = f"0:{NUM_ROWS}") -> dict[str, Any]:
    """The data of a page over all rows."""
    words = ["inspect", stores["teacher"], "--tokens", stores["tokens"], "--html", page, "--force", "--rows", rows]
    assert main([str(word) for word in [*words, *options]]) == 0
    return data_of(page)


def by_token(values: np.ndarray, row: TokensRow) -> list[float | None]:
    """Figures of positions [n] at the tokens that they are about; None at the first token of a document."""
    starts = set((np.cumsum(row.doc_lens) - row.doc_lens).tolist())
    return [None if n in starts else float(values[n - 1]) for n in range(len(row.tokens))]


def plain_losses(folder: Path, row: TokensRow) -> np.ndarray:
    """-log softmax [n] of a plain Hugging Face forward over each document by itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = np.zeros(len(row.tokens))
    start = 0
    for size in row.doc_lens.tolist():
        ids = torch.from_numpy(row.tokens[start : start + size].astype(np.int64))
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids[None]).logits[0].double(), -1)
        losses[start : start + size - 1] = -logp[torch.arange(size - 1), ids[1:]].numpy()
        start += size
    return losses


def test_a_store_s_choice_of_rows_and_tokens(stores: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.config_tree(stores, tmp_path / "run", curriculum=CURRICULUM)))
    page = inspect(stores, tmp_path / "p.html", "--config", config)
    scores, tokens = StoreReader(stores["scores"]), StoreReader(stores["tokens"])
    drawn = set(np.argsort(scores.row_stats["mean_loss"], kind="stable")[: NUM_ROWS // 2].tolist())
    assert {one["key"] for one in page["quantities"]} >= {"w_loss", "w_kd"}
    for shown in page["rows"]:
        row, scored = tokens.row(shown["row"]), scores.row(shown["row"])
        assert isinstance(row, TokensRow) and isinstance(scored, ScoresRow)
        kept = (scored.label_rank < MAX_RANK).astype(float)
        assert shown["values"]["w_kd"] == by_token(kept, row)
        assert shown["values"]["w_loss"] == by_token(np.ones(len(row.tokens)), row)
        assert shown["left_out"] == (shown["row"] not in drawn)
        share = kept[tiny.label_mask(row)].mean()
        assert shown["note"].startswith("Step 0 of 8, stage easy: the row is " + "not " * shown["left_out"])
        assert f"20 of {NUM_ROWS} rows" in shown["note"] and f" {100 * share:.1f} % " in shown["note"]


def test_the_student_s_loss_and_its_own_choice(
    stores: dict[str, Path], run: Path, exported: Path, tmp_path: Path
) -> None:
    page = inspect(stores, tmp_path / "p.html", "--run", run, rows="36:40")  # the last row is a short one
    for shown in page["rows"]:
        row = StoreReader(stores["tokens"]).row(shown["row"])
        assert isinstance(row, TokensRow)
        losses = plain_losses(exported, row)
        expected = by_token(losses, row)
        assert [n for n, value in enumerate(shown["values"]["st_loss"]) if value is None] == [
            n for n, value in enumerate(expected) if value is None
        ]
        for found, value in zip(shown["values"]["st_loss"], expected, strict=True):
            assert found == (value if value is None else pytest.approx(value, rel=1e-3))  # written with four digits
        labelled = np.flatnonzero(tiny.label_mask(row))
        best = labelled[np.argsort(-losses[labelled], kind="stable")][: math.ceil(0.5 * len(labelled))]
        weights = np.full(len(row.tokens), 0.25)
        weights[best] = 1.0
        assert shown["values"]["w_loss"] == by_token(weights, row) == shown["values"]["w_kd"]
        assert f"Step {STEPS - 1} of {STEPS}, stage hard: the row is in the pool (all rows)." in shown["note"]
        assert f"chosen by student after {STEPS} steps" in shown["note"]
    from_folder = inspect(stores, tmp_path / "q.html", "--model", exported, rows="36:40")
    for ours, theirs in zip(page["rows"], from_folder["rows"], strict=True):
        pairs = list(zip(ours["values"]["st_loss"], theirs["values"]["st_loss"], strict=True))
        assert all(a == (b if b is None else pytest.approx(b, rel=1e-3)) for a, b in pairs)
    assert not {"w_loss", "w_kd"} & {one["key"] for one in from_folder["quantities"]}


def test_a_step_is_a_number_or_a_share(stores: dict[str, Path], run: Path, tmp_path: Path) -> None:
    for step, said in (("2", "Step 2 of 6, stage easy"), ("0.5", "Step 3 of 6, stage hard"), ("1.0", "Step 5 of 6")):
        page = inspect(stores, tmp_path / "p.html", "--run", run, "--step", step, rows="0:1")
        assert page["rows"][0]["note"].startswith(said)


def test_wrong_requests_are_told(
    stores: dict[str, Path], run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny.config_tree(stores, tmp_path / "run", curriculum=CURRICULUM)))
    other = tiny.write_all(tmp_path / "other", num_rows=NUM_ROWS + 1)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run / "config.yaml").read_text())

    def refused(*options: str | Path, of: dict[str, Path] = stores) -> str:
        words = ["inspect", of["teacher"], "--tokens", of["tokens"], "--html", tmp_path / "p.html", *options]
        assert main([str(word) for word in words]) == 1
        assert not (tmp_path / "p.html").exists()
        return capsys.readouterr().err

    assert "has rows 0 to 39" in refused("--row", "40", "--run", run)
    assert "has the digest" in refused("--row", "0", "--run", run, of=other)
    message = refused("--row", "0", "--run", empty)
    assert "holds no whole checkpoint" in message and f"--config {empty / 'config.yaml'}" in message
    assert "the run has the steps 0 to 5" in refused("--row", "0", "--run", run, "--step", "6")
    assert "the run has the steps 0 to 5" in refused("--row", "0", "--run", run, "--step", "1.5")
    assert "a share of the run" in refused("--row", "0", "--run", run, "--step", "late")
    assert "--run RUN or --config FILE" in refused("--row", "0", "--step", "1")
    assert "give one of" in refused("--row", "0", "--run", run, "--config", config)
    assert "policy top_loss" in refused("--row", "0", "--config", config, "--step", "0.9")
    assert main(["inspect", str(stores["teacher"]), "--model", str(run)]) == 1
    assert "add --html FILE" in capsys.readouterr().err


def test_a_browser_shows_it_and_is_driven_by_keys_and_fingers(
    stores: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    page = tmp_path / "rows.html"
    options = ["--run", run, "--step", "0", "--scores", stores["scores"]]
    data = inspect(stores, page, *options, rows="0:4")
    with Chromium(program, seconds=100) as browser:
        browser.look_as(width=1280)
        browser.open(page)
        browser.ask("text.focus()")

        def press(key: str) -> None:
            for kind in ("keyDown", "keyUp"):
                browser.page("Input.dispatchKeyEvent", type=kind, key=key)

        press("ArrowRight")
        first = browser.ask("chosen")
        press("ArrowRight")
        assert browser.ask("chosen") == first + 1 and browser.ask("tokens[chosen].className").endswith("chosen")
        shown = browser.ask("[...panel.querySelectorAll('.c .name')].map(e => e.textContent)")
        at = data["rows"][0]["candidates"]["at"].index(first + 1)
        assert shown[: tiny.TOP_K] == [str(token) for token in data["rows"][0]["candidates"]["ids"][at]]
        assert browser.ask("panel.querySelector('.where').textContent").startswith(f"token {first + 1} ")

        colours = "tokens.map(e => getComputedStyle(e).backgroundColor).join()"
        seen = {browser.ask(colours)}
        for key in ("w_kd", "st_loss", "st_gap"):
            number = [one["key"] for one in data["quantities"]].index(key)
            browser.ask(f"quantityChoice.value = {number}; quantityChoice.dispatchEvent(new Event('change'))")
            assert browser.ask("quantity.key") == key
            seen.add(browser.ask(colours))
        assert len(seen) == 4, "each quantity has colours of its own"
        assert browser.ask("document.documentElement.scrollWidth <= innerWidth")

        browser.look_as(width=390, height=844, phone=True)
        browser.open(page)
        assert browser.ask("document.documentElement.scrollWidth") == 390, "nothing is wider than a phone"
        box = json.loads(
            browser.ask("tokens[5].scrollIntoView({block: 'center'}); JSON.stringify(tokens[5].getClientRects()[0])")
        )
        point = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}]
        browser.page("Input.dispatchTouchEvent", type="touchStart", touchPoints=point)
        browser.page("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.ask("new Promise(done => setTimeout(done, 300))")  # a tap becomes a click
        assert browser.ask("chosen") == 5
        assert browser.ask("panel.querySelector('.where').textContent").startswith("token 5 ")
        assert browser.ask("panel.querySelectorAll('.c .name').length") > 1
        assert browser.errors() == []
        assert browser.requests() == [page.resolve().as_uri()], "the page itself, and nothing else"
