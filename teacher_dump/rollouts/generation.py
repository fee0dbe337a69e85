"""Continuations of prompts by a transformers causal language model, many at a time, with a cache of keys and values.

Prompts of one batch are padded on the left and read once, however many continuations each gets; continuations that
have ended leave the batch. Draws are named by unit, number and position (kernels/next_token.py), not by the batch.

Legend: P prompts of a batch, B continuations under way, T tokens so far, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from potstill.common.errors import UserError
from potstill.common.packed import probe_ids
from potstill.kernels.next_token import draw_uniforms, drawn_tokens, greedy_tokens
from potstill.teacher_dump.engines.head import relative_difference, tolerance

Ids = NDArray[np.int32]
_PROBE_TOKENS = 12


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How ids are drawn. `vocab_size`: ids at and above it are never taken (a head's padding)."""

    vocab_size: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Asked:
    """A continuation that is wanted: `number` of `unit`, which draws it; None: the most probable id each time.

    prompt int32 [n], n >= 1; limit: new tokens at most, the one that ends it among them.
    """

    prompt: Ids
    unit: int
    number: int | None
    limit: int


@dataclass
class _Batch:
    """Continuations under way: which of the asked [B], the cache, its mask [B, T] (None: no padding), next logits."""

    members: list[int]
    cache: Any
    mask: Tensor | None
    lengths: Tensor  # int64 [B], tokens so far, padding not counted
    logits: Tensor  # [B, V]

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order; a row may come several times."""
        index = torch.tensor(rows, device=self.logits.device)
        self.cache.reorder_cache(index)
        self.mask = None if self.mask is None else self.mask[index]
        self.lengths, self.logits = self.lengths[index], self.logits[index]


@torch.no_grad()
def continue_prompts(
    model: Any, asked: Sequence[Asked], *, sampling: Sampling, stop_ids: frozenset[int], batch: int, padded: bool
) -> list[Ids]:
    """The continuations in the order asked, int32 [m], m <= limit; a stop id is the last token where one came.

    batch: continuations at a time; padded: whether prompts of different lengths may share a batch (`can_pad`).
    Raises UserError where logits are not finite.
    """
    found: list[list[int]] = [[] for _ in asked]
    for members in _batches(asked, batch=batch, padded=padded):
        _run(model, asked, members, found, sampling, stop_ids)
    return [np.array(ids, np.int32) for ids in found]


def _batches(asked: Sequence[Asked], *, batch: int, padded: bool) -> Iterator[list[int]]:
    """Numbers of the continuations of each batch: by length, so that little is padding; of a prompt side by side."""

    def length(number: int) -> int:
        return len(asked[number].prompt)

    ordered = sorted((number for number in range(len(asked)) if asked[number].limit > 0), key=length)
    groups = [ordered] if padded else [list(group) for _, group in groupby(ordered, key=length)]
    for group in groups:
        for first in range(0, len(group), batch):
            yield group[first : first + batch]


def _run(
    model: Any,
    asked: Sequence[Asked],
    members: list[int],
    found: list[list[int]],
    sampling: Sampling,
    stop_ids: frozenset[int],
) -> None:
    state = _read_prompts(model, asked, members)
    while True:
        chosen = _choose(state, asked, found, sampling)
        alive = []
        for row, (member, token) in enumerate(zip(state.members, chosen, strict=True)):
            found[member].append(token)
            if token not in stop_ids and len(found[member]) < asked[member].limit:
                alive.append(row)
        if not alive:
            return
        if len(alive) < len(state.members):
            state.members = [state.members[row] for row in alive]
            state.keep(alive)
        _step(model, state, [found[member][-1] for member in state.members])


def _read_prompts(model: Any, asked: Sequence[Asked], members: list[int]) -> _Batch:
    """Read each prompt once, and give every continuation its cache."""
    prompts: dict[int, Ids] = {asked[member].unit: asked[member].prompt for member in members}
    place = {unit: number for number, unit in enumerate(prompts)}
    state = read_lines(model, list(prompts.values()))
    state.members = members
    state.keep([place[asked[member].unit] for member in members])
    return state


def read_lines(model: Any, prompts: Sequence[Ids]) -> _Batch:
    """Prompts padded on the left to the longest, through the model: cache and next logits, a row for each prompt."""
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0).to(device)
    padding = None if bool(mask.all()) else mask.to(device)
    output = model(
        input_ids=ids.to(device), attention_mask=padding, position_ids=positions, use_cache=True, logits_to_keep=1
    )
    if output.past_key_values is None:
        raise UserError(f"{type(model).__name__} keeps no cache of keys and values, without which no answers are made")
    lengths = mask.sum(1).to(device)
    return _Batch([], output.past_key_values, padding, lengths, output.logits[:, -1])


def _step(model: Any, state: _Batch, tokens: Sequence[int]) -> None:
    """One more token in each row."""
    device = state.logits.device
    if state.mask is not None:
        state.mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], 1)
    output = model(
        input_ids=torch.tensor(tokens, device=device)[:, None],
        attention_mask=state.mask,
        position_ids=state.lengths[:, None],
        past_key_values=state.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    state.cache, state.logits, state.lengths = output.past_key_values, output.logits[:, -1], state.lengths + 1


def _choose(state: _Batch, asked: Sequence[Asked], found: Sequence[list[int]], sampling: Sampling) -> list[int]:
    logits = state.logits[:, : sampling.vocab_size].float()
    top = logits.amax(-1)
    if not bool(top.isfinite().all()):
        row = int((~top.isfinite()).nonzero()[0])
        raise UserError(
            f"the logits after token {len(found[state.members[row]])} of a continuation of unit "
            f"{asked[state.members[row]].unit} are not finite; check the model's dtype"
        )
    chosen = greedy_tokens(logits)
    drawing = [row for row, member in enumerate(state.members) if asked[member].number is not None]
    if drawing:
        names = [asked[state.members[row]] for row in drawing]
        uniforms = draw_uniforms(
            seed=sampling.seed,
            units=torch.tensor([one.unit for one in names]),
            numbers=torch.tensor([one.number for one in names]),
            positions=torch.tensor([len(found[state.members[row]]) for row in drawing]),
        )
        rows = torch.tensor(drawing, device=logits.device)
        drawn = drawn_tokens(logits[rows], uniforms, temperature=sampling.temperature, top_p=sampling.top_p)
        chosen[rows] = drawn
    ids: list[int] = chosen.tolist()
    return ids


@torch.no_grad()
def can_pad(model: Any, *, vocab_size: int, row_length: int) -> bool:
    """Whether prompts of different lengths may share a batch: a padded one then gives the logits that it gives alone.

    It reads no more than `row_length` positions: that may be all that the model has. Raises UserError where not even
    prompts of one length, continued from the cache, give the logits of a plain forward.
    """
    device = next(model.parameters()).device
    limit = tolerance(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    num_tokens = max(2, min(_PROBE_TOKENS, (row_length - 1) // 2))
    line = np.array([probe_ids(place, vocab_size) for place in range(num_tokens)], np.int32)  # type: ignore[type-var]
    plain = model(input_ids=torch.from_numpy(line.astype(np.int64))[None].to(device), use_cache=False)
    wanted = plain.logits[:, -1].float()

    def difference(prompts: Sequence[Ids]) -> float:
        state = read_lines(model, prompts)
        _step(model, state, [int(line[-1])] * len(prompts))
        return relative_difference(state.logits[:1].float(), wanted)

    alone = difference([line[:-1]])
    if not alone <= limit:
        raise UserError(
            f"{type(model).__name__} gives other logits from its cache of keys and values than without it (relative "
            f"difference {alone:.2g}); no answers can be made with it"
        )
    longer = np.concatenate([line, line])
    return len(longer) < row_length and difference([line[:-1], longer]) <= limit
