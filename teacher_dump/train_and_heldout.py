"""What `prepare` and `import tokens` share: the stores `train/` and `heldout/`, from where they stand to the seal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import UserError
from potstill.common.progress import format_seconds
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.kept_tokenizer import KeptTokenizer
from potstill.teacher_dump.prepared import Output, StoreSummary, check_untrained
from potstill.teacher_dump.tokenizer import TextEncoder

TRAIN, HELDOUT = "train", "heldout"
Outputs = Mapping[str, Output]


@dataclass(frozen=True)
class PrepareSummary:
    """What was made; `resumed_rows` were there from an earlier run. source_format: of an import, else None."""

    stores: tuple[StoreSummary, ...]
    tokenizer: str
    tokenizer_digest: str
    vocab_size: int
    num_files: int
    input_bytes: int
    bad_lines: int
    resumed_rows: int
    seconds: float
    notes: tuple[str, ...] = ()
    source_format: str | None = None

    def format(self) -> str:
        """A few lines for a person."""
        lines = [line for store in self.stores for line in store.format()]
        lines.append(f"tokenizer: {self.tokenizer} ({self.vocab_size} entries, digest {self.tokenizer_digest[:12]})")
        of_format = "" if self.source_format is None else f" of format {self.source_format}"
        lines.append(
            f"read {self.num_files} files{of_format}, {self.input_bytes / 1e6:.1f} MB in "
            f"{format_seconds(self.seconds)}; {self.bad_lines} broken records skipped; {self.resumed_rows} rows were "
            "there from an earlier run"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def copy_beside(output: Path | str, tokenizer: str, encoder: TextEncoder, *, force: bool) -> KeptTokenizer | None:
    """The copy of a named tokenizer beside the stores; None where it is that one, or the output is no folder."""
    folder = Path(output) / "tokenizer"
    itself = folder.is_dir() and Path(tokenizer).is_dir() and folder.samefile(tokenizer)
    return None if itself or not isinstance(output, Path) else KeptTokenizer(encoder, folder, force=force)


def place_copy(kept: KeptTokenizer | None, outputs: Outputs) -> None:
    """Put the copy back where rows of an earlier run stand and somebody has deleted it since."""
    if kept is not None and any(output.begun for output in outputs.values()):
        kept.place()
        kept.settle()


def bad_lines_of_all(outputs: Outputs) -> int | None:
    """Broken records of the whole input where every store is complete, else None."""
    if any(not output.complete for output in outputs.values()):
        return None
    return max(int(output.bad_lines or 0) for output in outputs.values())


def where_to_begin(outputs: Outputs) -> tuple[Place, int, bool]:
    """(place of the earliest document that a store lacks, broken records before it, whether a run had come so far)."""
    starts = [output.start for output in outputs.values() if not output.complete]
    behind = min(starts, key=lambda start: start.place if start else Place(0, 0))
    return (behind.place, behind.bad_lines, True) if behind else (Place(0, 0), 0, False)


def finish_all(outputs: Outputs, *, num_files: int, bad_lines: int, allowed: float, word: str) -> list[StoreSummary]:
    """Pack and commit what is left in each store, once all of them are known to hold something, and seal them.

    allowed: see check_untrained; word: what the input should have held, for the error of one that held nothing.
    Raises UserError.
    """
    for output in outputs.values():
        output.close(Place(num_files, 0), bad_lines=bad_lines)
    check_untrained(list(outputs.values()), allowed=allowed, at_end=True)
    begun = any(output.begun for output in outputs.values())
    for name, output in outputs.items():
        if output.empty:
            raise UserError(_nothing_in(output.path, name, word, bad_lines, begun=begun))
    stores = [output.finish(bad_lines=bad_lines) for output in outputs.values()]
    for output in outputs.values():
        output.seal()
    return stores


def _nothing_in(path: Path | str, name: str, word: str, bad_lines: int, *, begun: bool) -> str:
    if name == HELDOUT:
        again = "; with --force, because rows of the other part are written already" if begun else ""
        return (
            f"{path}: no document fell into the held-out part; the input is too small for this heldout_fraction, "
            f"raise it or set heldout_documents{again}"
        )
    return f"{path}: the input holds no {word} to train on ({bad_lines} broken records skipped)"
