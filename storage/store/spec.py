"""RunSpec: everything that gives a store's bytes their meaning, written once as run.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from potstill.storage.errors import CorruptError, MismatchError, StoreError, VersionError
from potstill.storage.files.checked_json import canonical, get_list
from potstill.storage.rows.columns import COLUMNS, AnyColumn, column_features, namable_columns
from potstill.storage.rows.only_rows import ONLY_ROWS, check_only_rows
from potstill.storage.rows.scores_columns import SCORES_COLUMNS
from potstill.storage.rows.tokens_columns import TOKENS_COLUMNS
from potstill.storage.rows.value_grid import ODDS_STEP, ODDS_ZERO, SCORE_STEP, VALUE_STEP

FORMAT_MAJOR, FORMAT_MINOR = 1, 0
FREQUENCY_IDS, KEPT_NORMALISER = "frequency_ids", "kept_normaliser"
OWN_FEATURES = ("planes", FREQUENCY_IDS, KEPT_NORMALISER, ONLY_ROWS)  # besides those of the columns
# What the log-probabilities of entries are relative to: every id, or the entries of their token alone.
NORMALISERS = ("vocabulary", "kept")
# Powers of the proposal for which the weights of draws fit their grid.
MIN_POWER, MAX_POWER = 0.5, 1.5
KINDS = ("tokens", "targets", "scores")
CONTEXT_POLICY = "packed_row"
TARGET_CONVENTION = "targets[t] predicts tokens[t+1] of the same document"
CODEC = {
    "name": "planes",
    "value_step": VALUE_STEP,
    "odds_step": ODDS_STEP,
    "odds_zero": ODDS_ZERO,
    "score_step": SCORE_STEP,
    "compression": "zstd-1",
}
MAX_ROW_LENGTH = 1 << 24
MAX_ROWS = 1 << 40
_SHOWN, _MAX_SHOWN = 3, 80  # differing fields in one message, characters of one value
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Meaning of one store (see docs/format.md, run.json); validated on construction, raises StoreError.

    `num_rows` is None only for kind tokens, whose length is known at seal. `id_map_sha256` names the table of
    frequency-ranked ids when the store uses one. `columns` names the columns that the store has although no other field
    says so (`storage/rows/columns.py`, `tokens_columns.py` and `scores_columns.py` beside it). `normaliser` is
    `kept` where the log-probabilities are relative to the entries alone, as a renormalising writer left them: then the
    tail is unknown, and -inf in the file. `only_rows` names the rows of a store that holds some only
    (`storage/store/held_rows.py`). `unknown` keeps optional fields of newer minor versions.
    """

    kind: str
    row_length: int
    rows_per_unit: int
    num_rows: int | None
    vocab_size: int
    tokenizer_digest: str
    input_digest: str | None = None
    selection: Mapping[str, Any] | None = None
    temperatures: tuple[float, ...] = ()
    stats: tuple[str, ...] = ()
    teacher: Mapping[str, Any] | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    id_map_sha256: str | None = None
    columns: tuple[str, ...] = ()
    normaliser: str = "vocabulary"
    only_rows: Mapping[str, Any] | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        object.__setattr__(self, "stats", tuple(self.stats))
        object.__setattr__(self, "columns", tuple(self.columns))
        for name in ("selection", "teacher", "info", ONLY_ROWS):
            value = getattr(self, name)
            if not (isinstance(value, Mapping) or (value is None and name != "info")):
                raise StoreError(f"run spec: {name} is {value!r}, expected a map")
        _check_numbers(self)
        _check_kind_fields(self)
        canonical({"teacher": self.teacher, "info": self.info, "unknown": self.unknown})

    @property
    def num_draws(self) -> int | None:
        """Draws per token in sample mode, else None."""
        return int(self.selection["num_draws"]) if self.selection and self.selection["mode"] == "sample" else None

    def stores(self, column: str) -> bool:
        """Whether the store has that column of its kind."""
        tables: dict[str, Mapping[str, AnyColumn]] = {"tokens": TOKENS_COLUMNS, "scores": SCORES_COLUMNS}
        return tables.get(self.kind, COLUMNS)[column].is_stored(self)

    @property
    def required_features(self) -> list[str]:
        """What a reader must know to read the store."""
        features = ["planes"] + ([FREQUENCY_IDS] if self.id_map_sha256 else [])
        features += [KEPT_NORMALISER] if self.normaliser == "kept" else []
        features += [ONLY_ROWS] if self.only_rows is not None else []
        return features + [name for name, owners in column_features().items() if any(c.is_stored(self) for c in owners)]

    @property
    def max_entries(self) -> int:
        """Upper bound of entries per token under the selection."""
        if self.selection is None:
            return 0
        return int(self.selection["num_draws" if self.selection["mode"] == "sample" else "k"])

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the canonical JSON of the spec."""
        return hashlib.sha256(canonical(self.to_json()).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All fields plus the constants of the format, as plain JSON values."""
        value: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "unknown"}
        value["temperatures"], value["stats"] = list(self.temperatures), list(self.stats)
        # Named only where they say something: a store without them is written as before there were any.
        value.pop("columns")
        value |= {"columns": list(self.columns)} if self.columns else {}
        if self.normaliser == "vocabulary":
            value.pop("normaliser")
        if self.only_rows is None:
            value.pop(ONLY_ROWS)
        value |= {
            "format": {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR},
            "required_features": self.required_features,
            "codec": dict(CODEC),
            "context_policy": CONTEXT_POLICY,
            "target_convention": TARGET_CONVENTION,
        }
        value = {**value, **self.unknown}
        plain: dict[str, Any] = json.loads(canonical(value))
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str = "run.json") -> RunSpec:
        """Inverse of to_json; unknown major versions, features or codecs raise VersionError."""
        _check_version(value, where=where)
        own = {f.name for f in fields(cls)} - {"unknown"}
        constants = {"codec", "context_policy", "target_convention", "required_features", "format"}
        missing = sorted(own - {"id_map_sha256", "columns", "normaliser", ONLY_ROWS} - set(value))
        if missing:
            raise CorruptError(f"{where}: fields {missing} are missing")
        unknown = {k: v for k, v in value.items() if k not in own | constants}
        if value["format"] != {"major": FORMAT_MAJOR, "minor": FORMAT_MINOR}:
            unknown["format"] = value["format"]
        try:
            spec = cls(**{name: value[name] for name in own if name in value}, unknown=unknown)
        except (TypeError, ValueError, KeyError, OverflowError, AttributeError) as error:
            raise CorruptError(f"{where}: {error}") from None
        for feature, owners in column_features().items():
            if (feature in value["required_features"]) != any(column.is_stored(spec) for column in owners):
                names = " and ".join(column.name for column in owners)
                rule = owners[0].feature_rule or f"{names} and the feature {feature} come together"
                found = f"columns {list(spec.columns)}" if spec.selection is None else f"selection {spec.selection}"
                raise VersionError(
                    f"{where}: {found} and required_features {value['required_features']} do not go together: "
                    f"{rule}; make the store again"
                )
        return spec


