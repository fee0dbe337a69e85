"""format_row: one row for human eyes, each token with what the teacher expected next."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from potstill.storage.errors import MismatchError, StoreError
from potstill.storage.rows.row_types import NO_LABEL, ScoresRow, TargetsRow, TokensRow
from potstill.storage.rows.sparse_targets import SparseTargets
from potstill.storage.store.reader import StoreReader

Decode = Callable[[Sequence[int]], str]
TEXT_WIDTH = 16


def format_row(
    reader_tokens: StoreReader,
    reader_targets: StoreReader | None,
    row: int,
    decode: Decode,
    max_tokens: int,
    max_candidates: int,
) -> str:
    """Lines of one row: position, token, next token, its rank and probability, candidates with their probabilities.

    `decode` turns ids into text. A `-` marks a token that is not trained on, `|` a document's last token, `*` the
    candidate that is the label. Raises MismatchError when the stores do not belong together.
    """
    tokens = reader_tokens.row(row)
    if not isinstance(tokens, TokensRow):
        raise StoreError(f"{reader_tokens.url} is of kind {reader_tokens.spec.kind}, expected tokens")
    trained = "" if tokens.mask is None else f", {int(tokens.mask.sum())} of them trained on"
    lines = [f"row {row}: {len(tokens.tokens)} tokens{trained}, documents of {tokens.doc_lens.tolist()} tokens"]
    joined = None if reader_targets is None else reader_targets.row(row)
    if joined is not None:
        if isinstance(joined, TokensRow):
            raise StoreError("the second store is of kind tokens, expected targets or scores")
        digest = tokens.digest()
        if joined.token_digest != digest:
            raise MismatchError(f"row {row}: the stores hold different tokens ({digest:#x}, {joined.token_digest:#x})")
        lines += [f"  {name} {value:.4f}" for name, value in joined.stats.items()]
        if isinstance(joined, ScoresRow):
            lines += [f"  {name} of each document: {np.round(v, 4).tolist()}" for name, v in joined.more.items()]
    ends = set((np.cumsum(tokens.doc_lens) - 1).tolist())
    has_tail = reader_targets is None or reader_targets.spec.normaliser == "vocabulary"
    for n, label in enumerate(tokens.labels()[:max_tokens].tolist()):
        is_off = tokens.mask is not None and not tokens.mask[n]
        head = f"{n:>6}{'-' if is_off else ' '}{_text(decode, int(tokens.tokens[n]))}{'|' if n in ends else ' '}"
        said = _teacher_text(joined, n, None if label == NO_LABEL else label, has_tail=has_tail)
        if isinstance(joined, TargetsRow) and joined.targets.offsets[n] < joined.targets.offsets[n + 1]:
            said += " :" + _candidates(joined.targets, n, label, decode, max_candidates)
        lines.append(head + said)
    if len(tokens.tokens) > max_tokens:
        lines.append(f"  ... {len(tokens.tokens) - max_tokens} more tokens")
    return "\n".join(lines)


def _teacher_text(joined: TargetsRow | ScoresRow | None, n: int, label: int | None, *, has_tail: bool) -> str:
    if joined is None:
        return ""
    if isinstance(joined, ScoresRow):
        if label is None:
            return ""
        return f" p(label) {np.exp(joined.label_logprob[n]):.3f} rank {_rank(int(joined.label_rank[n]))}"
    targets = joined.targets
    if targets.offsets[n] == targets.offsets[n + 1]:
        return " no target"
    parts = []
    if targets.label_logprob is not None and label is not None:
        parts.append(f"p(label) {np.exp(targets.label_logprob[n]):.3f}")
    if targets.label_rank is not None and label is not None:
        parts.append(f"rank {_rank(int(targets.label_rank[n]))}")
    if targets.entropy is not None:
        parts.append(f"H {targets.entropy[n]:.2f}")
    parts.append(f"tail {np.exp(targets.log_tail[n]):.3f}" if has_tail else "tail unknown")
    return " " + " ".join(parts)


def _candidates(targets: SparseTargets, n: int, label: int, decode: Decode, max_candidates: int) -> str:
    one = targets.slice(n, n + 1)
    kind, mass = one.entry_mass()
    parts = []
    for entry in range(min(one.num_entries, max_candidates)):
        token = int(one.ids[entry])
        mark = "*" if token == label else ""
        if kind == "share":
            assert one.counts is not None
            weight = f"{int(one.counts[entry])}/{one.num_draws}"
        else:
            weight = f"{'w' if kind == 'weight' else ''}{mass[entry]:.3f}"
        parts.append(f" {mark}{_text(decode, token).rstrip()} {weight}")
    rest = one.num_entries - max_candidates
    return ",".join(parts) + (f", +{rest}" if rest > 0 else "")


def _text(decode: Decode, token: int) -> str:
    """Printable, single-line, fixed-width text of one token (terminal control codes escaped)."""
    shown = repr(decode([token]))
    return (shown if len(shown) <= TEXT_WIDTH else shown[: TEXT_WIDTH - 2] + "..").ljust(TEXT_WIDTH)


def _rank(rank: int) -> str:
    return ">=255" if rank >= 255 else str(rank)
