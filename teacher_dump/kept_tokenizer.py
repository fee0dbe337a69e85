"""The copy of a tokenizer beside the stores that it made, where `export` and later stages look for it."""

from __future__ import annotations

import contextlib
import errno
import shutil
from pathlib import Path

from potstill.common.errors import UserError
from potstill.teacher_dump.tokenizer import TRAINED_RECORD, TextEncoder, load_tokenizer, saved_beside, tokenizer_digest

# In a copy whose first rows are not committed yet: a run that is killed meanwhile must not pin the output by it.
UNSETTLED = "unsettled"
# What tokenizers of transformers save; nothing else is ever deleted with one.
_TOKENIZER_FILES = {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    TRAINED_RECORD,
    UNSETTLED,
}


def take_away_unsettled(folder: Path, has_rows: bool) -> None:
    """Delete a copy that a killed run has placed without committing rows (with rows: its mark), or was still writing.

    For a caller that is alone in the folder above it.
    """
    for unfinished in folder.parent.glob(f"{folder.name}.*.tmp"):
        shutil.rmtree(unfinished)
    mark = folder / UNSETTLED
    if not mark.exists():
        return
    if has_rows:
        mark.unlink()
    else:
        shutil.rmtree(folder)


class KeptTokenizer:
    """A tokenizer to be kept in `folder`: looked at once, placed with the first rows, withdrawn if those fail.

    `trained` is the folder in which it was trained just now; its files are copied as they are. Raises UserError at once
    where the folder holds another tokenizer and `force` is off, or more than a tokenizer.
    """

    def __init__(self, encoder: TextEncoder, folder: Path, *, force: bool, trained: Path | None = None) -> None:
        self._encoder, self._folder, self._force, self._trained = encoder, folder, force, trained
        self._stands = trained is None and self._stands_already()
        self._placed = False
        self._new_parents: list[Path] = []
        if not self._stands and folder.exists():
            self._check_replaceable()

    def place(self) -> None:
        """Write the copy, unless it stands there. Raises UserError when it cannot be written or is not the same."""
        if self._stands:
            return
        self._new_parents = [path for path in self._folder.parents if not path.exists()]
        with saved_beside(self._folder) as partial:
            if self._trained is None:
                self._encoder.tokenizer.save_pretrained(str(partial))
            else:
                shutil.copytree(self._trained, partial)
            saved = tokenizer_digest(load_tokenizer(str(partial)))
            if saved != self._encoder.digest:
                raise UserError(
                    f"the tokenizer, saved and loaded again, is another one (digest {saved[:12]}, expected "
                    f"{self._encoder.digest[:12]}); transformers cannot save it whole"
                )
            (partial / UNSETTLED).touch()
            if self._folder.exists() and self._force:
                self._check_replaceable()
                shutil.rmtree(self._folder)
            try:
                partial.rename(self._folder)
                self._placed = True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._stands_already():
                    raise  # another prepare was quicker; with the same tokenizer that is as good
        self._stands = True

    def withdraw(self) -> None:
        """Take away what `place` has made, folders above it as far as they are empty."""
        if self._placed:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._stands = self._placed = False
        for path in self._new_parents:
            with contextlib.suppress(OSError):  # something else has come into it
                path.rmdir()

    def settle(self) -> None:
        """Rows are committed: what was placed stays, whatever comes."""
        if self._placed:
            (self._folder / UNSETTLED).unlink(missing_ok=True)
        self._placed, self._new_parents = False, []

    def _stands_already(self) -> bool:
        config = self._folder / "tokenizer_config.json"
        return config.is_file() and tokenizer_digest(load_tokenizer(str(self._folder))) == self._encoder.digest

    def _check_replaceable(self) -> None:
        if not self._force:
            raise UserError(
                f"{self._folder} exists and is not the tokenizer of this run (digest {self._encoder.digest[:12]}); use "
                "another output, or --force to replace it"
            )
        names = {entry.name for entry in self._folder.iterdir()} if self._folder.is_dir() else {self._folder.name}
        if others := sorted(names - _TOKENIZER_FILES):
            raise UserError(
                f"{self._folder} stands where the tokenizer of this run goes, and force deletes tokenizers only; it "
                f"holds {', '.join(others[:5])}. Move it away, or use another output"
            )
