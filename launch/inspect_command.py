"""The command `inspect`: what a store holds, and single rows of it with the teacher's candidates."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from potstill.common.errors import UserError
from potstill.common.exit_codes import DONE
from potstill.launch.command import Command
from potstill.launch.text import print_table


def _load_decode(tokenizer: Path | None) -> Callable[[Sequence[int]], str]:
    """How to show token ids: as text if there is a tokenizer, else as numbers."""
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise UserError(f"no tokenizer in {tokenizer}: expected {file}")
    loaded = Tokenizer.from_file(str(file))
    return lambda ids: str(loaded.decode(list(ids), skip_special_tokens=False))


def _inspect(arguments: argparse.Namespace) -> int:
    from potstill.storage import StoreReader, format_row

    reader = StoreReader(arguments.store, allow_partial=arguments.partial)
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
    decode = _load_decode(arguments.tokenizer)
    print(format_row(under, over, arguments.row, decode, arguments.max_tokens, arguments.candidates))
    return DONE


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", help="folder of a tokens, targets or scores store")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--row", type=int, metavar="N", help="show this row token by token")
    parser.add_argument("--max-tokens", type=int, default=32, metavar="N", help="tokens of the row (default 32)")
    parser.add_argument("--candidates", type=int, default=5, metavar="N", help="candidates per token (default 5)")
    parser.add_argument("--tokens", metavar="STORE", help="tokens store under a targets or scores store")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="show tokens as text, not as numbers")
    parser.add_argument("--partial", action="store_true", help="look into a store that is not sealed yet")


INSPECT = Command(
    name="inspect",
    summary="what a store holds, and one row of it with the teacher's candidates",
    description="Without --row, print what the store is: kind, teacher, selection, digests. With --row, print the row "
    "token by token, and what the teacher or the small model says about the next one: the label's probability and "
    "rank, the entropy, the mass outside, the first candidates. A bar marks the end of a document, a star the label.",
    examples=(
        "potstill inspect targets/train",
        "potstill inspect targets/train --row 17 --tokens data/train --tokenizer data/tokenizer",
    ),
    add_arguments=_inspect_arguments,
    run=_inspect,
)
