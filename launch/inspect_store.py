"""What a store holds, as text: the run, one row position by position, and figures over all rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.errors import UserError
from potstill.launch.text import format_bytes, table
from potstill.storage import MismatchError, Row, StoreReader, TargetsRow, TokensRow, token_digest

SHOWN_CANDIDATES = 5
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def load_words(tokenizer: Path | None) -> Callable[[int], str]:
    """How to show a token id: as its text if a tokenizer folder is given, else as the number."""
    if tokenizer is None:
        return str
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise UserError(f"no tokenizer in {tokenizer}: expected {file}")
    loaded = Tokenizer.from_file(str(file))
    return lambda token: repr(loaded.decode([token], skip_special_tokens=False))


def describe_store(reader: StoreReader) -> dict[str, Any]:
    """The run and the totals of a store, as plain JSON values."""
    spec = reader.spec.to_json()
    kept = {name: value for name, value in spec.items() if value not in (None, [], {})}
    totals = {"rows": reader.num_rows, "tokens": reader.num_tokens, "digest": reader.digest}
    return {"store": reader.url, **totals, **kept}


def store_text(reader: StoreReader) -> str:
    """`describe_store` for a terminal."""
    rows = [
        (name, value if isinstance(value, str | int | float) else json.dumps(value))
        for name, value in describe_store(reader).items()
    ]
    return table(["field", "value"], rows, align="<<")


def find_tokens(reader: StoreReader, row: int, tokens: StoreReader | None) -> TokensRow | None:
    """The tokens under a row: the row itself in a tokens store, else from `tokens`, which must be the input."""
    found = reader.row(row)
    if isinstance(found, TokensRow):
        return found
    if tokens is None:
        return None
    under = tokens.row(row)
    if not isinstance(under, TokensRow) or token_digest(under.tokens, under.doc_lens) != found.token_digest:
        raise MismatchError(
            f"row {row} of {reader.url} was not made from row {row} of {tokens.url}; "
            f"its input has digest {reader.spec.input_digest}, this one {tokens.digest}"
        )
    return under


def row_text(row: Row, tokens: TokensRow | None, *, word: Callable[[int], str], start: int, count: int) -> str:
    """Positions [start, start + count) of one row: token, and what teacher or small model say about the next one."""
    length = len(row.tokens) if isinstance(row, TokensRow) else len(_label_ranks(row))
    if not 0 <= start < max(length, 1):
        raise UserError(f"position {start} is outside row {row.row}, which has {length} tokens")
    ends = set() if tokens is None else set((np.cumsum(tokens.doc_lens) - 1).tolist())
    lines = []
    for position in range(start, min(start + count, length)):
        shown = "" if tokens is None else word(int(tokens.tokens[position]))
        lines.append((position, shown + (" |" if position in ends else ""), *_about(row, position, word)))
    header = ["position", "token"]
    if isinstance(row, TargetsRow):
        header += ["label rank", "label p", "entropy", "kept", "tail", "first candidates"]
    elif not isinstance(row, TokensRow):
        header += ["label rank", "label p", "entropy"]
    align = ">>" + ">" * (len(header) - 3) + "<" if isinstance(row, TargetsRow) else ""
    return table(header, lines, align=align)


def _label_ranks(row: Any) -> Sequence[int]:
    ranks = row.targets.label_rank if isinstance(row, TargetsRow) else row.label_rank
    return np.zeros(row.targets.num_tokens, np.int32) if ranks is None else ranks


def _about(row: Row, position: int, word: Callable[[int], str]) -> tuple[str, ...]:
    if isinstance(row, TokensRow):
        return ()
    source: Any = row.targets if isinstance(row, TargetsRow) else row
    label = "-" if source.label_logprob is None else f"{math.exp(source.label_logprob[position]):.4f}"
    rank = "-" if source.label_rank is None else str(source.label_rank[position])
    entropy = "-" if source.entropy is None else f"{source.entropy[position]:.3f}"
    if not isinstance(row, TargetsRow):
        return rank, label, entropy
    targets = row.targets
    first, last = int(targets.offsets[position]), int(targets.offsets[position + 1])
    if first == last and targets.log_tail[position] == 0.0:
        return "-", "-", "-", "0", "-", "(no target here)"
    tail = f"{math.exp(targets.log_tail[position]):.4f}"
    shown = []
    for entry in range(first, min(last, first + SHOWN_CANDIDATES)):
        if targets.logprobs is not None:
            weight = f"{math.exp(targets.logprobs[entry]):.3f}"
        else:
            assert targets.counts is not None
            weight = f"x{int(targets.counts[entry])}"
        shown.append(f"{word(int(targets.ids[entry]))} {weight}")
    return rank, label, entropy, str(last - first), tail, ", ".join(shown)


def statistics(reader: StoreReader, *, max_rows: int) -> dict[str, Any]:
    """Figures over all rows from the index, and over the tokens of `max_rows` rows spread evenly over the store.

    Quantiles are at `QUANTILES`. Positions without a target or label do not count.
    """
    found: dict[str, Any] = {
        "rows": reader.num_rows,
        "tokens": reader.num_tokens,
        "bytes": reader.manifest.num_bytes,
        "bytes_per_token": reader.manifest.num_bytes / max(reader.num_tokens, 1),
        "row_length": _quantiles(reader.row_lengths),
        **{f"row.{name}": _quantiles(values) for name, values in reader.row_stats.items()},
    }
    if reader.spec.kind == "tokens" or reader.num_rows == 0:
        return found
    rows = np.unique(np.linspace(0, reader.num_rows - 1, min(max_rows, reader.num_rows)).astype(np.int64))
    parts: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(rows), 16):
        for row in reader.rows(rows[first : first + 16].tolist()):
            for name, values in _token_figures(row).items():
                parts.setdefault(name, []).append(values)
    found["rows_read"] = len(rows)
    found |= {f"token.{name}": _quantiles(np.concatenate(values)) for name, values in parts.items()}
    return found


def _token_figures(row: Row) -> dict[str, np.ndarray]:
    assert not isinstance(row, TokensRow)
    source: Any = row.targets if isinstance(row, TargetsRow) else row
    figures = {"entropy": source.entropy, "label_logprob": source.label_logprob, "label_rank": source.label_rank}
    if isinstance(row, TargetsRow):
        kept = np.diff(row.targets.offsets)
        with_target = (kept > 0) | (row.targets.log_tail != 0)
        figures |= {"kept_entries": kept, "kept_mass": -np.expm1(row.targets.log_tail.astype(np.float64))}
    else:
        with_target = source.label_logprob != 0
    return {name: values[with_target] for name, values in figures.items() if values is not None}


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if len(values) == 0:
        return {"count": 0}
    known = np.asarray(values, dtype=np.float64)
    levels = np.quantile(known, QUANTILES)
    return {
        "count": len(known),
        "mean": float(known.mean()),
        **{f"q{int(q * 100):02d}": float(level) for q, level in zip(QUANTILES, levels, strict=True)},
    }


def statistics_text(figures: Mapping[str, Any]) -> str:
    """`statistics` for a terminal."""
    plain = [
        f"{name.replace('_', ' ')}: {format_bytes(value) if name == 'bytes' else f'{value:,.6g}'}"
        for name, value in figures.items()
        if not isinstance(value, dict)
    ]
    columns = ["count", "mean", *(f"q{int(q * 100):02d}" for q in QUANTILES)]
    rows = [
        (name.replace("_", " "), *(f"{value[column]:,.5g}" if column in value else "-" for column in columns))
        for name, value in figures.items()
        if isinstance(value, dict)
    ]
    return "\n".join([*plain, table(["over rows / tokens", *columns], rows)])
