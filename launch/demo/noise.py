"""Noise for the demo's corpus: passages of a document replaced by what crawled text is full of, with every span named.

Text of the standard library is clean and uniform, so that there is nothing for a selector to find. Here whole passages
are replaced by base64 blobs, log lines, boilerplate, one line over and over, words in random order, or the characters
that a poor scan gives. Everything is a pure function of (text, share, seed); nothing is downloaded.
"""

from __future__ import annotations

import base64
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# A passage is long beside a row of the demo, so that most rows are either clean or noise.
PASSAGE_CHARACTERS = 3000
OCR_ERROR_RATE = 0.12


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of the noised text, and the kind of noise that they are."""

    start: int
    end: int
    kind: str


def passages(text: str) -> list[str]:
    """Cut a text at line ends into passages of at least PASSAGE_CHARACTERS; joined they are the text."""
    found, begun = [], 0
    while len(text) - begun >= 2 * PASSAGE_CHARACTERS:
        end = text.find("\n", begun + PASSAGE_CHARACTERS) + 1
        if end == 0:
            break
        found.append(text[begun:end])
        begun = end
    return [*found, text[begun:]] if begun < len(text) else found


def add_noise(text: str, *, share: float, seed: int, name: str) -> tuple[str, list[Span]]:
    """Replace each passage with probability `share`; returns the new text and its noisy spans, in order.

    `name` tells documents apart: the draws are those of (seed, name). Kinds are equally likely.
    """
    draws = random.Random(hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    made, spans, length = [], [], 0
    for passage in passages(text):
        replaced = passage
        if draws.random() < share:
            kind = draws.choice(sorted(NOISES))
            replaced = NOISES[kind](passage, draws)
            spans.append(Span(length, length + len(replaced), kind))
        made.append(replaced)
        length += len(replaced)
    return "".join(made), spans


def _fill(length: int, line: Callable[[], str]) -> str:
    """Lines until there are about `length` characters."""
    lines, filled = [], 0
    while filled < length:
        lines.append(line() + "\n")
        filled += len(lines[-1])
    return "".join(lines)


def _base64(passage: str, draws: random.Random) -> str:
    return _fill(len(passage), lambda: base64.b64encode(draws.randbytes(57)).decode())


LEVELS = ("DEBUG", "INFO", "INFO", "INFO", "WARNING", "ERROR")
EVENTS = (
    "request id={0} status={1} took {2} ms",
    "cache miss key={0} shard={1} generation={2}",
    "replicated block blk_{0} to node {1}, size {2}",
    "retry {1} of task {0} after {2} ms",
    "user {0} opened session {2} from 10.{1}.0.{1}",
)


def _log(passage: str, draws: random.Random) -> str:
    second = draws.randrange(10**6)

    def line() -> str:
        nonlocal second
        second += draws.randrange(30)
        clock = f"{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02},{draws.randrange(1000):03}"
        event = draws.choice(EVENTS).format(draws.randrange(10**9), draws.randrange(256), draws.randrange(10**4))
        day = f"2024-{1 + second // 86400 % 12:02}-{draws.randrange(1, 29):02}"
        return f"{day} {clock} {draws.choice(LEVELS)} [worker-{draws.randrange(32)}] {event}"

    return _fill(len(passage), line)


BOILERPLATE = (
    "All rights reserved. Reproduction in whole or in part without permission is prohibited.",
    "This page uses cookies. By continuing you accept our policy.",
    "Home | About | Contact | Privacy | Terms of use | Site map",
    "Click here to subscribe to our newsletter!",
    "You must be logged in to post a comment.",
    "Read more >> Next page >> Previous page <<",
    "LIMITED OFFER! Order now and save 50 % on all items!",
    "Share this: Print | E-mail | Bookmark | More",
    "Your browser does not support scripts. Please enable them and reload the page.",
    "Loading, please wait ...",
)


def _boilerplate(passage: str, draws: random.Random) -> str:
    return _fill(len(passage), lambda: draws.choice(BOILERPLATE))


def _repeat(passage: str, draws: random.Random) -> str:
    lines = [line for line in passage.splitlines() if line.strip()] or ["..."]
    repeated = draws.choice(lines)
    return _fill(len(passage), lambda: repeated)


def _shuffle(passage: str, draws: random.Random) -> str:
    """The passage's own words in random order; white space stays where it was."""
    pieces = re.split(r"(\s+)", passage)
    words = pieces[::2]
    draws.shuffle(words)
    pieces[::2] = words
    return "".join(pieces)


CONFUSED = {
    "a": "ao",
    "b": "h6",
    "c": "eo",
    "d": "cl",
    "e": "co",
    "f": "lt",
    "g": "q9",
    "h": "b",
    "i": "1l",
    "l": "1I",
    "m": ["rn", "nn"],
    "n": ["ri", "u"],
    "o": "0c",
    "r": "tn",
    "s": "5z",
    "t": "f+",
    "u": "nv",
    "w": ["vv", "uu"],
    "y": "vg",
    "0": "O",
    "1": "l",
    "(": "{[",
    ")": "}]",
    ",": ".'",
    ".": ",:",
    "_": "- ",
}


def _ocr(passage: str, draws: random.Random) -> str:
    """Characters taken for others, lost or doubled, and spaces where none were."""
    made = []
    for character in passage:
        if character == "\n" or draws.random() >= OCR_ERROR_RATE:
            made.append(character)
            continue
        error = draws.random()
        if error < 0.6 and character in CONFUSED:
            made.append(draws.choice(CONFUSED[character]))
        elif error < 0.75:
            continue
        elif error < 0.9:
            made.append(character + draws.choice(" .'~^"))
        else:
            made.append(character * 2)
    return "".join(made)


NOISES: dict[str, Callable[[str, random.Random], str]] = {
    "base64": _base64,
    "boilerplate": _boilerplate,
    "log": _log,
    "ocr": _ocr,
    "repeat": _repeat,
    "shuffle": _shuffle,
}
