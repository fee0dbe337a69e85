"""What the page of `potstill inspect --html` shows, as plain data: rows, candidates, quantities to shade by.

Everything is put at the token that is predicted: the figures of token i are those of position i - 1 of the stores,
whose target is token i. The first token of a document is predicted nowhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.common.token_table import TokenTable
from potstill.launch.inspect.text import piece_text, row_texts
from potstill.storage import MismatchError, ScoresRow, SparseTargets, StoreReader, TargetsRow, TokensRow, token_digest

Values = NDArray[Any]
QUANTILE = 0.97  # where a scale ends: a few outliers would leave all other tokens pale


@dataclass(frozen=True)
class Quantity:
    """Something to shade tokens by: a figure (named shortly in `short`) of a source.

    `scale`: linear from 0, rank (logarithmic, 0 to 255), signed (two colours around 0), weight (0: not trained on).
    """

    key: str
    source: str
    figure: str
    short: str
    unit: str
    scale: str
    about: str

    @property
    def label(self) -> str:
        """What the choice on the page calls it."""
        return f"{self.source}: {self.figure}"


LOSS, RANK, TAIL = "loss of the true token", "rank of the true token", "mass outside the kept entries"
GAP = "loss less the teacher's"
GAP_ABOUT = "Above 0: the teacher knows better"
SHORT = ("loss, nats", "less the teacher's", "rank of the token", "entropy, nats", "mass not kept")  # as listed
KEPT = "kept"  # the source of the weights
QUANTITIES = (
    Quantity("t_loss", "teacher", LOSS, SHORT[0], "nats", "linear", "-log p(true token), from the label column"),
    Quantity("t_rank", "teacher", RANK, SHORT[2], "", "rank", "0: the teacher's first choice; 255: 255 or more"),
    Quantity(
        "t_entropy", "teacher", "entropy", SHORT[3], "nats", "linear", "How undecided the teacher was at this token"
    ),
    Quantity("t_tail", "teacher", TAIL, SHORT[4], "%", "linear", "The tail that the store does not name"),
    Quantity("s_loss", "small model", LOSS, SHORT[0], "nats", "linear", "-log p(true token) of the scores store"),
    Quantity("s_rank", "small model", RANK, SHORT[2], "", "rank", "0: the small model's first choice"),
    Quantity("s_entropy", "small model", "entropy", SHORT[3], "nats", "linear", "How undecided the small model was"),
    Quantity("gap", "small model", GAP, SHORT[1], "nats", "signed", GAP_ABOUT),
    Quantity("st_loss", "student", LOSS, SHORT[0], "nats", "linear", "-log p(true token) of the student"),
    Quantity("st_entropy", "student", "entropy", SHORT[3], "nats", "linear", "How undecided the student was"),
    Quantity("st_gap", "student", GAP, SHORT[1], "nats", "signed", GAP_ABOUT),
    Quantity("w_loss", KEPT, "weight in the loss", "", "", "weight", "What the token counts in the step's whole loss"),
    Quantity("w_kd", KEPT, "weight in distillation", "", "", "weight", "What it counts in the distillation term alone"),
)


@dataclass
class RowExtras:
    """What a student or a curriculum adds to a row.

    figures: by position [n], named as the keys of QUANTITIES; note: one line under the row's summary;
    left_out: whether the step does not draw the row at all.
    """

    figures: dict[str, Values] = field(default_factory=dict)
    note: str = ""
    left_out: bool = False


@dataclass(frozen=True)
class Sources:
    """The stores and the tokenizer that a page is made from."""

    tokens: StoreReader
    targets: StoreReader | None
    scores: StoreReader | None
    table: TokenTable | None


def page_data(
    sources: Sources,
    rows: Sequence[int],
    *,
    max_candidates: int,
    extras: Sequence[RowExtras] | None = None,
    about: Sequence[Sequence[str]] = (),
) -> dict[str, Any]:
    """Plain data of the page; `about`: more names and values beside the stores.

    Raises MismatchError when the stores do not belong together.
    """
    built: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    given = extras if extras is not None else [RowExtras() for _ in rows]
    for row, extra in zip(rows, given, strict=True):
        data, used = _row_data(sources, row, extra, max_candidates=max_candidates)
        built.append(data)
        names |= {token: piece_text(token, sources.table) for token in used}
    quantities = [_quantity(one, built) for one in QUANTITIES if any(one.key in data["values"] for data in built)]
    return {
        "title": _title(sources, rows),
        "about": [*_about(sources), *map(list, about)],
        "as_text": sources.table is not None,
        "names": {str(token): text for token, text in sorted(names.items())},
        "quantities": quantities,
        "short": SHORT,
        "rows": built,
    }


def _title(sources: Sources, rows: Sequence[int]) -> str:
    reader = sources.targets or sources.scores or sources.tokens
    which = f"row {rows[0]}" if len(rows) == 1 else f"rows {rows[0]} to {rows[-1]}"
    return f"{reader.url.rstrip('/').rpartition('/')[2]}, {which}"


def _about(sources: Sources) -> list[list[str]]:
    lines = []
    for reader in (sources.tokens, sources.targets, sources.scores):
        if reader is None:
            continue
        spec = reader.spec
        size = f"{reader.num_rows:,} rows, {reader.num_tokens:,} tokens"
        model = dict(spec.teacher or {})
        said = [size, f"digest {reader.digest}"]
        if model:
            said.insert(0, f"{model.get('id')}, weights {str(model.get('weights_digest'))[:16]}, {model.get('dtype')}")
        if spec.selection:
            said.append(", ".join(f"{key} {value}" for key, value in spec.selection.items()))
        lines.append([f"{spec.kind} store {reader.url.rstrip('/').rpartition('/')[2]}", "; ".join(said)])
    return lines


def _joined(reader: StoreReader | None, row: int, digest: int, kind: type) -> Any:
    if reader is None:
        return None
    found = reader.row(row)
    if not isinstance(found, kind):
        raise UserError(
            f"{reader.url} is of kind {reader.spec.kind}; the page takes targets and scores over its tokens"
        )
    assert not isinstance(found, TokensRow)
    if found.token_digest != digest:
        raise MismatchError(
            f"row {row}: {reader.url} was made on other tokens (digest {found.token_digest:#x}, the tokens store has "
            f"{digest:#x}); name the tokens store that it was made from"
        )
    return found


def _row_data(sources: Sources, row: int, extra: RowExtras, *, max_candidates: int) -> tuple[dict[str, Any], set[int]]:
    tokens = sources.tokens.row(row)
    if not isinstance(tokens, TokensRow):
        raise UserError(f"{sources.tokens.url} is of kind {sources.tokens.spec.kind}, expected tokens")
    digest = token_digest(tokens.tokens, tokens.doc_lens)
    taught: TargetsRow | None = _joined(sources.targets, row, digest, TargetsRow)
    scored: ScoresRow | None = _joined(sources.scores, row, digest, ScoresRow)
    ids = tokens.tokens.tolist()
    predicted = np.append(False, tokens.has_target()[:-1])  # by the position before it
    masked = [] if tokens.mask is None else np.flatnonzero(~tokens.mask).tolist()
    data: dict[str, Any] = {
        "row": row,
        "docs": tokens.doc_lens.tolist(),
        "ids": ids,
        "text": row_texts(ids, tokens.doc_lens.tolist(), sources.table),
        "masked": masked,
        "special": [n for n, token in enumerate(ids) if sources.table is not None and token in sources.table.special],
    }
    values: dict[str, Values] = {}
    used: set[int] = set(ids)
    stored = predicted
    if taught is not None:
        targets = taught.targets
        counts = np.diff(targets.offsets)
        stored = predicted & np.concatenate([[False], counts[:-1] > 0])
        values |= _teacher_values(targets)
        assert sources.targets is not None
        if sources.targets.spec.normaliser == "kept":
            values.pop("t_tail", None)  # what lies outside of the entries is unknown
        data["kept"] = _plain(counts, stored)
        data["candidates"] = _candidates(targets, np.flatnonzero(stored) - 1, max_candidates, used)
    if scored is not None:
        values |= {"s_loss": -scored.label_logprob, "s_rank": scored.label_rank, "s_entropy": scored.entropy}
        if "t_loss" in values:
            values["gap"] = values["s_loss"] - values["t_loss"]
    values |= extra.figures
    if "st_loss" in values and "t_loss" in values:
        values["st_gap"] = values["st_loss"] - values["t_loss"]
    data["values"] = {
        name: _plain(column, stored if name.startswith("t_") or name in ("gap", "st_gap") else predicted)
        for name, column in values.items()
    }
    data["predicted"] = [int(n) for n in stored]
    data["figures"] = _figures(sources, row, ids, predicted, stored, values, taught, len(masked))
    data["note"], data["left_out"] = extra.note, extra.left_out
    return data, used


def _teacher_values(targets: SparseTargets) -> dict[str, Values]:
    """Columns [n] of the teacher; those that the store does not hold are left out."""
    found: dict[str, Values] = {}
    if targets.label_logprob is not None:
        found["t_loss"] = -targets.label_logprob
    if targets.label_rank is not None:
        found["t_rank"] = targets.label_rank
    if targets.entropy is not None:
        found["t_entropy"] = targets.entropy
    if targets.logprobs is not None:  # draws name no tail
        found["t_tail"] = 100.0 * np.exp(targets.log_tail)
    return found


def _plain(column: Values, known: NDArray[np.bool_]) -> list[float | int | None]:
    """Values by predicted token: that of the position before it, four digits; None where nothing is stored."""
    shifted = np.concatenate([column[:1], column[:-1]])
    return [_short(value) if is_known else None for value, is_known in zip(shifted.tolist(), known, strict=True)]


def _short(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _candidates(targets: SparseTargets, positions: Values, limit: int, used: set[int]) -> dict[str, Any]:
    """For each position with a target: ids and probabilities of the first entries, and the mass of the others."""
    weights, unit = _weights(targets)
    ids, shares, rest = [], [], []
    for position in positions.tolist():
        first, last = int(targets.offsets[position]), int(targets.offsets[position + 1])
        cut = min(last, first + limit)
        ids.append(targets.ids[first:cut].tolist())
        used.update(ids[-1])
        shares.append([_short(value) for value in weights[first:cut].tolist()])
        rest.append(_short(float(weights[cut:last].sum())))
    return {"at": (positions + 1).tolist(), "ids": ids, "p": shares, "rest": rest, "unit": unit}


def _weights(targets: SparseTargets) -> tuple[Values, str]:
    """Probability of every entry [E], and what kind of number it is."""
    kind, mass = targets.entry_mass(np.float64)
    units = {"probability": "p", "weight": "weight of draws", "share": f"share of {targets.num_draws} draws"}
    return mass, units[kind]


def _figures(
    sources: Sources,
    row: int,
    ids: list[int],
    predicted: NDArray[np.bool_],
    stored: NDArray[np.bool_],
    values: Mapping[str, Values],
    taught: TargetsRow | None,
    num_masked: int,
) -> list[list[str]]:
    """Name and value of the row's summary."""
    at, where = np.flatnonzero(predicted) - 1, np.flatnonzero(stored) - 1
    lines = [["tokens", f"{len(ids):,}"]]
    if num_masked:
        lines.append(["trained on", f"{len(ids) - num_masked:,}"])
    num_bytes = None
    if sources.table is not None:
        lines.append(["text", f"{sources.table.num_text_bytes(ids):,} bytes"])
        num_bytes = sources.table.num_text_bytes([ids[n + 1] for n in at.tolist()])
    if taught is not None and len(where):
        if "t_loss" in values:
            mean = float(values["t_loss"][where].mean())
            bits = f" ({mean * len(where) / math.log(2) / num_bytes:.2f} bits/byte)" if num_bytes else ""
            lines.append(["teacher's loss", f"{mean:.3f} nats{bits}"])
        if "t_entropy" in values:
            lines.append(["its entropy", f"{float(values['t_entropy'][where].mean()):.3f} nats"])
        if "t_tail" in values:
            lines.append(["kept mass", f"{100.0 - float(values['t_tail'][where].mean()):.1f} %"])
        lines.append(["entries", f"{np.diff(taught.targets.offsets)[where].mean():.1f} a token"])
    if "s_loss" in values and len(at):
        lines.append(["small model's loss", f"{float(values['s_loss'][at].mean()):.3f} nats"])
    if "st_loss" in values and len(at):
        lines.append(["student's loss", f"{float(values['st_loss'][at].mean()):.3f} nats"])
    if sources.targets is not None:
        totals, num_tokens = sources.targets.column_bytes([row])
        lines.append(["targets take", f"{sum(totals.values()) / max(num_tokens, 1):.0f} bytes a token"])
    return lines


def _quantity(one: Quantity, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A quantity with the end of its scale, common to all rows of the page."""
    found = [v for data in rows for v in data["values"].get(one.key, ()) if v is not None]
    top = 255.0
    if one.scale == "weight":
        top = max([1.0, *found])
    elif one.scale != "rank":
        top = nice_ceiling(float(np.quantile(np.abs(found), QUANTILE)) if found else 1.0)
    return {**asdict(one), "label": one.label, "top": top}


def nice_ceiling(value: float) -> float:
    """The next of 1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def data_json(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no sign of it can end or open a tag."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
