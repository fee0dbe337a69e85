"""A student with another vocabulary than the teacher's: the map of ids, made from the two tokenizers and checked.

Tokens are matched by what the tokenizers write for them, so the student may have more of them, the same in another
order, or, declared, fewer. Anything else is another tokenizer, under which the stored rows would be other text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from potstill.common.errors import UserError
from potstill.common.token_table import tokenizer_kind
from potstill.storage import StoreError, StoreReader, TargetsRow, TokensRow, VocabularyMap, dropped_mass
from potstill.student_train.config.vocabulary import VocabularyConfig
from potstill.student_train.data.store_tokenizer import find_tokenizer_of, named_tokenizer, read_tokenizer

log = logging.getLogger(__name__)
KEY = "data.vocabulary"
SHOWN = 5  # ids of each list in an error
MEASURED_ROWS = 16  # of each targets store, for the mass that a subset moves into the tail


@dataclass(frozen=True)
class Vocabulary:
    """The map of the ids of a run's stores, and what it does.

    num_tokens: of the stores' tokenizer; num_new: tokens that the student has besides; num_lacking: that it lacks.
    """

    mapping: VocabularyMap
    num_tokens: int
    num_new: int
    num_lacking: int

    def line(self) -> str:
        """What the student's vocabulary is beside the teacher's, in a few words."""
        new = f"{self.num_new:,} new ids" if self.num_new else ""
        if self.num_lacking:
            return f"subset: {self.num_lacking:,} ids dropped" + (f", {new}" if new else "")
        order = "" if self.mapping.is_identity else ", in another order"
        return (f"superset, {new}" if new else "the teacher's") + order


def vocabulary_of(
    config: VocabularyConfig, texts: Sequence[StoreReader], candidates: Iterable[Path | None], *, key: str = KEY
) -> Vocabulary:
    """The map from the ids of the tokens stores `texts`, which are of one tokenizer, to the student's.

    It is checked on some rows of each. The stores' tokenizer is config.teacher_tokenizer, or the first of the folders
    `candidates` that is it. Raises UserError that names the key: a tokenizer that is not the stores', tokens that the
    student lacks without `subset`, text that has such a token, or that the two tokenizers cut differently.
    """
    teacher, student = _teacher(config, texts[0], candidates, key), read_tokenizer(config.tokenizer)
    _check_kinds(teacher, student, config, key)
    ids, own = teacher.get_vocab(), student.get_vocab()
    lacking = sorted(number for text, number in ids.items() if text not in own)
    if lacking and not config.subset:
        raise UserError(
            f"{key}.tokenizer {config.tokenizer} lacks {len(lacking):,} of the {len(ids):,} tokens that the stores "
            f"were made with: {_listed(lacking, ids, own)}; name a tokenizer that has them all under any ids, or "
            f"declare the loss with {key}.subset: true, which moves the teacher's probability of these tokens into "
            "the tail"
        )
    table = _table(ids, own, num_stored=texts[0].spec.vocab_size)
    try:
        mapping = VocabularyMap.build(table, vocab_size=max(own.values()) + 1)
    except StoreError as error:
        raise UserError(f"{key}: {error}") from error
    found = Vocabulary(mapping, len(ids), len(own.keys() - ids.keys()), len(lacking))
    if not config.check_rows:
        log.warning("%s.check_rows is 0: not looked at whether both tokenizers cut text alike", key)
    for tokens in texts:
        _check_rows(tokens, mapping, teacher, student, num_rows=config.check_rows, key=key)
    return found


def _teacher(config: VocabularyConfig, tokens: StoreReader, candidates: Iterable[Path | None], key: str) -> Any:
    digest = tokens.spec.tokenizer_digest
    if config.teacher_tokenizer is not None:
        try:
            return named_tokenizer(config.teacher_tokenizer, digest=digest, store=tokens.url)
        except UserError as error:
            raise UserError(f"{key}.teacher_tokenizer: {error}") from error
    found, others = find_tokenizer_of(digest, candidates)
    if found is None:
        told = f" ({'; '.join(others)})" if others else ""
        raise UserError(
            f"{key} needs the tokenizer that {tokens.url} was made with (digest {digest[:16]}), and it is not kept "
            f"beside the store{told}; name its folder with {key}.teacher_tokenizer"
        )
    return found


def _check_kinds(teacher: Any, student: Any, config: VocabularyConfig, key: str) -> None:
    """Tokens are compared as they are written, which says nothing between two ways of writing bytes."""
    backends: list[Any] = [getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (teacher, student)]
    if None in backends:
        which = (config.teacher_tokenizer or "of the stores", config.tokenizer)[backends.index(None)]
        raise UserError(f"{key}: tokenizer {which} has no tokenizer.json, so its tokens cannot be compared; convert it")
    kinds = [tokenizer_kind(backend.to_str()) for backend in backends]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{key}.tokenizer {config.tokenizer} is of kind {kinds[1]}, the tokenizer of the stores {kinds[0]}: they "
            "do not write their tokens in the same way, so none can be matched; take one made from the teacher's"
        )


def _listed(lacking: Sequence[int], ids: Mapping[str, int], own: Mapping[str, int]) -> str:
    """The first ids of the teacher that the student lacks, and what the student has there."""
    text_of, own_text_of = ({number: text for text, number in table.items()} for table in (ids, own))
    parts = [f"{n} is {text_of[n]!r} (the student's {n}: {_quoted(own_text_of.get(n))})" for n in lacking[:SHOWN]]
    return "; ".join(parts) + ("; ..." if len(lacking) > SHOWN else "")


def _quoted(text: str | None) -> str:
    return "none" if text is None else repr(text)


def _table(ids: Mapping[str, int], own: Mapping[str, int], *, num_stored: int) -> NDArray[np.int64]:
    """New id [num_stored] of each stored one; -1 where the student lacks the token.

    An id without a token (a hole in the table) keeps its number where that is free in the student's, as it would
    without a map.
    """
    table = np.full(num_stored, -1, np.int64)
    taken, size = set(own.values()), max(own.values()) + 1
    holes = set(range(num_stored)) - set(ids.values())
    for number in holes:
        if number < size and number not in taken:
            table[number] = number
    for text, number in ids.items():
        if number < num_stored:
            table[number] = own.get(text, -1)
    return table


def _check_rows(
    tokens: StoreReader, mapping: VocabularyMap, teacher: Any, student: Any, *, num_rows: int, key: str
) -> None:
    """See on rows spread over the store that the student has their tokens, and would cut their text the same way.

    The same tokens do not make the same tokenizer: with other merges or another rule for words the student is trained
    on sequences that its own tokenizer never makes.
    """
    for row in tokens.tokens_rows(spread(tokens.num_rows, num_rows)):
        try:
            mapping.map_tokens(row)
        except StoreError as error:
            first = int(row.tokens[np.flatnonzero(mapping.new_id[row.tokens] < 0)[0]])
            text = teacher.convert_ids_to_tokens(first)
            raise UserError(f"{key}.tokenizer: {tokens.url}: {error} (that id is {text!r})") from error
        _check_cuts(row, mapping, teacher, student, where=f"{key}.tokenizer: {tokens.url}: row {row.row}")


def _check_cuts(row: TokensRow, mapping: VocabularyMap, teacher: Any, student: Any, *, where: str) -> None:
    bounds = np.cumsum([0, *row.doc_lens])
    texts = [
        teacher.decode(row.tokens[start:end].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for start, end in pairwise(bounds)
    ]
    # As prepare cuts: a special token that stands in a text as plain words is plain words.
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    theirs, ours = (tokenizer(texts, **options)["input_ids"] for tokenizer in (teacher, student))
    for number, (stored, own) in enumerate(zip(theirs, ours, strict=True)):
        wanted = mapping.new_id[stored].tolist() if stored else []
        if wanted == own:
            continue
        place = next((n for n, pair in enumerate(zip(wanted, own, strict=False)) if pair[0] != pair[1]), len(own) - 1)
        first, second = (
            tokenizer.convert_ids_to_tokens(ids[place : place + SHOWN])
            for tokenizer, ids in ((teacher, stored), (student, own))
        )
        raise UserError(
            f"{where}, document {number}: the two tokenizers cut its text differently from token {place} on: the "
            f"stores' one {first}, the student's {second}; the student would learn sequences that its own tokenizer "
            f"does not make. Extend or trim the teacher's tokenizer instead of training another, or set "
            f"{KEY}.check_rows: 0 if that is meant"
        )


def spread(size: int, count: int) -> list[int]:
    """`count` numbers below `size` at most, evenly spread, the first among them."""
    return sorted({number * size // count for number in range(count)}) if size else []


def tail_line(vocabulary: Vocabulary, targets: Mapping[str, StoreReader]) -> str:
    """What a subset moves into the tails, measured on some rows of each targets store; empty where nothing is dropped.

    Shares are of the positions that have a target, over rows as they are stored.
    """
    mapping, said = vocabulary.mapping, []
    if not mapping.num_dropped:
        return ""
    for name, reader in targets.items():
        mass, lost, positions = 0.0, 0, 0
        stored = reader.with_vocabulary(None)
        for row in stored.targets_rows(spread(stored.num_rows, MEASURED_ROWS)):
            moved, emptied, has_target = _moved(row, mapping)
            mass, lost, positions = mass + moved, lost + emptied, positions + has_target
        share = mass / positions if positions else 0.0
        empty = f", {lost:,} of {positions:,} positions without a target" if lost else ""
        said.append(f"{name} {share:.2%}{empty}")
    return f"mass of sampled rows going to the tail: {'; '.join(said)}" if said else ""


def _moved(row: TargetsRow, mapping: VocabularyMap) -> tuple[float, int, int]:
    """Dropped mass of a row's positions, those left without a target, and those that have one as stored."""
    before = np.diff(row.targets.offsets) > 0
    after = np.diff(mapping.map_targets(row.targets).offsets) > 0
    return float(dropped_mass(row.targets, mapping).sum()), int((before & ~after).sum()), int(before.sum())
