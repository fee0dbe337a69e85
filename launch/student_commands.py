"""Commands of the student stage: presets, train, eval, export."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from potstill.common.errors import ConfigError
from potstill.common.exit_codes import DONE, ERROR, PREEMPTED
from potstill.launch.command import Command
from potstill.launch.options import OVERRIDES, add_config_options, read_config
from potstill.launch.presets import find_preset, list_presets
from potstill.launch.text import print_table

RANK_MODULE = "potstill.student_train"


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


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.config import TrainConfig

    parser.add_argument("--preset", metavar="NAME", help="start from a preset instead of --config (`potstill presets`)")
    parser.add_argument(
        "--num-ranks", type=int, metavar="N", help="processes on this machine; default: one for each GPU, else one"
    )
    flags = {
        "--output": "run.output_dir",
        "--steps": "run.max_steps",
        "--seed": "run.seed",
        "--model-config": "model.config",
        "--model": "model.path",
        "--tokens": "data.tokens",
        "--heldout": "data.heldout",
        "--force": "run.force",
    }
    add_config_options(parser, TrainConfig, flags=flags)


def _train(arguments: argparse.Namespace) -> int:
    from potstill.launch.processes import count_devices, run_ranks
    from potstill.student_train import train
    from potstill.student_train.config import TrainConfig

    if arguments.preset is not None:
        if arguments.config is not None:
            raise ConfigError("give --preset or --config, not both; `potstill presets NAME` prints a preset to change")
        arguments.config = str(find_preset(arguments.preset).path)
    config = read_config(TrainConfig, arguments)
    num_ranks = arguments.num_ranks
    if num_ranks is None:
        num_ranks = 1 if "WORLD_SIZE" in os.environ else max(1, count_devices())
    if num_ranks < 1:
        raise ConfigError(f"--num-ranks {num_ranks}: expected 1 or more")
    if num_ranks == 1:
        from potstill.student_train.distributed import stop_distributed

        try:
            summary = train(config)
        finally:
            stop_distributed()
        print(summary.format())
        return DONE if summary.is_done else PREEMPTED
    words = [f"--set={override}" for override in getattr(arguments, OVERRIDES)]
    if arguments.config is not None:
        words.append(f"--config={arguments.config}")
    return _judge(run_ranks(RANK_MODULE, words, num_ranks=num_ranks), config)


def _judge(code: int, config: object) -> int:
    """The exit code of a launched run: what the launcher says, and the marker that a done run leaves."""
    from potstill.student_train.config import TrainConfig
    from potstill.student_train.run_folder import read_done

    assert isinstance(config, TrainConfig)
    folder = config.run.output_dir
    done = read_done(folder)
    if code == 0 and done is not None:
        print(json.dumps({"run": str(folder), **done}))
        return DONE
    if code == PREEMPTED:
        return PREEMPTED
    told = f"the launcher ended with code {code}" + ("" if code else ", but the run left no mark of its end")
    print(f"potstill train: error: {told}; see the messages above and {folder}", file=sys.stderr)
    return ERROR


TRAIN = Command(
    name="train",
    summary="train a student, from labels or from targets",
    description="Train or continue the run whose folder is run.output_dir. With --num-ranks above 1, DeepSpeed's "
    "launcher starts the ranks on this machine. On a cluster start the ranks with any launcher that sets RANK, "
    "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT:\n"
    "  deepspeed --hostfile hosts --module potstill.student_train --config run.yaml",
    examples=(
        "potstill train --config run.yaml --num-ranks 8",
        "potstill train --preset lm --tokens data/train --model-config configs/small --output runs/small",
        "potstill train --config run.yaml --set optimizer.lr=1e-3 curriculum.0.temperature=2.0",
    ),
    add_arguments=_train_arguments,
    run=_train,
)


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    from potstill.student_train.config import EvalConfig

    add_config_options(parser, EvalConfig)


def _eval(arguments: argparse.Namespace) -> int:
    from potstill.student_train import evaluate
    from potstill.student_train.config import EvalConfig

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
    from potstill.student_train.config import ExportConfig

    add_config_options(parser, ExportConfig, flags={"--output": "output_dir"})


def _export(arguments: argparse.Namespace) -> int:
    from potstill.student_train import export
    from potstill.student_train.config import ExportConfig

    print(export(read_config(ExportConfig, arguments)).format())
    return DONE


def _report(arguments: argparse.Namespace) -> int:
    from potstill.student_train.report import write_report

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
    examples=("potstill report runs/labels-only runs/distilled", "potstill report runs/* --output all.html --force"),
    add_arguments=_report_arguments,
    run=_report,
)

EXPORT = Command(
    name="export",
    summary="checkpoint to a Hugging Face folder",
    description="Gather the weights of a checkpoint, write them as safetensors beside config and tokenizer, load the "
    "folder in a fresh process and compare logits.",
    examples=("potstill export --run runs/student --output models/student",),
    add_arguments=_export_arguments,
    run=_export,
)
