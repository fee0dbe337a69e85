"""What the model card of an export says: gathered from the run folder, the checkpoint and the stores.

Nothing is invented: what is not recorded, or cannot be read any more, stays None or is told in a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.storage import StoreError, StoreReader
from potstill.student_train.config.train import TrainConfig
from potstill.student_train.run.checkpoint import Checkpoint
from potstill.student_train.run.metrics import read_metrics
from potstill.student_train.run.run_folder import CONFIG_FILE, PACKAGES, read_done


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What the card is made of. `stores` holds one record per store, `heldout` the figures of `heldout_step`."""

    title: str
    architecture: str
    num_parameters: int
    dtype: str
    config: TrainConfig
    config_digest: str
    step: int
    total_steps: int | None
    tokens: int | None
    rows: int | None
    epoch: int | None
    world_size: int | None
    stores: Sequence[Mapping[str, Any]]
    heldout: Mapping[str, Any] | None
    heldout_step: int | None
    versions: Mapping[str, str]
    license: str | None = None  # as the hub writes it; None: whoever publishes chooses


def gather_facts(
    run: Path,
    checkpoint: Checkpoint,
    config: TrainConfig,
    *,
    title: str,
    hf_config: Any,
    num_parameters: int,
    dtype: str,
    license: str | None = None,
) -> CardFacts:
    """Read what the run has recorded. Stores that have moved away or changed give only their pinned digests."""
    manifest = checkpoint.manifest
    position = (manifest.get("data") or {}).get("position") or {}
    heldout_step, heldout = _heldout_figures(run, checkpoint.step)
    return CardFacts(
        title=title,
        architecture=(getattr(hf_config, "architectures", None) or [hf_config.model_type])[0],
        num_parameters=num_parameters,
        dtype=dtype,
        config=config,
        config_digest=hashlib.sha256((run / CONFIG_FILE).read_bytes()).hexdigest(),
        step=checkpoint.step,
        total_steps=config.run.max_steps,
        tokens=manifest["loop"].get("tokens"),
        rows=position.get("rows_consumed"),
        epoch=position.get("epoch"),
        world_size=manifest.get("world_size"),
        stores=list(_store_records(config, manifest.get("stores") or {})),
        heldout=heldout,
        heldout_step=heldout_step,
        versions=_versions(run),
        license=license,
    )


def _versions(run: Path) -> dict[str, str]:
    try:
        found = json.loads((run / "versions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: str(found[name]) for name in (*PACKAGES, "python", "commit") if name in found}


def _heldout_figures(run: Path, step: int) -> tuple[int | None, dict[str, Any] | None]:
    """Step and figures of the newest evaluation up to `step`, from the metrics, else from the mark of a done run."""
    file = run / "metrics.jsonl"
    records = [r for r in read_metrics(run) if r.get("kind") == "eval"] if file.is_file() else []
    usable = [record for record in records if record["step"] <= step]
    done = read_done(run) or {}
    if done.get("heldout") and done.get("step") == step:
        return step, dict(done["heldout"])
    return (usable[-1]["step"], usable[-1]) if usable else (None, None)


def _store_records(config: TrainConfig, pinned: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    """One record per store of the run: its name, kind, pinned digest, and what its run.json says if it is still it."""
    data = config.data
    for source in data.named_sources():
        before = f"{source.name}." if len(data.sources) > 1 else ""
        places: list[tuple[str, str, Path | str]] = [("tokens", "tokens", source.config.tokens)]
        places += [(name, "targets", place) for name, place in source.config.targets.items()]
        places += [(name, "scores", place) for name, place in source.config.scores.items()]
        for name, kind, place in places:
            yield {**_store_record(f"{before}{name}", kind, place, pinned.get(f"{before}{name}")), "key": name}
    for before, owner in (("", data), *((f"{name}.", source) for name, source in data.sources.items())):
        for name, kind in (("heldout", "tokens"), ("heldout_targets", "targets")):
            if (place := getattr(owner, name)) is not None:
                yield _store_record(f"{before}{name}", kind, place, None)


def _store_record(name: str, kind: str, place: Path | str, pinned: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {"name": name, "kind": kind, "folder": last_name(place), "digest": pinned, "note": ""}
    try:
        reader = StoreReader(place)
    except (StoreError, OSError):
        return {**record, "note": "the store could not be read when this card was written"}
    if pinned is not None and reader.digest != pinned:
        return {**record, "note": "the store at that place is another one now"}
    spec = reader.spec
    return {
        **record,
        "digest": reader.digest,
        "fingerprint": spec.fingerprint,
        "rows": reader.num_rows,
        "tokens": reader.num_tokens,
        "selection": dict(spec.selection or {}) or None,
        "temperatures": list(spec.temperatures),
        "model": dict(spec.teacher or {}) or None,
        "note": "" if pinned is not None else "not pinned by the run: digest as of this card",
    }


def last_name(place: Path | str) -> str:
    """The last part of a path or URL."""
    return str(place).rstrip("/").rpartition("/")[2]
