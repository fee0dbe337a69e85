"""The corpus of the demo: the source of Python's own standard library, found on every machine that can run potstill."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from potstill.common.errors import UserError
from potstill.launch.demo.noise import Span, add_noise
from potstill.teacher_dump.config import PrepareConfig
from potstill.teacher_dump.split import Split

# Not the library itself, or tables in the shape of a module: they are no text to learn from.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
)
SMALLEST_BYTES = 400
LARGEST_BYTES = 100_000


def library_modules(folder: Path) -> Iterator[Path]:
    """Modules below `folder`, in an order that looks shuffled and is the same on every machine."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in files if name.endswith(".py")]
    yield from sorted(found, key=lambda path: hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest())


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What was written: documents, bytes of text, and characters of noise by kind in the documents to train on."""

    documents: int
    text_bytes: int
    train_characters: int
    noise_characters: Mapping[str, int]

    def format(self) -> str:
        """One line."""
        noise = sum(self.noise_characters.values())
        kinds = ", ".join(sorted(self.noise_characters))
        told = f"noise in {100 * noise / max(self.train_characters, 1):.0f} % of the text to train on ({kinds})"
        return (
            f"{self.text_bytes:,} bytes of the standard library's source in {self.documents} modules; "
            f"{told if noise else 'no noise'}; held-out modules are clean"
        )


def write_corpus(
    path: Path,
    *,
    max_bytes: int,
    noise: float = 0.0,
    seed: int = 0,
    heldout_fraction: float = 0.0,
    folder: Path | None = None,
) -> CorpusSummary:
    """Write modules as JSON lines {"id", "text", "noise"} until `max_bytes` of source are reached.

    A share `noise` of the passages is replaced (demo_noise.py), but for modules that `prepare` will hold out at
    `heldout_fraction`; "noise" has [start, end, kind] of each replaced span, in characters of the text. The file
    appears under its name only when it is whole. Raises UserError if the library's source is not there.
    """
    library = folder if folder is not None else Path(sysconfig.get_path("stdlib"))
    split = Split.by_fraction(heldout_fraction, salt=PrepareConfig.model_fields["split_salt"].default)
    documents = source_bytes = text_bytes = train_characters = 0
    kinds: Counter[str] = Counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as out:
        for name, source in _sources(library):
            text, spans = _with_noise(source, split, share=noise, seed=seed, name=name)
            record = {"id": name, "text": text, "noise": [[span.start, span.end, span.kind] for span in spans]}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            documents += 1
            source_bytes += len(source.encode())
            text_bytes += len(text.encode())
            train_characters += 0 if split.held_out(text) else len(text)
            for span in spans:
                kinds[span.kind] += span.end - span.start
            if source_bytes >= max_bytes:
                break
        out.flush()
        os.fsync(out.fileno())
    if documents == 0:
        partial.unlink()
        raise UserError(
            f"no source of the standard library in {library} (some systems ship it compiled only); "
            "run the stages on a text of your own instead: potstill prepare --help"
        )
    partial.replace(path)
    return CorpusSummary(
        documents=documents, text_bytes=text_bytes, train_characters=train_characters, noise_characters=dict(kinds)
    )


def _sources(library: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the modules of a middling size."""
    for module in library_modules(library):
        if not SMALLEST_BYTES <= module.stat().st_size <= LARGEST_BYTES:
            continue
        try:
            with tokenize.open(module) as source:
                yield module.relative_to(library).as_posix(), source.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a module that is broken on purpose, or in an encoding that this Python does not know


def _with_noise(source: str, split: Split, *, share: float, seed: int, name: str) -> tuple[str, list[Span]]:
    """The text to write. `prepare` splits by the hash of the text: what is held out stays as it is, and noise that
    would put a document among the held-out ones is drawn again, so that held-out text is the same at any share."""
    if split.held_out(source):
        return source, []
    for attempt in itertools.count():
        text, spans = add_noise(source, share=share, seed=seed + attempt, name=name)
        if not split.held_out(text):
            return text, spans
    raise AssertionError("unreachable")
