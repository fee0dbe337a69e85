"""Samples of text: what the student writes at each evaluation, after beginnings of held-out rows or given prompts.

Nothing here touches training: the model is in evaluation mode, no gradient is kept, and draws come from a generator of
their own. Every rank writes the same texts with equally many forwards, since under ZeRO-3 each forward gathers the
weights from all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from potstill.common.errors import UserError
from potstill.kernels.next_token import greedy_tokens
from potstill.storage import StoreError, StoreReader, TokensRow
from potstill.student_train.config.train import HeldoutConfig, TrainConfig
from potstill.student_train.data.stores import Stores
from potstill.student_train.evaluation.continuing import continued
from potstill.student_train.hf_export.hf_folder import find_tokenizer

log = logging.getLogger(__name__)
ON_CONSOLE = 2  # texts of an evaluation that are logged; all are in metrics.jsonl
CONSOLE_CHARACTERS = 60  # of a prompt's end and of a text's beginning


@dataclass(frozen=True)
class Prompt:
    """What the student continues from."""

    source: str  # "held-out row 12", or "given"
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TextSampler:
    """Writes a text after each prompt: the most probable token each time, or draws at a temperature."""

    prompts: tuple[Prompt, ...]
    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]  # a text ends before the first of them
    num_tokens: int
    vocab_size: int  # ids at and above it are never written (a head's padding)
    temperature: float
    seed: int

    def write(self, model: Any, *, device: torch.device) -> list[dict[str, Any]]:
        """Texts of all prompts; `model` is a StudentModel or the engine around one (a collective call)."""
        generator = torch.Generator().manual_seed(self.seed)
        texts = continued(
            model,
            [prompt.ids for prompt in self.prompts],
            num_tokens=self.num_tokens,
            vocab_size=self.vocab_size,
            choose=lambda logits, numbers, places: self._choose(logits, generator),
            device=device,
        )
        return [self._told(prompt, ids) for prompt, ids in zip(self.prompts, texts, strict=True)]

    def _choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Next token ids [B] from logits [B, V] on the CPU."""
        if self.temperature == 0.0:
            return greedy_tokens(logits)
        probabilities = (logits.double() / self.temperature).softmax(-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    def _told(self, prompt: Prompt, ids: list[int]) -> dict[str, Any]:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        text = self.decode(ids[:end])
        return {"source": prompt.source, "prompt": prompt.text, "text": text, "ended": end is not None}


def text_sampler(config: TrainConfig, stores: Stores) -> TextSampler | None:
    """The sampler of a run, or None where no samples are asked for. Needs no model; raises UserError."""
    options = config.eval
    if not options.samples and not options.sample_prompts:
        return None
    spec = stores.spec
    tokenizer = load_tokenizer(config, vocab_size=stores.vocab_size, key="eval.samples")
    begin, end = (marks(stores, name) for name in ("prefix", "suffix"))

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    if options.sample_tokens >= spec.row_length:
        raise UserError(
            f"eval.sample_tokens is {options.sample_tokens}, but a prompt and its text must fit in a row of "
            f"{spec.row_length} tokens; take a smaller number"
        )
    prompts = given_prompts(options, tokenizer, prefix=begin, row_length=spec.row_length)
    if options.samples and stores.heldout is not None:
        prompts += heldout_prompts(options, stores.heldout, decode, row_length=spec.row_length)
    return TextSampler(
        prompts=tuple(prompts),
        decode=decode,
        end_ids=frozenset(special_ids(tokenizer) | set(end)),
        num_tokens=options.sample_tokens,
        vocab_size=stores.vocab_size,
        temperature=options.sample_temperature,
        seed=config.run.seed,
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the special tokens of a `tokenizers.Tokenizer`."""
    return {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def marks(stores: Stores, name: str) -> list[int]:
    """Ids that prepare has put before or behind each document, as the student numbers them. Raises UserError."""
    ids = list(stores.spec.info.get(name) or ())
    if stores.vocabulary is None:
        return ids
    try:
        return stores.vocabulary.mapping.map_ids(ids, what=f"{name} of each document of {stores.sources[0].tokens.url}")
    except StoreError as error:
        raise UserError(f"data.vocabulary: {error}") from error


def load_tokenizer(config: TrainConfig, *, vocab_size: int, key: str) -> Any:
    """The `tokenizers.Tokenizer` of the run's tokens: eval.tokenizer, or where export looks too. Raises UserError.

    `key`: of the configuration, for what needs it.
    """
    from tokenizers import Tokenizer

    file = tokenizer_folder(config, key=key) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    found = tokenizer.get_vocab_size()
    if found > vocab_size:
        raise UserError(
            f"eval.tokenizer: {file} has {found} tokens, the tokens store ids below {vocab_size}; it is not the "
            "tokenizer that the store was made with"
        )
    return tokenizer


def tokenizer_folder(config: TrainConfig, *, key: str) -> Path:
    """Where the tokenizer of the run's tokens lies. Raises UserError that names `key`, for what needs it."""
    folder = find_tokenizer(config.eval.tokenizer, config)
    if folder is None or not (Path(folder) / "tokenizer.json").is_file():
        tokens = config.data.named_sources()[0].config.tokens
        raise UserError(
            f"{key} needs the tokenizer of {tokens}, and no tokenizer.json was found "
            f"{'beside it' if folder is None else f'in {folder}'}; name its folder with eval.tokenizer"
        )
    return Path(folder)


def given_prompts(options: HeldoutConfig, tokenizer: Any, *, prefix: Sequence[int], row_length: int) -> list[Prompt]:
    """eval.sample_prompts as ids, each begun as the store begins a document. Raises UserError."""
    prompts = []
    for number, text in enumerate(options.sample_prompts):
        ids = [*prefix, *tokenizer.encode(text, add_special_tokens=False).ids]
        if not ids or len(ids) + options.sample_tokens > row_length:
            raise UserError(
                f"eval.sample_prompts.{number} is {len(ids)} tokens; expected at least 1, and together with "
                f"eval.sample_tokens {options.sample_tokens} at most the row length {row_length}"
            )
        prompts.append(Prompt("given", text, tuple(ids)))
    return prompts


def heldout_prompts(
    options: HeldoutConfig, heldout: StoreReader, decode: Callable[[Sequence[int]], str], *, row_length: int
) -> list[Prompt]:
    """Beginnings of documents in `eval.samples` held-out rows, spread evenly over the store.

    Where a mask says what is trained on, a prompt is what comes before it (its last tokens, if it is too long), so that
    the student writes what it is trained to write.
    """
    num_rows = min(options.samples, heldout.num_rows)
    if num_rows == 0:
        raise UserError("eval.samples: the held-out store holds no rows; prepare a larger held-out split")
    most = min(options.sample_prompt_tokens, row_length - options.sample_tokens)
    places = [number * heldout.num_rows // num_rows for number in range(num_rows)]
    prompts = []
    for row in cast("list[TokensRow]", heldout.rows(places)):
        starts = np.cumsum(row.doc_lens) - row.doc_lens
        # The first document that continues behind the prompt, else the longest one.
        longer = np.flatnonzero(row.doc_lens > most)
        document = int(longer[0]) if len(longer) else int(row.doc_lens.argmax())
        asked = None if row.mask is None or row.mask.all() else _before_the_answer(row)
        if asked is not None:
            first, last = max(asked[0], asked[1] - most), asked[1]
        else:
            first, length = int(starts[document]), int(row.doc_lens[document])
            last = first + max(1, min(most, length - 1))
        ids = row.tokens[first:last].tolist()
        prompts.append(Prompt(f"held-out row {row.row}", decode(ids), tuple(ids)))
    return prompts


def _before_the_answer(row: TokensRow) -> tuple[int, int] | None:
    """First and last place (exclusive) of the tokens before the first trained one of a document; None without any."""
    trained = np.flatnonzero(row.has_target())  # position t says that token t + 1 is trained on
    if not len(trained):
        return None
    ends = np.cumsum(row.doc_lens)
    document = int(np.searchsorted(ends, trained[0], side="right"))
    return int(ends[document] - row.doc_lens[document]), int(trained[0]) + 1


def sample_line(sample: dict[str, Any]) -> str:
    """A sample on one line of the console: the end of its prompt, and how the text begins."""
    prompt, text = sample["prompt"], sample["text"]
    before = f"...{prompt[-CONSOLE_CHARACTERS:]}" if len(prompt) > CONSOLE_CHARACTERS else prompt
    after = f"{text[:CONSOLE_CHARACTERS]}..." if len(text) > CONSOLE_CHARACTERS else text
    return f"sample {before!r} -> {after!r}"
