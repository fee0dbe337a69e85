"""Read a store without training: what the teacher expected at each position of a row, as a plain-text table.

Shows: opening stores, joining a row of tokens with its targets, and the teacher's candidates of one token. Needs
neither torch nor pandas, only a tokenizer to turn ids into text.

    python examples/read_store.py --tokens data/train --targets targets --tokenizer data/tokenizer --row 0

`rank` is the place of the text's own next token among all the teacher's (0: what it held most likely), `tail` the
probability of everything that was not kept (unknown in a store whose targets are relative to the kept ones alone).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from potstill.storage import NO_LABEL, RowDataset, RowSample, StoreReader

HEADER = ("pos", "token", "next", "p(next)", "rank", "tail", "candidates")


def records(
    sample: RowSample, text: Callable[[int], str], *, num_candidates: int, has_tail: bool = True
) -> Iterator[tuple[str, str, str, str, str, str, str]]:
    """One record per position: the columns of HEADER."""
    targets, labels = sample.targets("teacher").targets, sample.tokens.labels()
    ends = np.cumsum(sample.tokens.doc_lens) - 1
    for position, (token, label) in enumerate(zip(sample.tokens.tokens.tolist(), labels.tolist(), strict=True)):
        here = (str(position), text(token))
        found = targets.candidates(position)
        if label == NO_LABEL:
            yield (*here, "(end of document)" if position in ends else "(not trained on)", "", "", "", "")
            continue
        if len(found.ids) == 0:
            yield (*here, text(label), "", "", "", "no target")
            continue
        best = zip(found.ids[:num_candidates].tolist(), found.probs[:num_candidates].tolist(), strict=True)
        more = len(found.ids) - num_candidates
        yield (
            *here,
            text(label),
            "" if targets.label_logprob is None else f"{math.exp(targets.label_logprob[position]):.3f}",
            "" if targets.label_rank is None else str(targets.label_rank[position]),
            f"{found.tail:.3f}" if has_tail else "unknown",
            " ".join(f"{text(candidate)} {prob:.3f}" for candidate, prob in best) + (f" +{more}" if more > 0 else ""),
        )


def table(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side, each as wide as its widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def show(options: argparse.Namespace) -> str:
    """The table of one row."""
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))

    def text(token: int) -> str:
        return repr(tokenizer.decode([token], skip_special_tokens=False))

    targets = StoreReader(options.targets)
    sample = RowDataset(StoreReader(options.tokens), {"teacher": targets})[options.row]
    has_tail = targets.spec.normaliser == "vocabulary"
    lines = [HEADER, *records(sample, text, num_candidates=options.candidates, has_tail=has_tail)]
    return table(lines[: options.positions + 1])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="tokens store (potstill prepare)")
    parser.add_argument("--targets", type=Path, required=True, help="targets store of these tokens (potstill dump)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--row", type=int, default=0, help="number of the row (0)")
    parser.add_argument("--positions", type=int, default=40, help="positions of the row to show (40)")
    parser.add_argument("--candidates", type=int, default=5, help="candidates per position (5)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    print(show(parse()))
