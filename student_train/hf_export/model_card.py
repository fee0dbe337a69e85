"""README.md of an export, a model card of the Hub. A pure function of what card_facts.py has gathered.

What is not recorded stands in the card as that. Paths of the machine that trained are cut to their last names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from potstill.student_train.config.stages import Stage
from potstill.student_train.config.token_policies import TokenSelector
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.config.vocabulary import VocabularyConfig
from potstill.student_train.hf_export.card_facts import CardFacts, last_name

UNKNOWN = "not recorded"
LICENSE_PLACEHOLDER = "fill-in-before-publishing"
_NO_LICENSE = (
    "**Licence: not chosen yet.** Whoever publishes this model fills it in, here and in the first lines of this "
    "file; it depends on the texts and on the teacher's own licence."
)
FIGURES = {
    "heldout_loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "accuracy": "accuracy (top 1)",
    "answer_accuracy": "answers right (greedy)",
    "answer_exact": "answers written exactly",
    "answer_pass_rate": "answers passed",
    "agreement": "agreement with the teacher (top 1)",
    "teacher_kl": "KL to the teacher (nats)",
    "calibration_error": "calibration error",
    "positions": "positions",
    "rows": "rows",
}


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with its YAML front matter."""
    parts = [
        _front_matter(facts),
        _introduction(facts),
        _use(),
        _teachers(facts),
        _training(facts),
        _stores(facts),
        _heldout(facts),
        _reproduce(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _distils(facts: CardFacts) -> bool:
    return any(stage.distils for stage in facts.config.curriculum)


def _front_matter(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    tags = ["potstill", *(["knowledge-distillation"] if _distils(facts) else [])]
    data = ModelCardData(
        license=facts.license or LICENSE_PLACEHOLDER,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    todo = "# TODO: put the licence that you publish this model under (the Hub refuses this one).\n"
    return f"---\n{'' if facts.license else todo}{data.to_yaml()}\n---"


def _introduction(facts: CardFacts) -> str:
    how = "distilled from the stored predictions of a teacher" if _distils(facts) else "trained on labels alone"
    total = "" if facts.total_steps is None else f" of {facts.total_steps:,}"
    return (
        f"# {facts.title}\n\n{facts.architecture} of {facts.num_parameters:,} parameters ({facts.dtype}), {how} with "
        f"potstill: the weights after optimizer step {facts.step:,}{total}.\n\n"
        + (f"Licence: {facts.license}." if facts.license else _NO_LICENSE)
    )


def _use() -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n```'
    )


def _teachers(facts: CardFacts) -> str:
    if not _distils(facts):
        return "## Teacher\n\nNone: no stage of the curriculum read targets."
    known = dict.fromkeys(name for named in facts.config.data.named_sources() for name in named.config.targets)
    used = {name for stage in facts.config.curriculum for name in stage.target_names(known)}
    rows = []
    for record in facts.stores:
        if record["kind"] == "targets" and record.get("key") in used:
            rows += _model_rows(record)
    return "## Teacher\n\n" + markdown_table(("targets store", "model", "sha256 of the weights", "dtype"), rows)


def _model_rows(record: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """A line for the model behind a store, and one for each further member of an ensemble."""
    model = record.get("model") or {}
    name = model.get("id", UNKNOWN)
    step = f" (checkpoint {model['checkpoint_step']})" if "checkpoint_step" in model else ""
    lines = [(record["name"], f"{name}{step}", _code(model.get("weights_digest")), model.get("dtype", UNKNOWN))]
    return lines + [
        (record["name"], f"{member.get('id', UNKNOWN)} (weight {member.get('weight', UNKNOWN)})",
         _code(member.get("weights_digest")), model.get("dtype", UNKNOWN))
        for member in model.get("ensemble", ())
    ]  # fmt: skip


def _training(facts: CardFacts) -> str:
    config = facts.config
    start = "random weights" if config.model.path is None else f"the weights of {last_name(config.model.path)}"
    optimizer, schedule = config.optimizer, config.schedule
    epoch = "" if facts.epoch is None else f" (in pass {facts.epoch + 1} over the rows)"
    names = "AdamW"
    if optimizer.kind == "muon":
        muon_lr = optimizer.lr if optimizer.muon_lr is None else optimizer.muon_lr
        names = f"Muon (lr {muon_lr:g}) for the backbone's matrices, AdamW for the rest"
    rows = [
        ("started from", start),
        *_vocabulary_row(config.data.vocabulary),
        ("optimizer steps", f"{facts.step:,}"),
        ("tokens", _count(facts.tokens)),
        ("rows", _count(facts.rows) + epoch),
        ("rows per step", f"{config.data.global_batch_rows:,}"),
        ("order of rows", f"{config.data.order}, seed {config.run.seed}"),
        ("optimizer", f"{names}, lr {optimizer.lr:g}, betas {optimizer.betas[0]:g} and {optimizer.betas[1]:g}, "
         f"eps {optimizer.eps:g}, weight decay {optimizer.weight_decay:g}, gradient clip {optimizer.grad_clip:g}"),
        ("learning rate", f"{schedule.kind} over each {schedule.span.rstrip('s')}, warm-up {schedule.warmup}, "
         f"last factor {schedule.min_ratio:g}"),
        ("arithmetic", f"{config.model.dtype}, ZeRO stage {config.zero_stage}, ranks at the last save: "
         f"{facts.world_size or UNKNOWN}"),
    ]  # fmt: skip
    stages = [_stage_row(config, number, stage) for number, stage in enumerate(config.curriculum)]
    header = ("stage", "until", "targets", "alpha", "label weight", "temperature", "divergence", "rows", "positions")
    return "\n\n".join(
        ["## Training", markdown_table(("what", "value"), rows), "### Curriculum", markdown_table(header, stages)]
    )


def _vocabulary_row(own: VocabularyConfig | None) -> list[tuple[str, str]]:
    """Nothing for a student that has the teacher's vocabulary."""
    if own is None:
        return []
    lacking = "; what it lacks of the teacher's joined the tail" if own.subset else ""
    return [("vocabulary", f"its own, of the tokenizer {last_name(own.tokenizer)}: rows came in its ids{lacking}")]


def _stage_row(config: TrainConfig, number: int, stage: Stage) -> tuple[str, ...]:
    def value(name: str) -> Any:
        own = getattr(stage, name)
        return getattr(config.objective, name) if own is None else own

    until = "the end" if stage.until is None else scalar_text(stage.until)
    until = f"step {until}" if isinstance(stage.until, int) else until
    name = stage.name or f"stage_{number}"
    rows = "all"
    if stage.rows is not None:
        of = ", ".join(f"{ref.stat} of {ref.store}" for ref in stage.rows.score.of) or "a keyed hash"
        rows = f"{stage.rows.keep} {scalar_text(stage.rows.share)} by {stage.rows.score.kind} ({of})"
    if stage.mix is not None:
        rows += f"; mix {', '.join(f'{source} {share:g}' for source, share in stage.mix.items())}"
    positions = "all" if stage.tokens is None else _positions_text(stage.tokens)
    if stage.weights is not None:
        positions += f", {stage.weights.describe()}"
    if not stage.distils:
        return (name, until, "none (labels)", "0", scalar_text(1.0 if stage.ce_weight is None else stage.ce_weight),
                "-", "-", rows, positions)  # fmt: skip
    weight = value("ce_weight")
    label = "1 - alpha" if weight is None else scalar_text(weight)
    if value("off_kd") == "ce":
        label += ", + alpha where KD is off"
    temperature = f"{scalar_text(value('temperature'))} ({value('temperature_side')})"
    divergence = f"{value('divergence')}, missing mass {value('missing_mass')}"
    targets = str(stage.targets) if stage.targets_clock is None else stage.targets_clock.describe()
    return (name, until, targets, scalar_text(value("alpha")), label, temperature, divergence, rows, positions)


def _positions_text(tokens: TokenSelector) -> str:
    of = "" if tokens.reference is None else f" less {tokens.reference}"
    floor = f", floor {scalar_text(tokens.floor)}"
    return f"{tokens.policy} by {tokens.source}{of}, share {scalar_text(tokens.share)}{floor}, for {tokens.applies_to}"


def _stores(facts: CardFacts) -> str:
    rows = []
    for record in facts.stores:
        selection = record.get("selection") or {}
        what = ", ".join(f"{key} {value}" for key, value in sorted(selection.items(), key=_mode_first))
        if record["kind"] == "scores":
            model = record.get("model") or {}
            what = f"small model {model.get('id', UNKNOWN)}, weights {_code(model.get('weights_digest'))}"
        sizes = (_count(record.get("rows")), _count(record.get("tokens")))
        rows.append(
            (record["name"], record["kind"], *sizes, what or ("-" if "rows" in record else UNKNOWN),
             _code(record["digest"]), _code(record.get("fingerprint")), record["note"])
        )  # fmt: skip
    header = ("store", "kind", "rows", "tokens", "holds", "digest", "fingerprint of run.json", "note")
    return "## Stores\n\n" + markdown_table(header, rows)


def _mode_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "mode", item[0]


def _heldout(facts: CardFacts) -> str:
    if facts.heldout is None:
        return f"## Held-out figures\n\n{UNKNOWN.capitalize()}: the run had no evaluation up to this step."
    found = {key: facts.heldout[key] for key in FIGURES if facts.heldout.get(key) is not None}
    rows = [(FIGURES[key], f"{value:.5g}") for key, value in found.items()]
    where = f"Measured by the run at step {facts.heldout_step:,}"
    if facts.heldout_step != facts.step:
        where += f", **not** at step {facts.step:,} of these weights: no evaluation was recorded there"
    return f"## Held-out figures\n\n{where}.\n\n" + markdown_table(("figure", "value"), rows)


def _reproduce(facts: CardFacts) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items()) or UNKNOWN
    return "\n\n".join(
        [
            "## Reproduce",
            "```sh\npotstill train --config config.yaml\n```",
            f"`config.yaml` is the resolved configuration of the run (sha256 `{facts.config_digest}`). Here it stands "
            "with paths cut to their last names:",
            f"<details><summary>config.yaml</summary>\n\n```yaml\n{_configuration(facts.config)}```\n\n</details>",
            f"Versions at the last start of the run: {packages}.",
        ]
    )


def _configuration(config: TrainConfig) -> str:
    tree = config.model_dump(mode="json")
    data = tree["data"]
    places: list[tuple[dict[str, Any], tuple[str, ...]]] = [(tree["run"], ("output_dir",))]
    places += [(tree["model"], ("path", "config")), (tree["checkpoint"], ("resume",))]
    for owner in (data, *data["sources"].values()):
        places.append((owner, ("tokens", "heldout", "heldout_targets")))
        places += [(owner[group], tuple(owner[group])) for group in ("targets", "scores")]
    for group, keys in places:
        group |= {key: last_name(group[key]) for key in keys if isinstance(group[key], str)}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def scalar_text(value: Any) -> str:
    """A constant, or a schedule in words."""
    if isinstance(value, int | float):
        return f"{value:g}"
    peak = f" to {value.peak:g}" if hasattr(value, "peak") else ""
    return f"{value.start:g}{peak} to {value.end:g} ({value.kind})"


def _count(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _code(value: Any) -> str:
    return UNKNOWN if value is None else f"`{value}`"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; signs that would end a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[_cell(str(value)) for value in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
