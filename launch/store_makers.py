"""Which command wrote a store, and what to type to have it write what is missing."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill.common.config import load_config
from potstill.common.errors import ConfigError

if TYPE_CHECKING:
    from potstill.storage import RunSpec


@dataclass(frozen=True, kw_only=True)
class Maker:
    """A command that writes stores. `parent`: its output is the folder above the store; `config`: where its tree is."""

    words: tuple[str, ...]
    parent: bool
    config: tuple[str, str]
    options: Callable[[RunSpec], list[str]]

    @property
    def name(self) -> str:
        """As it is typed: `dump`, `import tokens`."""
        return " ".join(self.words)


def _dump_options(spec: RunSpec) -> list[str]:
    selection = dict(spec.selection or {})
    settings = [f"selection.{key}={value}" for key, value in selection.items()]
    if "seed" in spec.info:
        settings.append(f"selection.seed={spec.info['seed']}")
    if spec.temperatures:
        settings.append(f"temperatures=[{', '.join(map(str, spec.temperatures))}]")
    if spec.id_map_sha256 is not None:
        settings.append("frequency_ids=true")
    only = [] if spec.only_rows is None else ["--only-rows-of", "RUN.yaml"]
    teacher = dict(spec.teacher or {})
    dtype = ["--dtype", str(teacher["dtype"])] if "dtype" in teacher else []
    return ["--tokens", "TOKENS", "--teacher", "TEACHER", *dtype, *only, "--set", *settings]


def _score_options(spec: RunSpec) -> list[str]:
    settings = ["--set", f"salt_rank={spec.info['salt_rank']}"] if "salt_rank" in spec.info else []
    return ["--tokens", "TOKENS", "--slm", "MODEL", *settings]


def _rollout_options(spec: RunSpec) -> list[str]:
    return ["--tokens", "TOKENS", "--model", "MODEL"]


def _prepare_options(spec: RunSpec) -> list[str]:
    return ["--input", "INPUT", "--tokenizer", "TOKENIZER", "--row-length", str(spec.row_length)]


def _import_targets_options(spec: RunSpec) -> list[str]:
    teacher = str((spec.teacher or {}).get("id", "TEACHER"))
    return ["--input", "INPUT", "--tokens", "TOKENS", "--teacher", teacher]


_TEACHER_CONFIG, _IMPORTING = "potstill.teacher_dump.config", "potstill.teacher_dump.importing"
MAKERS: Mapping[str, Maker] = {
    "prepare": Maker(
        words=("prepare",), parent=True, config=(_TEACHER_CONFIG, "PrepareConfig"), options=_prepare_options
    ),
    "import tokens": Maker(
        words=("import", "tokens"),
        parent=True,
        config=(f"{_IMPORTING}.tokens.config", "ImportTokensConfig"),
        options=_prepare_options,
    ),
    "import targets": Maker(
        words=("import", "targets"),
        parent=True,
        config=(f"{_IMPORTING}.targets.config", "ImportTargetsConfig"),
        options=_import_targets_options,
    ),
    "dump": Maker(words=("dump",), parent=False, config=(_TEACHER_CONFIG, "DumpConfig"), options=_dump_options),
    "score": Maker(words=("score",), parent=False, config=(_TEACHER_CONFIG, "ScoreConfig"), options=_score_options),
    "rollout": Maker(
        words=("rollout",),
        parent=True,
        config=("potstill.teacher_dump.rollouts.config", "RolloutConfig"),
        options=_rollout_options,
    ),
}


def maker_of(spec: RunSpec) -> Maker:
    """The command that wrote a store, by its run.json."""
    info = spec.info
    if "rollout" in info:
        return MAKERS["rollout"]
    if spec.kind == "scores":
        return MAKERS["score"]
    if spec.kind == "targets":
        return MAKERS["import targets" if (spec.teacher or {}).get("engine") == "import" else "dump"]
    if "end_token" in info:
        return MAKERS["import tokens"]
    # `import targets` writes the tokens of its own files without saying which part of a corpus they are.
    return MAKERS["import targets" if "input" in info and "part" not in info else "prepare"]


def command_line(maker: Maker, spec: RunSpec, url: str) -> str:
    """The command with what run.json knows of its options, and capitals for what it does not."""
    output = _above(url) if maker.parent else url
    options = maker.options(spec)
    return f"potstill {maker.name} --output {shlex.quote(output)} " + " ".join(
        word if word.isupper() else shlex.quote(word) for word in options
    )


def what_it_is(spec: RunSpec) -> list[str]:
    """What the capitals in `command_line` stand for, as far as run.json says."""
    lines = []
    if spec.input_digest is not None:
        lines.append(f"TOKENS is the tokens store with the digest {spec.input_digest}")
    teacher = dict(spec.teacher or {})
    if "weights_digest" in teacher:
        word = {"targets": "TEACHER"}.get(spec.kind, "MODEL")
        lines.append(f"{word} is {teacher.get('id')} with the weights {teacher['weights_digest']}")
    source = spec.info.get("input")
    if isinstance(source, Mapping) and "digest" in source:
        lines.append(f"INPUT is what has the digest {source['digest']}")
    return lines


def config_for(maker: Maker, path: Path, url: str) -> Any:
    """The configuration of the command in a YAML file. Raises ConfigError where it does not write the store `url`."""
    module, name = maker.config
    config = load_config(getattr(importlib.import_module(module), name), path)
    wanted = {_place(_above(url))} if maker.parent else {_place(url), _place(_above(url))}  # above: a series
    if _place(str(config.output)) not in wanted:
        expected = _above(url) if maker.parent else url
        raise ConfigError(
            f"{path}: output is {config.output}, which is not where this store is written; expected {expected}: name "
            f"the configuration of the {maker.name} that wrote the store"
        )
    if getattr(config, "force", False):
        raise ConfigError(f"{path}: force deletes the whole store; take it out to make only what is missing")
    return config


def _above(url: str) -> str:
    return url.rstrip("/").rpartition("/")[0] or "/"


def _place(text: str) -> str:
    return text.rstrip("/") if "://" in text else str(Path(text).resolve())
