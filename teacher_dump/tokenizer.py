"""Tokenizers: load or train one, name what pins its ids by a digest, turn texts into ids."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from potstill.common.disk_room import free_room
from potstill.common.errors import UserError
from potstill.common.model_place import TOKENIZER_FILES, find_model, one_line
from potstill.common.token_table import tokenizer_digest
from potstill.teacher_dump.config import TrainTokenizer

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
TRAINED_RECORD = "potstill_trained.json"


@dataclass(frozen=True)
class TextEncoder:
    """A tokenizer and what is put around each document.

    Special tokens that stand in a text as plain words are encoded as plain words: a corpus must not be able to end
    a document from inside.
    """

    tokenizer: Any
    vocab_size: int  # largest id + 1
    digest: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n]. A text without tokens stays empty, with no bos or eos either."""
        return [
            np.array([*self.prefix, *ids, *self.suffix] if ids else [], dtype=np.int32)  # one small copy per document
            for ids in self.plain_ids(texts)
        ]

    def plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with nothing around them."""
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return found


def load_tokenizer(source: str) -> Any:
    """The Hugging Face tokenizer in a folder or of a hub id; UserError when there is none."""
    local_only = find_model(source, what="tokenizer", files=TOKENIZER_FILES)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=local_only, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"tokenizer {source!r} cannot be loaded: {one_line(error)}") from error


def text_encoder(source: str, *, append_eos: bool, add_bos: bool) -> TextEncoder:
    """Load a tokenizer for packing; UserError when it lacks the bos or eos token that is asked for."""
    tokenizer = load_tokenizer(source)

    def special(name: str, option: str, wanted: bool) -> tuple[int, ...]:
        if not wanted:
            return ()
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            raise UserError(f"tokenizer {source!r} has no {name} token, but {option} is on; set {option}=false")
        return (int(token_id),)

    return TextEncoder(
        tokenizer=tokenizer,
        vocab_size=vocabulary_size(tokenizer),
        digest=tokenizer_digest(tokenizer),
        prefix=special("bos", "add_bos", add_bos),
        suffix=special("eos", "append_eos", append_eos),
    )


def context_limit(source: str, tokenizer: Any) -> tuple[int, str] | None:
    """Positions that the model of a tokenizer reads, and which file says so; None when nothing does.

    The configuration beside the tokenizer is what `dump` goes by; without one, the tokenizer's own model_max_length.
    """
    file: Path | str | None = Path(source) / "config.json"
    if not Path(source).is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "config.json")
        file = cached if isinstance(cached, str) else None
    try:
        config = json.loads(Path(file).read_text()) if file is not None and Path(file).is_file() else {}
    except (OSError, ValueError):
        config = {}  # not ours to judge here: `dump` reads it, and says what is wrong
    for group in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(group.get(key), int):
                return group[key], f"{key} of its config.json"
    longest = getattr(tokenizer, "model_max_length", None)
    # transformers puts 1e30 where a tokenizer says nothing.
    return (int(longest), "model_max_length of the tokenizer") if longest and longest < 1 << 30 else None


def vocabulary_size(tokenizer: Any) -> int:
    """Largest id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def train_bpe(folder: Path, texts: Iterable[str], *, settings: TrainTokenizer, input_digest: str, force: bool) -> None:
    """Train a byte-level BPE on `texts` and save it to `folder`, loadable by AutoTokenizer.

    `<|endoftext|>` (id 0) is its bos, eos and padding token. A folder trained before with the same settings on the
    same input is left as it is. Raises UserError when the folder holds anything else and `force` is off.
    """
    if trained_already(folder, settings=settings, input_digest=input_digest, force=force):
        log.info("tokenizer %s is there already, trained on the same input", folder)
        return
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_limited(texts, settings.max_bytes), trainer=trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    record = _trained_record(settings, input_digest)
    with saved_beside(folder) as partial:
        wrapped.save_pretrained(str(partial))
        (partial / TRAINED_RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        if folder.exists():
            shutil.rmtree(folder)  # only one of ours gets here: trained_already has looked
        partial.rename(folder)


def trained_already(folder: Path, *, settings: TrainTokenizer, input_digest: str, force: bool) -> bool:
    """Whether this tokenizer stands in the folder. UserError where another one does and `force` is off."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / TRAINED_RECORD).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} exists and was not trained here; move it away, or use it as tokenizer") from error
    record = _trained_record(settings, input_digest)
    if found == record and not force:
        return True
    if not force:
        before, now = found.get("settings", {}), record["settings"]
        changes = [
            f"{key} was {before.get(key)}, {now.get(key)} is wanted" for key in now if before.get(key) != now[key]
        ]
        raise UserError(
            f"{folder} was trained with other settings or on other input "
            f"({'; '.join(changes) or 'the input files have changed'}); use another output, or --force to train again"
        )
    return False


def _trained_record(settings: TrainTokenizer, input_digest: str) -> dict[str, Any]:
    return {"settings": settings.model_dump(mode="json"), "input_digest": input_digest}


@contextmanager
def saved_beside(folder: Path) -> Iterator[Path]:
    """A name beside `folder` to save to and to rename; nothing is left there after an error.

    Raises UserError when it cannot be written: a full disk, a read-only one.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except Exception as error:
        # The Rust library under the fast tokenizers has no class for the errors of the system.
        if isinstance(error, UserError) or not (isinstance(error, OSError) or "(os error " in str(error)):
            raise
        raise UserError(
            f"writing the tokenizer to {folder} failed: {one_line(error)} ({free_room(folder)}); free space, or name "
            "another output, and run the same command again"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    used = 0
    for text in texts:
        if used and used + len(text) > max_bytes:
            log.info("tokenizer is trained on the first %d characters (train_tokenizer.max_bytes)", used)
            return
        used += len(text)
        yield text
