"""The page of `inspect --html`: its data against the stores, and that no token can break out of it."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.token_table import TokenTable, read_token_table
from potstill.launch.cli import main
from potstill.launch.inspect.data import data_json
from potstill.launch.inspect.page import render_page
from potstill.launch.inspect.text import piece_text, row_texts
from potstill.storage import StoreReader, StoreWriter, TargetsRow, TokensRow
from tests.chromium import Chromium, find_chromium
from tests.launch.conftest import write_targets


class Parts(HTMLParser):
    """Contents of the script elements, and every address that a page names."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += [""] if tag == "script" else []
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts and not self.scripts[-1]:
            self.scripts[-1] = data


def data_of(page: Path) -> dict[str, Any]:
    parts = Parts(page.read_text(encoding="utf-8"))
    assert len(parts.scripts) == 2
    found: dict[str, Any] = json.loads(parts.scripts[0])
    return found


@pytest.fixture(scope="module")
def targets(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("page") / "targets"
    write_targets(data / "train", store)
    assert main(["seal", str(store)]) == 0
    return store


def options(data: Path) -> list[str]:
    return ["--tokens", str(data / "train"), "--tokenizer", str(data / "tokenizer")]


def test_the_page_holds_what_the_stores_hold(targets: Path, data: Path, tmp_path: Path) -> None:
    assert main(["inspect", str(targets), "--html", str(tmp_path / "p.html"), "--rows", "1:3", *options(data)]) == 0
    page = data_of(tmp_path / "p.html")
    assert [row["row"] for row in page["rows"]] == [1, 2]
    for shown in page["rows"]:
        tokens, taught = StoreReader(data / "train").row(shown["row"]), StoreReader(targets).row(shown["row"])
        assert isinstance(tokens, TokensRow) and isinstance(taught, TargetsRow)
        assert shown["ids"] == tokens.tokens.tolist() and shown["docs"] == tokens.doc_lens.tolist()
        starts = set((np.cumsum(tokens.doc_lens) - tokens.doc_lens).tolist())
        assert [n for n, known in enumerate(shown["predicted"]) if not known] == sorted(starts)
        assert shown["candidates"]["at"] == [n for n in range(len(tokens.tokens)) if n not in starts]
        for at, ids, shares in zip(*(shown["candidates"][name] for name in ("at", "ids", "p")), strict=True):
            first, last = taught.targets.offsets[at - 1 : at + 1]
            assert ids == taught.targets.ids[first:last].tolist()
            assert ids[0] == shown["ids"][at], "the made-up teacher's first candidate is the true token"
            assert shares == pytest.approx(np.exp(taught.targets.logprobs[first:last]), rel=1e-3)  # type: ignore[index]
            assert shown["values"]["t_loss"][at] == pytest.approx(-taught.targets.label_logprob[at - 1], rel=1e-3)  # type: ignore[index]
        assert all(shown["values"]["t_rank"][n] is None for n in starts)
    assert {one["key"] for one in page["quantities"]} == {"t_loss", "t_rank", "t_entropy", "t_tail"}


def test_a_page_needs_nothing_else_and_overwrites_nothing(
    targets: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["inspect", str(targets), "--html", str(tmp_path / "pages"), "--rows", "0:3", *options(data)]
    assert main(words) == 0
    pages = sorted((tmp_path / "pages").iterdir())
    assert [page.name for page in pages] == ["row_0.html", "row_1.html", "row_2.html"]
    assert Parts(pages[1].read_text()).addresses == ["row_0.html", "row_2.html"]
    assert "http" not in pages[1].read_text()
    assert main(words) == 1
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html", "p.html"], "give one of --row 17 and --rows 0:10"),
        (["--html", "p.html", "--rows", "0:9999"], "has rows 0 to"),
        (["--html", "p.html", "--rows", "3"], "FIRST:END"),
        (["--html", "p.html", "--row", "0"], "with --tokens"),
        (["--rows", "0:3"], "add --html FILE"),
    ],
)
def test_wrong_requests_are_told(
    targets: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(targets), *words]) == 1
    assert message in capsys.readouterr().err


def test_another_tokenizer_is_refused(
    targets: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = data / "tokenizer" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    first, second = [piece for piece, token in vocab.items() if token in (20, 21)]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(tree))
    for place in (other, tmp_path):
        for words in (["--html", str(tmp_path / "p.html")], []):
            words += ["--row", "0", "--tokens", str(data / "train"), "--tokenizer", str(place)]
            assert main(["inspect", str(targets), *words]) == 1
            assert "the tokenizer that prepare used" in capsys.readouterr().err
    assert main(["inspect", str(targets), "--row", "0", "--tokens", str(data / "train"), "--tokenizer", str(file)]) == 0


