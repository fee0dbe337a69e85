"""The table that the demo ends with, read from the files that its jobs have written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from potstill.common.jobs import shell_line
from potstill.common.progress import format_seconds
from potstill.common.sizes import format_bytes
from potstill.common.spread import Spread, differences, is_gain
from potstill.common.text_tables import table
from potstill.launch.demo.ngrams import NgramLosses, ngram_losses, pairs
from potstill.launch.demo.sizes import ARMS, DemoSize, student_names

if TYPE_CHECKING:
    from potstill.storage import StoreReader, TokensRow

NGRAMS = "ngrams.json"
ARM_NAMES = {"labels": "labels", "kd": "plain KD", "distilled": "distilled, selector"}


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def report(root: Path, size: DemoSize, times: Mapping[str, float]) -> str:
    """One table of the models, what it says, one line of the store, one table of times, and what to do next."""
    losses = {arm: [evaluation(root, f"{arm}-{seed}")["heldout_loss"] for seed in size.seeds] for arm in ARMS}
    parts = [
        models_table(root, size, losses),
        seeds_table(size.seeds, losses),
        f"{verdict(losses)}\n{selector_verdict(losses)}",
        store_line(root),
        times_table(times),
        next_steps(root, size),
    ]
    return "\n\n".join(parts)


def evaluation(root: Path, name: str) -> dict[str, Any]:
    """What `potstill eval` has found for one model."""
    return _json(root / "eval" / f"{name}.json")


def reference_losses(root: Path) -> NgramLosses:
    """Unigram and bigram of the tokens store on the held-out rows; counted once and kept in the folder."""
    kept = root / NGRAMS
    if kept.is_file():
        return NgramLosses(**_json(kept))
    from potstill.storage import StoreReader

    train, heldout = (StoreReader(str(root / "data" / part)) for part in ("train", "heldout"))
    counted, measured = (pairs((row.tokens, row.doc_lens) for row in _rows(store)) for store in (train, heldout))
    found = ngram_losses(counted, measured, vocab_size=train.spec.vocab_size)
    kept.write_text(json.dumps(vars(found)) + "\n", encoding="utf-8")
    return found


def _rows(store: StoreReader) -> Iterator[TokensRow]:
    for number in range(store.num_rows):
        yield cast("TokensRow", store.row(number))


def models_table(root: Path, size: DemoSize, losses: Mapping[str, Sequence[float]]) -> str:
    """A line for each model, arm and reference: size, training, and the loss on the same held-out positions."""
    ngrams = reference_losses(root)
    rows = [
        ("unigram, for reference", "", "", "", f"{ngrams.unigram:.4f}", "", ""),
        ("bigram, for reference", "", "", "", f"{ngrams.bigram:.4f}", "", ""),
        *(_model_row(root, name, [name], []) for name in ("teacher", "slm")),
    ]
    for arm in ARMS:
        gaps = [] if arm == "labels" else differences(losses["labels"], losses[arm])
        rows.append(_model_row(root, ARM_NAMES[arm], [f"{arm}-{seed}" for seed in size.seeds], gaps))
    header = ["model", "parameters", "steps", "tokens", "held-out loss", "ahead of labels", "agrees with teacher"]
    count = f"Mean ± standard deviation over {len(size.seeds)} seeds; loss in nats per token of clean held-out text"
    return f"{table(header, rows)}\n{count}, {ngrams.positions:,} tokens."


def _model_row(root: Path, title: str, names: Sequence[str], gaps: Sequence[float]) -> tuple[str, ...]:
    figures, done = [evaluation(root, name) for name in names], _json(root / "runs" / names[0] / "done.json")
    agreement = [figure["agreement"] for figure in figures]
    told = "" if title == "teacher" or None in agreement else f"{100 * Spread.of(agreement).mean:.1f} %"
    return (
        title,
        f"{figures[0]['num_parameters']:,}",
        f"{done['step']:,}",
        f"{done['tokens']:,}",
        Spread.of([figure["heldout_loss"] for figure in figures]).format(),
        Spread.of(gaps).format(sign=True) if gaps else "",
        told,
    )


def seeds_table(seeds: Sequence[int], losses: Mapping[str, Sequence[float]]) -> str:
    """Held-out loss by seed and arm."""
    rows = [(str(seed), *(f"{losses[arm][at]:.4f}" for arm in ARMS)) for at, seed in enumerate(seeds)]
    return table(["seed", *(ARM_NAMES[arm] for arm in ARMS)], rows)


def verdict(losses: Mapping[str, Sequence[float]]) -> str:
    """Who is ahead on held-out loss, and by how much, as it came out."""
    gap = Spread.of(differences(losses["labels"], losses["distilled"]))
    word = "ahead of" if gap.mean > 0 else "BEHIND"
    size = Spread(abs(gap.mean), gap.sd, gap.count).format()
    return (
        f"The distilled students are {size} nats {word} those that saw labels only (paired by seed: same initial "
        "weights and number of steps)."
    )


def selector_verdict(losses: Mapping[str, Sequence[float]]) -> str:
    """Whether the selector was worth it here: plain KD minus distilled, paired by seed."""
    gains = differences(losses["kd"], losses["distilled"])
    gain, (low, high) = Spread.of(gains), Spread.of(gains).interval()
    answer = {True: "yes", False: "no", None: "cannot be told"}[is_gain(gains)]
    return (
        f"Was the selector worth it here? {answer}: plain KD minus distilled is {gain.format(sign=True)} nats "
        f"(95 % interval of the mean by Student's t, {gain.count} seeds: {low:+.4f} to {high:+.4f})."
    )


def store_line(root: Path) -> str:
    """What a token costs in the targets store."""
    manifest = _json(root / "targets" / "train" / "manifest.json")
    num_bytes, tokens = manifest["num_bytes"], manifest["num_tokens"]
    entries = manifest["num_entries"] / max(manifest["num_targets"], 1)
    return (
        f"Targets store: {format_bytes(num_bytes)} for {tokens:,} tokens, {num_bytes / tokens:.1f} bytes/token, "
        f"{entries:.1f} entries kept per target on average."
    )


def times_table(times: Mapping[str, float]) -> str:
    """Wall time of each job that ever ran here; jobs overlap, so their sum is more than the whole."""
    return table(["job", "wall time"], [(name, format_seconds(seconds)) for name, seconds in times.items()])


def next_steps(root: Path, size: DemoSize) -> str:
    """Where things are, and commands to go on with."""
    row = ["--row", "0", "--tokens", f"{root}/data/train", "--tokenizer", f"{root}/data/tokenizer"]
    other = ["--set", f"run.output_dir={root}/runs/mine", "run.name=mine", "objective.alpha=0.5"]
    runs = [f"{root}/runs/{name}" for name in student_names(size.seeds)]
    commands = [
        ["inspect", f"{root}/targets/train", *row],
        ["stats", f"{root}/targets/train"],
        ["verify", f"{root}/targets/train", "--deep"],
        ["train", "--config", f"{root}/configs/distilled.yaml", *other],
        ["report", *runs, "--output", f"{root}/report.html"],
    ]
    return "\n".join(
        [
            f"Files are in {root}: corpus/ (text; the field `noise` names every span of noise), data/ targets/ scores/ "
            "(stores), configs/, runs/ (metrics, checkpoints), models/ (Hugging Face), logs/",
            "Go on with:",
            *(f"  {shell_line(['potstill', *words])}" for words in commands),
        ]
    )
