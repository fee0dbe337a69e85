"""prepare over prompts, conversations and whole documents: what is in the stores, kills, limits, and the summary."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.common.errors import UserError
from potstill.storage import StoreReader, StoreWriter, verify_store
from potstill.teacher_dump import PrepareConfig, prepare, prepared
from potstill.teacher_dump.tokenizer import load_tokenizer
from tests.teacher_dump.tiny import CHAT_TEMPLATE, chat_tokenizer, some_texts, token_rows

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("chat") / "tokenizer")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    texts = [text for text in some_texts(90, seed=3) if text]
    return [(text[: len(text) // 3] + "?", text[len(text) // 3 :]) for text in texts]


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(path: Path, output: Path, tokenizer: Path, **changes: Any) -> PrepareConfig:
    settings = {"input": [path], "output": output, "tokenizer": tokenizer, "row_length": 48, "rows_per_unit": 4}
    settings |= {"heldout_fraction": 0.1, "max_untrained_fraction": 1.0}
    return PrepareConfig(**(settings | changes))


PROMPTS = {"prompt_field": "q", "response_field": "a", "prompt_format": "{prompt}\n"}
CHAT = {"messages_field": "talk"}
WHOLE = {"packing": "whole", "packing_window": 7}


def prompt_records(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"q": q, "a": a} for q, a in pairs]


def chat_records(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"talk": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]


def text_records(pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"text": f"{q}{a}"} for q, a in pairs]


def spans_of(store: Path, tokenizer: Any) -> list[tuple[str, str]]:
    """(what is read, what is trained on) of each span of each row, as text."""
    found = []
    for row in token_rows(store):
        assert row.mask is not None
        for part, mask in zip(
            *(np.split(a, np.cumsum(row.doc_lens)[:-1]) for a in (row.tokens, row.mask)), strict=True
        ):
            found.append((tokenizer.decode(part[~mask]), tokenizer.decode(part[mask])))
    return found


def test_whole_prompts_with_their_answers(tmp_path: Path, tokenizer: Path, pairs: list[tuple[str, str]]) -> None:
    path = write(tmp_path / "a.jsonl", prompt_records(pairs))
    summary = prepare(config(path, tmp_path / "out", tokenizer, **PROMPTS, **WHOLE, row_length=128, too_long="drop"))
    loaded = load_tokenizer(str(tokenizer))
    ends = "<|endoftext|>"
    num_ids = [len(loaded(f"{q}\n")["input_ids"]) + len(loaded(a)["input_ids"]) + 1 for q, a in pairs]
    wanted = {(f"{q}\n", a + ends) for (q, a), count in zip(pairs, num_ids, strict=True) if count <= 128}
    found = [span for part in ("train", "heldout") for span in spans_of(tmp_path / "out" / part, loaded)]
    assert len(found) == len(set(found)) and set(found) == wanted and 20 < len(wanted) < len(pairs)
    spec = StoreReader(tmp_path / "out" / "train").spec
    assert spec.columns == ("mask",) and spec.info["packing"] == {"rule": "whole", "window": 7, "too_long": "drop"}
    assert spec.info["record"]["prompt_format"] == "{prompt}\n"
    assert verify_store(tmp_path / "out" / "train", deep=True).ok
    text = summary.format()
    assert (
        "train: " in text and "of the rows is padding, which is stored nowhere" in text and "are trained on (" in text
    )
    assert f"{sum(count > 128 for count in num_ids)}" == str(sum(store.counts["too_long"] for store in summary.stores))
    store = summary.stores[0]
    rows = token_rows(store.path)  # type: ignore[arg-type]
    assert store.padding == pytest.approx(1 - sum(len(row.tokens) for row in rows) / (128 * len(rows)))
    assert store.counts["trained_tokens"] == sum(int(row.has_target().sum()) for row in rows)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@pytest.mark.parametrize(
    ("kind", "packing"),
    [("prompts", {}), ("chat", WHOLE), ("text", WHOLE), ("prompts", WHOLE | {"too_long": "split"})],
)
def test_a_killed_run_continues_to_equal_stores(
    kind: str,
    packing: dict[str, Any],
    tmp_path: Path,
    tokenizer: Path,
    pairs: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = {"prompts": prompt_records, "chat": chat_records, "text": text_records}[kind](pairs)
    keys = {"prompts": PROMPTS, "chat": CHAT, "text": {}}[kind] | packing
    path = write(tmp_path / "a.jsonl", [*records[:30], {"bad": 1}, *records[30:]] if kind != "text" else records)
    settings = {**keys, "max_bad_lines": 1, "rows_per_unit": 6}
    first = prepare(config(path, tmp_path / "whole", tokenizer, **settings))
    expected = {part: StoreReader(tmp_path / "whole" / part).digest for part in ("train", "heldout")}
    commit, left, kills = StoreWriter.commit_unit, 0, 0

    def dying_commit(self: StoreWriter, *args: Any, **options: Any) -> bool:
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        return commit(self, *args, **options)

    monkeypatch.setattr(StoreWriter, "commit_unit", dying_commit)
    while True:
        left = 1
        try:
            summary = prepare(config(path, tmp_path / "killed", tokenizer, **settings))
            break
        except Killed:
            kills += 1
    assert kills >= 5
    assert {part: StoreReader(tmp_path / "killed" / part).digest for part in ("train", "heldout")} == expected
    for one, other in zip(summary.stores, first.stores, strict=True):
        assert replace(one, path="") == replace(other, path="")
    assert summary.bad_lines == first.bad_lines == (kind != "text")
    again = prepare(config(path, tmp_path / "whole", tokenizer, **settings))
    assert again.stores == first.stores
    # Beside the stores: what asks the student later the way it was trained.
    assert load_tokenizer(str(tmp_path / "whole" / "tokenizer")).get_chat_template() == CHAT_TEMPLATE


def test_equal_prompts_fall_on_one_side_whatever_is_answered(tmp_path: Path, tokenizer: Path) -> None:
    records = [{"q": f"question {n % 40}", "a": f"answer {n}"} for n in range(120)]
    settings = PROMPTS | {"heldout_fraction": 0.0, "heldout_documents": 5}
    prepare(config(write(tmp_path / "a.jsonl", records), tmp_path / "out", tokenizer, **settings))
    loaded = load_tokenizer(str(tokenizer))
    questions = []
    for part in ("train", "heldout"):
        text = loaded.decode(np.concatenate([row.tokens for row in token_rows(tmp_path / "out" / part)]))
        questions.append({piece.split("\n")[0] for piece in text.split("<|endoftext|>")[1:-1]})
    assert len(questions[1]) == 5 and not questions[0] & questions[1] and len(questions[0]) == 35


def test_broken_records_are_counted_as_in_any_input(tmp_path: Path, tokenizer: Path) -> None:
    good = {"q": "what?", "a": "that"}
    path = write(tmp_path / "a.jsonl", [good, {"q": "no answer"}, {"q": "empty", "a": ""}, {"q": 1, "a": "x"}, good])
    settings = PROMPTS | {"heldout_fraction": 0.0}
    summary = prepare(config(path, tmp_path / "out", tokenizer, **settings, max_bad_lines=3))
    assert summary.bad_lines == 3 and summary.stores[0].documents == 2
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: no field 'a'; found \['q'\]; set response_field"):
        prepare(config(path, tmp_path / "other", tokenizer, **settings))
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(UserError, match="read as one plain text, and prompt_field and response_field name fields"):
        prepare(config(tmp_path / "plain.txt", tmp_path / "other", tokenizer, **settings))


@pytest.mark.parametrize(("packing", "what"), [({}, "rows"), (WHOLE, "documents")])
def test_too_much_that_trains_on_nothing(
    packing: dict[str, Any], what: str, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer than a row: answers are beyond its end (whole), or rows hold nothing else (cut)."""
    records = [{"q": "slow " * (90 if n % 4 == 0 else 2), "a": "clear " * 9} for n in range(40)]
    path = write(tmp_path / "a.jsonl", records)
    settings = PROMPTS | packing | {"heldout_fraction": 0.0, "max_untrained_fraction": 0.05}
    message = rf"\d+ of \d+ {what} have no token that is trained on \(\d+\.\d%\), 5\.0% are allowed \(max_untrained_fr"
    with pytest.raises(UserError, match=message):
        prepare(config(path, tmp_path / "out", tokenizer, **settings))
    # The same command with another limit continues.
    summary = prepare(config(path, tmp_path / "out", tokenizer, **settings | {"max_untrained_fraction": 0.9}))
    (store,) = summary.stores
    assert store.counts["untrained"] > 0 and f"{what} without one are left out" in summary.format()
    assert all(row.has_target().any() for row in token_rows(store.path))  # type: ignore[arg-type]
    if packing:
        assert (store.counts["untrained"], store.counts["judged"]) == (10, 40)
    # A long run is told early, before the end of its input.
    monkeypatch.setattr(prepared, "_JUDGED_AT_LEAST", 8)
    monkeypatch.setattr(prepared.Output, "close", lambda *_, **__: pytest.fail("read to the end"))
    with pytest.raises(UserError, match=message):
        prepare(config(path, tmp_path / "early", tokenizer, **settings))