def test_no_token_breaks_out_of_the_page() -> None:
    evil = ["</script><script>alert(1)</script>", "<!--<script>", "\"'&\u2028\u2029", "\x00\x1b[31m\ud800"]
    data = {"title": evil[0], "about": [[evil[1], evil[0]]], "names": evil, "rows": [], "quantities": [], "short": []}
    text = data_json(data)
    assert not set("<>&\u2028\u2029\x00\x1b") & set(text)
    assert json.loads(text) == data
    parts = Parts(render_page(data))
    assert len(parts.scripts) == 2 and json.loads(parts.scripts[0])["names"] == evil


def test_characters_cut_over_tokens_stand_whole_where_they_end(data: Path) -> None:
    from tokenizers import Tokenizer

    table = read_token_table(data / "tokenizer")
    text = "café 日本 👩‍🚀\n</script>"
    ids = Tokenizer.from_file(str(data / "tokenizer" / "tokenizer.json")).encode(text).ids
    texts = row_texts(ids, [len(ids)], table)
    assert "".join(texts) == text and "" in texts and "日" in texts
    assert piece_text(ids[texts.index("")], table).startswith("\\x")
    # A row that was cut inside a character: nothing is lost or raised.
    assert row_texts([1, 2], [1, 1], TokenTable({1: b"\xe6\x97", 2: b"\xa5x"}, frozenset(), "byte_level")) == [
        "\\xe6\\x97",
        "\\xa5x",
    ]
    assert row_texts([5, 6], [2], None) == ["5", "6"]


@pytest.fixture(scope="module")
def half_trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The prepared tokens with the first half of every row but the first not trained on, and targets over them."""
    folder, plain = tmp_path_factory.mktemp("masked"), StoreReader(data / "train")
    writer = StoreWriter.create(folder / "tokens", replace(plain.spec, columns=("mask",)))
    for unit, first in enumerate(range(0, plain.num_rows, plain.spec.rows_per_unit)):
        rows = plain.tokens_rows(range(first, min(first + plain.spec.rows_per_unit, plain.num_rows)))
        masks = [np.arange(len(row.tokens)) >= len(row.tokens) // 2 if row.row else None for row in rows]
        writer.commit_unit(unit, [replace(row, mask=mask) for row, mask in zip(rows, masks, strict=True)])
    assert main(["seal", str(folder / "tokens")]) == 0
    write_targets(folder / "tokens", folder / "targets")
    assert main(["seal", str(folder / "targets")]) == 0
    return folder / "tokens", folder / "targets"


def test_the_page_knows_what_is_not_trained_on(half_trained: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    tokens, targets = half_trained
    words = ["--rows", "0:2", "--tokens", str(tokens), "--tokenizer", str(data / "tokenizer")]
    assert main(["inspect", str(targets), "--html", str(tmp_path / "p.html"), *words]) == 0
    plain, masked = data_of(tmp_path / "p.html")["rows"]
    num_tokens = len(masked["ids"])
    assert plain["masked"] == [] and masked["masked"] == list(range(num_tokens // 2))
    assert not any(masked["predicted"][: num_tokens // 2]) and masked["candidates"]["at"][0] >= num_tokens // 2
    assert all(value is None for value in masked["values"]["t_loss"][: num_tokens // 2])
    assert ["trained on", str(num_tokens - num_tokens // 2)] in masked["figures"]
    assert "trained on" not in dict(plain["figures"])


def test_a_browser_greys_what_is_not_trained_on(half_trained: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine: the page is not looked at in a browser")
    tokens, targets = half_trained
    words = ["--rows", "0:2", "--tokens", str(tokens), "--tokenizer", str(data / "tokenizer")]
    assert main(["inspect", str(targets), "--html", str(tmp_path / "p.html"), *words]) == 0
    with Chromium(program, seconds=60) as browser:
        browser.look_as(width=1280)
        browser.open(tmp_path / "p.html")
        colour = "getComputedStyle(tokens[{}]).color"
        assert (
            browser.ask("$('masks').hidden") and browser.ask("document.querySelectorAll('#text .masked').length") == 0
        )
        browser.ask("step(1)")
        assert not browser.ask("$('masks').hidden")
        assert browser.ask(colour.format(1)) != browser.ask(colour.format(31))
        browser.ask("choose(1, false)")
        assert browser.ask("panel.querySelector('.truth').textContent").startswith("Not trained on: the mask")
        assert browser.errors() == []