def require_same(found: RunSpec, wanted: RunSpec, *, where: str) -> None:
    """Raise MismatchError that names the fields in which two specs differ, three of them at most."""
    if found.kind != wanted.kind:
        raise MismatchError(
            f"{where}: a {found.kind} store stands here, {wanted.kind} are to be written; name another path"
        )
    differing = list(_differences(found.to_json(), wanted.to_json()))
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise MismatchError(
            f"{where}: another run stands here: {'; '.join(differing[:_SHOWN])}{more}. Use the options of that run to "
            "continue it, another output, or --force, which deletes the store and begins again"
        )


def _differences(found: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """`a.b is 1 in the store, 2 is wanted now` for each leaf of two JSON values that differs, by name."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif found != wanted:
        yield f"{path} is {_short(found)} in the store, {_short(wanted)} is wanted now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _check_version(value: Mapping[str, Any], *, where: str) -> None:
    version, codec = value.get("format"), value.get("codec")
    if not isinstance(version, dict) or version.get("major") != FORMAT_MAJOR:
        raise VersionError(f"{where}: format is {version!r}, this reader knows major version {FORMAT_MAJOR}; upgrade")
    features = get_list(value, "required_features", where=where)
    alien = [f for f in features if not isinstance(f, str) or f not in (*OWN_FEATURES, *column_features())]
    if alien:
        raise VersionError(f"{where}: store needs the features {alien}, which this reader does not know; upgrade")
    named = get_list({"columns": [], **value}, "columns", where=where)
    known = {*COLUMNS, *TOKENS_COLUMNS, *SCORES_COLUMNS}
    alien = [name for name in named if not isinstance(name, str) or name not in known]
    if alien:
        raise VersionError(f"{where}: store has the columns {alien}, which this reader does not know; upgrade")
    if codec != CODEC:
        raise VersionError(f"{where}: codec is {codec!r}, this reader knows {CODEC!r}")
    if (FREQUENCY_IDS in features) != (value.get("id_map_sha256") is not None):
        raise CorruptError(f"{where}: feature {FREQUENCY_IDS} and field id_map_sha256 do not go together")
    if (KEPT_NORMALISER in features) != (value.get("normaliser", "vocabulary") == "kept"):
        raise CorruptError(f"{where}: feature {KEPT_NORMALISER} and field normaliser do not go together")
    if (ONLY_ROWS in features) != (value.get(ONLY_ROWS) is not None):
        raise CorruptError(f"{where}: feature {ONLY_ROWS} and field {ONLY_ROWS} do not go together")
    for key, wanted in (("context_policy", CONTEXT_POLICY), ("target_convention", TARGET_CONVENTION)):
        if value.get(key) != wanted:
            raise VersionError(f"{where}: {key} is {value.get(key)!r}, this reader knows {wanted!r}")


def _check_numbers(spec: RunSpec) -> None:
    limits = {
        "row_length": (1, MAX_ROW_LENGTH),
        "rows_per_unit": (1, 1 << 24),
        "num_rows": (0, MAX_ROWS),
        "vocab_size": (1, 1 << 24),
    }
    for name, (low, high) in limits.items():
        found = getattr(spec, name)
        if name == "num_rows" and found is None:
            continue
        if type(found) is not int or not low <= found <= high:
            raise StoreError(f"run spec: {name} is {found!r}, expected an integer in [{low}, {high}]")
    for temperature in spec.temperatures:
        if not 0 < temperature < 1e6 or temperature == 1.0:
            raise StoreError(f"run spec: temperature {temperature} must be positive and not 1 (T=1 is always stored)")
    if len(set(spec.temperatures)) != len(spec.temperatures) or len(spec.temperatures) > 16:
        raise StoreError(f"run spec: temperatures {spec.temperatures} must be distinct and at most 16")
    for name in spec.stats:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StoreError(f"run spec: statistic {name!r} must be a lower-case name of at most 64 letters")
    if len(set(spec.stats)) != len(spec.stats) or len(spec.stats) > 64:
        raise StoreError(f"run spec: statistics {spec.stats} must be distinct and at most 64")


def _check_kind_fields(spec: RunSpec) -> None:
    if spec.kind not in KINDS:
        raise StoreError(f"run spec: kind is {spec.kind!r}, expected one of {KINDS}")
    if not isinstance(spec.tokenizer_digest, str) or not spec.tokenizer_digest:
        raise StoreError("run spec: tokenizer_digest must be a non-empty text")
    digests = (spec.input_digest, spec.id_map_sha256)
    if not all(digest is None or isinstance(digest, str) for digest in digests):
        raise StoreError(f"run spec: input_digest and id_map_sha256 are texts or absent, found {digests}")
    if (spec.input_digest is None) != (spec.kind == "tokens"):
        raise StoreError("run spec: input_digest is the digest of the tokens store; only kind tokens has none")
    if spec.num_rows is None and spec.kind != "tokens":
        raise StoreError(f"run spec: num_rows may be None only for kind tokens, not for {spec.kind}")
    if (spec.selection is not None) != (spec.kind == "targets"):
        raise StoreError("run spec: selection belongs to kind targets, and to no other")
    to_name = namable_columns(spec.kind)
    if len(set(spec.columns)) != len(spec.columns) or not set(spec.columns) <= set(to_name):
        raise StoreError(
            f"run spec: columns {spec.columns} must be distinct and among {to_name} in a {spec.kind} store; "
            "others come unnamed"
        )
    if spec.temperatures and spec.kind != "targets":
        raise StoreError("run spec: temperatures belong to kind targets only")
    if spec.id_map_sha256 is not None and spec.kind != "targets":
        raise StoreError("run spec: frequency-ranked ids belong to kind targets only")
    if spec.selection is not None:
        _check_selection(spec.selection)
    _check_normaliser(spec)
    check_only_rows(spec.only_rows, kind=spec.kind, stats=spec.stats)


def _check_normaliser(spec: RunSpec) -> None:
    if spec.normaliser not in NORMALISERS:
        raise StoreError(f"run spec: normaliser is {spec.normaliser!r}, expected one of {NORMALISERS}")
    if spec.normaliser == "vocabulary":
        return
    if spec.selection is None or spec.selection["mode"] == "sample":
        found = spec.kind if spec.selection is None else f"{spec.kind} with draws"
        raise StoreError(f"run spec: normaliser `kept` belongs to targets with log-probabilities, found {found}")
    if spec.temperatures:
        raise StoreError(
            f"run spec: temperatures {spec.temperatures} need the whole vocabulary, and the normaliser is `kept`; "
            "declare none"
        )


def _check_selection(selection: Mapping[str, Any]) -> None:
    shapes = {
        "top_k": ({"k"}, set()),
        "top_p_k": ({"p", "k"}, set()),
        "sample": ({"num_draws"}, {"power"}),
    }
    mode = selection.get("mode")
    if mode not in shapes:
        raise StoreError(f"selection: mode is {mode!r}, expected one of {sorted(shapes)}")
    needed, allowed = shapes[mode]
    given = set(selection) - {"mode"}
    if not needed <= given or given - needed - allowed:
        raise StoreError(
            f"selection: mode {mode} takes {sorted(needed)} and optionally {sorted(allowed)}, found {sorted(given)}"
        )
    for name in ("k", "num_draws"):
        if name in selection and (type(selection[name]) is not int or not 1 <= selection[name] <= 255):
            raise StoreError(
                f"selection: {name} is {selection[name]!r}, expected an integer in [1, 255] (counts are u8)"
            )
    if "p" in selection and not 0 < float(selection["p"]) <= 1:
        raise StoreError(f"selection: p is {selection['p']!r}, expected 0 < p <= 1")
    if "power" in selection and not MIN_POWER <= float(selection["power"]) <= MAX_POWER:
        raise StoreError(f"selection: power is {selection['power']!r}, expected {MIN_POWER} <= power <= {MAX_POWER}")