def test_nothing_but_prompts_beyond_the_rows(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "slow " * 200, "a": "x"}])
    with pytest.raises(UserError, match="1 of 1 documents have no token that is trained on"):
        prepare(config(path, tmp_path / "out", tokenizer, **PROMPTS, **WHOLE, max_untrained_fraction=0.5))
    with pytest.raises(UserError, match="holds no text to train on"):
        prepare(config(path, tmp_path / "out", tokenizer, **PROMPTS, **WHOLE, heldout_fraction=0.0))
    assert not (tmp_path / "out").exists()


def test_grade_school_maths_whole(tmp_path: Path) -> None:
    source = SHARED / "math-gsm8k" / "valid.jsonl.xz"
    tokenizer = SHARED / "tokenizers" / "demo-bpe-8k"
    if not source.is_file() or not tokenizer.is_dir():
        pytest.skip(f"{source} or {tokenizer} is not there")
    with lzma.open(source, "rt") as stream:
        texts = [json.loads(line)["text"] for line in stream][:200]
    records = [dict(zip(("q", "a"), text.split("\nAnswer: "), strict=True)) for text in texts]
    path = write(tmp_path / "a.jsonl", records)
    keys = PROMPTS | {"prompt_format": "{prompt}\nAnswer:", "response_format": " {response}"}
    settings = keys | {"packing": "whole", "row_length": 512, "heldout_fraction": 0.0, "max_untrained_fraction": 0.0}
    summary = prepare(config(path, tmp_path / "out", tokenizer, **settings))
    assert summary.stores[0].padding < 0.05 and summary.stores[0].counts["untrained"] == 0
    spans = spans_of(tmp_path / "out" / "train", load_tokenizer(str(tokenizer)))
    assert {f"{read}{trained}" for read, trained in spans} == {f"{text}<|endoftext|>" for text in texts}
    assert all(trained.startswith(" ") and "The answer is" in trained for _, trained in spans)
