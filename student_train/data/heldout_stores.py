"""Held-out rows of a run or of one of its sources, and a teacher's targets over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from potstill.common.errors import UserError
from potstill.storage import Source, StoreReader
from potstill.student_train.config.sources import NamedSource
from potstill.student_train.config.train import DataConfig
from potstill.student_train.data.node import reader_options
from potstill.student_train.data.opening import check_belongs, check_targets, open_store


@dataclass(frozen=True)
class HeldoutStores:
    """A tokens store for evaluation, and the targets store over it, if there is one."""

    tokens: StoreReader
    targets: StoreReader | None

    def each(self, change: Callable[[StoreReader], StoreReader]) -> HeldoutStores:
        """The same with `change` of both readers."""
        return HeldoutStores(change(self.tokens), None if self.targets is None else change(self.targets))


class NamesHeldout(Protocol):
    """A part of the configuration with the keys of held-out stores: data, or one of its sources."""

    @property
    def heldout(self) -> Path | str | None: ...

    @property
    def heldout_targets(self) -> Path | str | None: ...


def open_heldout(config: NamesHeldout, key: str, data: DataConfig, sources: Sequence[Source]) -> HeldoutStores:
    """Open KEY.heldout and KEY.heldout_targets; `data` names the `sources` that are trained on. Raises UserError."""
    assert config.heldout is not None
    options = reader_options(data, config.heldout)
    tokens = open_store(config.heldout, "tokens", f"{key}.heldout", **options)
    _check_heldout(tokens, f"{key}.heldout", config.heldout, data.named_sources(), sources)
    targets = None
    if config.heldout_targets is not None:
        options = reader_options(data, config.heldout_targets)
        targets = open_store(config.heldout_targets, "targets", f"{key}.heldout_targets", **options)
        if targets.spec.only_rows is not None:
            raise UserError(
                f"{key}.heldout_targets = {config.heldout_targets} holds {targets.spec.only_rows['count']} of "
                f"{targets.num_rows} rows only (potstill dump --only-rows-of); held-out figures are of all rows: dump "
                "these"
            )
        check_belongs(targets, tokens, key=f"{key}.heldout_targets", tokens_key=f"{key}.heldout")
        check_targets(targets, tokens, key=f"{key}.heldout_targets")
    return HeldoutStores(tokens, targets)


def _check_heldout(
    heldout: StoreReader, key: str, place: Path | str, named: Sequence[NamedSource], sources: Sequence[Source]
) -> None:
    for source, at in zip(sources, named, strict=True):
        if heldout.digest == source.tokens.digest:
            raise UserError(
                f"{key} = {place} holds the same rows of {at.key}.tokens (digest {source.tokens.digest[:16]}...), so "
                "nothing would be held out; name the heldout store that prepare wrote beside it, or remove the key"
            )
    for field in ("tokenizer_digest", "vocab_size"):
        found, expected = getattr(heldout.spec, field), getattr(sources[0].tokens.spec, field)
        if found != expected:
            raise UserError(f"{key} has {field} {found}, {named[0].key}.tokens {expected}; prepare both alike")
