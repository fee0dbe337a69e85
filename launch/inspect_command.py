"""The command `inspect`: what a store holds, and single rows of it with the teacher's candidates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from potstill.common.disk_room import write_whole
from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE
from potstill.common.text_tables import print_table
from potstill.launch.command import Command
from potstill.launch.inspect.flags import FLAGS, add_student_arguments

if TYPE_CHECKING:
    from potstill.launch.inspect.data import Sources
    from potstill.storage import StoreReader

TEXT_CANDIDATES, PAGE_CANDIDATES = 5, 20


def _load_decode(tokenizer: Path | None, tokens: StoreReader) -> Callable[[Sequence[int]], str]:
    """How to show token ids: as text if there is a tokenizer, else as numbers. Raises UserError."""
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    from potstill.common.token_table import tokenizer_file
    from potstill.launch.store_tokenizer import check_tokenizer

    check_tokenizer(tokenizer, digest=tokens.spec.tokenizer_digest, store=tokens.url)
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer_file(tokenizer)))
    return lambda ids: str(loaded.decode(list(ids), skip_special_tokens=False))


def _inspect(arguments: argparse.Namespace) -> int:
    from potstill.storage import StoreReader, format_row

    reader = StoreReader(arguments.store, allow_partial=arguments.partial)
    if arguments.html is not None:
        return _write_page(arguments, reader)
    for flag, name in {"rows": "rows", "scores": "scores", **FLAGS}.items():
        if getattr(arguments, name) is not None:
            raise UserError(f"--{flag} is for the page that --html writes; add --html FILE")
    if arguments.row is None:
        spec = {name: value for name, value in reader.spec.to_json().items() if value not in (None, [], {})}
        about = {"store": reader.url, "digest": reader.digest, "tokens": reader.num_tokens}
        about |= {**spec, "num_rows": reader.num_rows}
        plain = [(name, value if isinstance(value, str | int) else json.dumps(value)) for name, value in about.items()]
        if arguments.json:
            print(json.dumps(about))
        else:
            print_table(["field", "value"], plain, align="<<")
        return DONE
    if not 0 <= arguments.row < reader.num_rows:
        raise UserError(f"--row {arguments.row}: {arguments.store} has rows 0 to {reader.num_rows - 1}")
    under, over = (reader, None) if reader.spec.kind == "tokens" else (None, reader)
    if under is None:
        if arguments.tokens is None:
            raise UserError(
                f"{arguments.store} holds {reader.spec.kind}; name the tokens store that it was made from with --tokens"
            )
        under = StoreReader(arguments.tokens)
    decode = _load_decode(arguments.tokenizer, under)
    print(format_row(under, over, arguments.row, decode, arguments.max_tokens, arguments.candidates or TEXT_CANDIDATES))
    return DONE


def _page_rows(arguments: argparse.Namespace, num_rows: int) -> list[int]:
    """Rows that --row or --rows names. Raises UserError."""
    if (arguments.row is None) == (arguments.rows is None):
        raise UserError("--html shows single rows; give one of --row 17 and --rows 0:10 (the end is left out)")
    first, _, end = (arguments.rows or f"{arguments.row}:{(arguments.row or 0) + 1}").partition(":")
    try:
        rows = list(range(int(first), int(end)))
    except ValueError as error:
        raise UserError(f"--rows {arguments.rows}: expected two numbers, FIRST:END, as in 0:10") from error
    if not rows or rows[0] < 0 or rows[-1] >= num_rows:
        raise UserError(f"rows {first}:{end}: {arguments.store} has rows 0 to {num_rows - 1}; name some of them")
    return rows


def _page_sources(arguments: argparse.Namespace, reader: StoreReader) -> Sources:
    """The stores by kind, as they were given. Raises UserError."""
    from potstill.common.token_table import read_token_table
    from potstill.launch.inspect.data import Sources
    from potstill.launch.store_tokenizer import check_tokenizer
    from potstill.storage import StoreReader

    kind = reader.spec.kind
    if kind != "tokens" and arguments.tokens is None:
        raise UserError(f"{arguments.store} holds {kind}; name the tokens store that it was made from with --tokens")
    if kind == "scores" and arguments.scores is not None:
        raise UserError(f"{arguments.store} holds scores, and so does --scores; give one of them")
    scores = reader if kind == "scores" else None
    if arguments.scores is not None:
        scores = StoreReader(arguments.scores)
    tokens = reader if kind == "tokens" else StoreReader(arguments.tokens)
    if arguments.tokenizer is not None:
        check_tokenizer(arguments.tokenizer, digest=tokens.spec.tokenizer_digest, store=tokens.url)
    return Sources(
        tokens=tokens,
        targets=reader if kind == "targets" else None,
        scores=scores,
        table=None if arguments.tokenizer is None else read_token_table(arguments.tokenizer),
    )


def _write_page(arguments: argparse.Namespace, reader: StoreReader) -> int:
    """Write one page over the rows to a file, or one page per row into a folder."""
    from potstill.launch.inspect.data import page_data
    from potstill.launch.inspect.page import render_page
    from potstill.launch.inspect.student import student_part

    rows = _page_rows(arguments, reader.num_rows)
    sources = _page_sources(arguments, reader)
    is_file = arguments.html.suffix in (".html", ".htm")
    groups = [rows] if is_file else [[row] for row in rows]
    names = [arguments.html] if is_file else [arguments.html / f"row_{row}.html" for row in rows]
    standing = [name for name in names if name.exists()]
    if standing and not arguments.force:
        raise UserError(f"{standing[0]} exists; name another file, or add --force to overwrite it")
    part = student_part(arguments, sources.tokens, rows)
    extras = None if part is None else dict(zip(rows, part.extras, strict=True))
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        page = render_page(
            page_data(
                sources,
                group,
                max_candidates=arguments.candidates or PAGE_CANDIDATES,
                extras=None if extras is None else [extras[row] for row in group],
                about=() if part is None else part.about,
            ),
            previous=names[number - 1].name if number else None,
            following=names[number + 1].name if number + 1 < len(names) else None,
        )
        write_whole(name, page)
    print(f"wrote {arguments.html}: {len(rows)} rows" + ("" if is_file else f", {names[0].name} to {names[-1].name}"))
    return DONE


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of a tokens, targets or scores store")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--row", type=int, metavar="N", help="show this row token by token")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="tokens of the row (default 32)")
    parser.add_argument("--candidates", type=int, metavar="N", help="candidates per token (default 5; 20 with --html)")
    parser.add_argument("--tokens", metavar="STORE", help="tokens store under a targets or scores store")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="show tokens as text, not as numbers")
    parser.add_argument(
        "--html", type=Path, metavar="PLACE", help="write a page: FILE.html with all rows, or a folder, a page per row"
    )
    parser.add_argument("--rows", metavar="FIRST:END", help="with --html: several rows, 0:10 for the first ten")
    parser.add_argument("--scores", metavar="STORE", help="with --html: scores of a small model over the same rows")
    add_student_arguments(parser)
    parser.add_argument("--force", action="store_true", help="with --html: overwrite what stands there")
    parser.add_argument("--partial", action="store_true", help="look into a store that is not sealed yet")


INSPECT = Command(
    name="inspect",
    summary="what a store holds, and one row of it with the teacher's candidates",
    description="Without --row, print what the store is: kind, teacher, selection, digests. With --row, print the row "
    "token by token, and what the teacher or the small model says about the next one: the label's probability and "
    "rank, the entropy, the mass outside, the first candidates. A dash marks a token that is not trained on, a bar the "
    "end of a document, a star the label. With --html, write a page that needs no network: the text shaded by loss, "
    "rank, entropy or tail, and the teacher's candidates of each token; with --run also by what a step of the run "
    "keeps, and by the student's loss.",
    examples=(
        "potstill inspect targets/train",
        "potstill inspect targets/train --row 17 --tokens data/train --tokenizer data/tokenizer",
        "potstill inspect targets/train --html rows.html --rows 0:10 --tokens data/train --tokenizer data/tokenizer "
        "--scores data/scores",
        "potstill inspect targets/train --html rows.html --rows 0:10 --tokens data/train --tokenizer data/tokenizer "
        "--run runs/student --step 0.5",
    ),
    add_arguments=_inspect_arguments,
    run=_inspect,
)
