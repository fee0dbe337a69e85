"""Commands of the doors in: `potstill import tokens` and `potstill import targets`."""

from __future__ import annotations

import argparse

from potstill.common.exit_codes import DONE
from potstill.common.options import add_config_options, read_config
from potstill.launch.command import Command, CommandGroup


def _tokens_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.importing.tokens_config import ImportTokensConfig

    add_config_options(parser, ImportTokensConfig)


def _tokens(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump import import_tokens
    from potstill.teacher_dump.importing.tokens_config import ImportTokensConfig

    print(import_tokens(read_config(ImportTokensConfig, arguments)).format())
    return DONE


TOKENS = Command(
    name="tokens",
    summary="tokenised corpora of other programs to rows of tokens",
    description="Read token ids that another program wrote (Megatron .bin/.idx, raw arrays of OLMo-core, dolma, "
    "nanoGPT and llm.c, datatrove .ds, Parquet, Arrow or JSON lines with a list of ids; files, folders or globs), and "
    "write the stores OUTPUT/train and OUTPUT/heldout, as prepare does from text. Name the tokenizer that made the "
    "ids: it gives the size of the vocabulary, which every id is checked against. Killed at any moment, the same "
    "command continues.",
    examples=(
        "potstill import tokens --input corpus_text_document --output data --tokenizer models/teacher "
        "--row-length 4096 --heldout-fraction 0.002",
        "potstill import tokens --input 'shards/*.npy' --output data --tokenizer models/teacher --dtype uint32",
        "potstill import tokens --input packed/ --output data --tokenizer models/teacher --packing rows "
        "--row-length 8192",
    ),
    add_arguments=_tokens_arguments,
    run=_tokens,
)


def _targets_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.teacher_dump.importing.targets import ImportTargetsConfig

    add_config_options(parser, ImportTargetsConfig)


def _targets(arguments: argparse.Namespace) -> int:
    from potstill.teacher_dump.importing.targets import ImportTargetsConfig, import_targets

    print(import_targets(read_config(ImportTargetsConfig, arguments)).format())
    return DONE


TARGETS = Command(
    name="targets",
    summary="a teacher's targets of other programs to a targets store",
    description="Read a teacher's cached logits or log-probabilities that another program wrote (DistillKit, top-k "
    "Parquet, Megatron-LM), and write a targets store over a tokens store: the one that --tokens names, or one made of "
    "the tokens in the files.",
    examples=(
        "potstill import targets --input distilled/ --output data --tokenizer models/student --teacher org/teacher",
        "potstill import targets --input shards/ --output data --tokens data/train --teacher org/teacher",
    ),
    add_arguments=_targets_arguments,
    run=_targets,
)

IMPORT = CommandGroup(
    name="import",
    summary="tokens, or a teacher's targets, that another program wrote",
    description="Make stores of data that another program wrote, in place of prepare (tokens) or dump (targets).",
    commands=(TOKENS, TARGETS),
)
