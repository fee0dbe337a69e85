"""Where a model or tokenizer is: a folder, the hub's cache, or the hub; said at once when it is none of them.

The clients of the Hugging Face hub try for half a minute before they say that there is no network, and take a mistyped
folder for a name on the hub. So this looks first, and asks the hub once with a short timeout.
"""

from __future__ import annotations

import difflib
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from potstill.common.errors import UserError

log = logging.getLogger(__name__)

MODEL_FILES = ("config.json",)
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
# Long enough for a slow line, short enough to wait for; the hub's own variable for the same purpose goes before it.
_PROBE_SECONDS = 3.0


def find_model(
    name: str,
    *,
    what: str,
    files: Sequence[str] = MODEL_FILES,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> bool:
    """Look where `name`, a folder or a hub id, can be loaded from. True when that is the hub's local cache only.

    True means that the hub cannot be asked: pass `local_files_only=True` on, or each file costs half a minute. A place
    counts when it holds one of `files`. Raises UserError, within seconds, when the name is that of a folder that does
    not exist or holds none of the files, and when it is a hub id that is neither in the cache nor to be had.
    """
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in files):
            raise UserError(f"{what} {name!r}: the folder holds none of {', '.join(files)}{_models_in(path, files)}")
        return False
    if path.exists():
        raise UserError(f"{what} {name!r} is a file; name the folder that holds it")
    if _looks_local(name):
        raise UserError(f"{what} {name!r}: this folder does not exist{_near(path)}")
    return _find_on_hub(name, what=what, files=files, revision=revision, cache_dir=cache_dir)


def one_line(error: BaseException) -> str:
    """The text of an error of a library that writes several lines."""
    return " ".join(str(error).split()) or type(error).__name__


def _looks_local(name: str) -> bool:
    """Whether a name that is no folder was meant as one: hub ids are `name` or `owner/name` and nothing else."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if name.startswith((".", "~", os.sep)) or (len(Path(name).parts) > 1 and Path(name).parent.is_dir()):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _find_on_hub(name: str, *, what: str, files: Sequence[str], revision: str | None, cache_dir: str | None) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    found = (try_to_load_from_cache(name, file, revision=revision, cache_dir=cache_dir) for file in files)
    cached = any(isinstance(file, str) for file in found)
    offline = constants.HF_HUB_OFFLINE
    trouble = hub_trouble()
    if trouble is None:
        return False
    if cached:
        if not offline:
            log.warning("%s %s: taken from the hub's cache as it is, because %s", what, name, trouble)
        return True
    raise UserError(
        f"{what} {name!r} is no folder here and not in the hub's cache ({cache_dir or constants.HF_HUB_CACHE}), and "
        f"{trouble}; check the name and the network, or name a folder that holds {files[0]}{_near(Path(name))}"
    )


def hub_trouble() -> str | None:
    """Why the hub cannot be asked, within seconds; None when it answers."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)


def _unreachable(endpoint: str) -> str | None:
    """Why the hub gives no answer within seconds, or None when it gives any. Proxies of the environment are used."""
    from huggingface_hub.utils import get_session

    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _PROBE_SECONDS)
    answers: list[str | None] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=seconds)
            answers.append(None)
        except Exception as error:  # the client's classes depend on its version and have no base of their own
            answers.append(one_line(error))

    # In a thread, because the look-up of a host's name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True, name="hub-probe")
    thread.start()
    thread.join(seconds + 0.5)
    answer = answers[0] if answers else f"no answer within {seconds:g} seconds"
    return None if answer is None else f"the hub {endpoint} cannot be reached ({answer})"


def _near(path: Path) -> str:
    above = path.parent
    while not above.is_dir() and above != above.parent:
        above = above.parent
    wrong = path.relative_to(above).parts[0]
    near = difflib.get_close_matches(wrong, [entry.name for entry in _folders(above)], n=1, cutoff=0.6)
    return f"; did you mean {above / near[0]}?" if near else ""


def _models_in(folder: Path, files: Sequence[str]) -> str:
    inside = sorted(entry.name for entry in _folders(folder) if any((entry / file).exists() for file in files))
    return f"; these folders in it do: {', '.join(inside[:5])}" if inside else "; check the path"


def _folders(folder: Path) -> list[Path]:
    try:
        return [entry for entry in folder.iterdir() if entry.is_dir()]
    except OSError:  # a folder that may not be listed gives no hint; the error stands without one
        return []
