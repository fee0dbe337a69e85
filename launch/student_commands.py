"""Commands of the student stage beside train: presets, eval, report, export."""

from __future__ import annotations

import argparse
from pathlib import Path

from potstill.common.exit_codes import DONE
from potstill.common.options import add_config_options, read_config
from potstill.common.text_tables import print_table
from potstill.launch.command import Command
from potstill.launch.presets import find_preset, list_presets


def _presets(arguments: argparse.Namespace) -> int:
    if arguments.name is not None:
        print(find_preset(arguments.name).path.read_text(encoding="utf-8"), end="")
    else:
        print_table(["preset", ""], [(preset.name, preset.summary) for preset in list_presets()], align="<<")
    return DONE


def _presets_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="print the file of this preset")


PRESETS = Command(
    name="presets",
    summary="list the presets of `train`, or print one",
    description="A preset is a commented YAML file: take it as it is with `train --preset NAME`, or print it, change "
    "it, and use it with `train --config FILE`.",
    examples=("potstill presets", "potstill presets salt > my.yaml"),
    add_arguments=_presets_arguments,
    run=_presets,
)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.config.train import EvalConfig

    add_config_options(parser, EvalConfig)


def _eval(arguments: argparse.Namespace) -> int:
    from potstill.student_train import evaluate
    from potstill.student_train.config.train import EvalConfig

    print(evaluate(read_config(EvalConfig, arguments)).format())
    return DONE


EVAL = Command(
    name="eval",
    summary="loss, perplexity and agreement with the teacher on held-out rows",
    description="Measure the newest checkpoint of a run, one checkpoint, or any Hugging Face folder.",
    examples=(
        "potstill eval --model runs/student --heldout data/heldout --targets targets/heldout",
        "potstill eval --model models/teacher --heldout data/heldout --output teacher.json",
    ),
    add_arguments=_eval_arguments,
    run=_eval,
)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.config.train import ExportConfig

    add_config_options(parser, ExportConfig, flags={"--output": "output_dir"})


def _export(arguments: argparse.Namespace) -> int:
    from potstill.student_train import export
    from potstill.student_train.config.train import ExportConfig

    print(export(read_config(ExportConfig, arguments)).format())
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from potstill.student_train.report.build import write_report

    print(f"wrote {write_report(arguments.runs, arguments.output, force=arguments.force)}")
    return DONE


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders to compare")
    parser.add_argument("--output", type=Path, default=Path("report.html"), metavar="FILE", help="default %(default)s")
    parser.add_argument("--force", action="store_true", help="overwrite the file")


REPORT = Command(
    name="report",
    summary="one page of curves, figures and samples over several runs",
    description="Write one HTML page that needs no network: held-out figures, curves over tokens, steps or time that "
    "one can zoom, samples of text, and what differs between the configurations. Runs are called by run.name (by "
    "their folder where they have none), and a click on a name switches the run off in the whole page.",
    examples=("potstill report runs/labels-1 runs/distilled-1", "potstill report runs/* --output all.html --force"),
    add_arguments=_report_arguments,
    run=_report,
)

EXPORT = Command(
    name="export",
    summary="checkpoint to a Hugging Face folder",
    description="Gather the weights of a checkpoint, write them as safetensors beside config and tokenizer, load the "
    "folder in a fresh process and compare logits. With --push the folder, once it has passed, becomes one commit on "
    "the Hugging Face hub; the token is that of HF_TOKEN or `hf auth login`.",
    examples=(
        "potstill export --run runs/student --output models/student",
        "potstill export --run runs/student --output models/student --push ORG/NAME --license apache-2.0 --private",
    ),
    add_arguments=_export_arguments,
    run=_export,
)
