"""The dataset card of a sealed store: README.md beside its files, for the Hugging Face hub and for people.

A pure function of run.json and the manifest. It is no part of the store: the digest does not depend on it, and readers,
verify and gc leave it alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from potstill.storage.errors import StoreError, UnsealedError
from potstill.storage.files.folder import StorePath
from potstill.storage.files.paths import open_folder
from potstill.storage.store.seal import Manifest, load_manifest
from potstill.storage.store.spec import RunSpec
from potstill.storage.store.writer import CARD_MARK, CARD_NAME, MAX_CARD_BYTES, load_spec

LICENSE_PLACEHOLDER = "fill-in-before-publishing"
# The hub's own words for the number of examples, by their upper bounds.
_SIZES = {
    10**3: "n<1K",
    10**4: "1K<n<10K",
    10**5: "10K<n<100K",
    10**6: "100K<n<1M",
    10**7: "1M<n<10M",
    10**8: "10M<n<100M",
    10**9: "100M<n<1B",
    10**10: "1B<n<10B",
    10**11: "10B<n<100B",
    10**12: "100B<n<1T",
}
_WHAT = {
    "targets": "a language model's stored next-token distributions, truncated and compressed, to distil students from",
    "tokens": "packed rows of tokens with document bounds",
    "scores": "a small language model's scores of every token",
}
_READ = {
    "targets": "print(row.targets.offsets[:3], row.targets.ids[:8], row.targets.log_tail[:2])  # CSR by token",
    "tokens": "print(row.tokens[:8], row.doc_lens)",
    "scores": "print(row.label_logprob[:8], row.label_rank[:8])",
}


def write_card(path: StorePath) -> bool:
    """Put README.md into a sealed store: True if this call wrote it, False where the same card stands there.

    Raises UnsealedError before the seal, and StoreError where another README.md stands there, which is left alone.
    """
    folder = open_folder(path)
    spec = load_spec(folder)
    manifest = load_manifest(folder, spec)
    if manifest is None:
        raise UnsealedError(f"{folder.url} is not sealed, so its digest is not known; run potstill seal {folder.url}")
    card = dataset_card(spec, manifest, name=folder.url.rpartition("/")[2]).encode()
    found = folder.read(CARD_NAME, max_bytes=MAX_CARD_BYTES)
    if found is None:
        folder.prepare()
        if folder.create(CARD_NAME, card):
            return True
        found = folder.read(CARD_NAME, max_bytes=MAX_CARD_BYTES)
    if found != card:
        raise StoreError(
            f"{folder.url}/{CARD_NAME} stands there and is not the card of this store (edited, or of another version); "
            "it is left as it is: move it away to have the card written"
        )
    return False


def dataset_card(spec: RunSpec, manifest: Manifest, *, name: str) -> str:
    """The card as Markdown, with its YAML front matter."""
    return "\n\n".join([_front_matter(spec, manifest), *_body(spec, manifest, name)]) + "\n"


def _front_matter(spec: RunSpec, manifest: Manifest) -> str:
    size = next((word for bound, word in _SIZES.items() if manifest.num_rows < bound), "n>1T")
    tags = ["potstill", spec.kind, *(["knowledge-distillation"] if spec.kind == "targets" else [])]
    return "\n".join(
        [
            "---",
            "# TODO: put the licence that you publish this store under (the Hub refuses this one).",
            f"license: {LICENSE_PLACEHOLDER}",
            "task_categories:",
            "- text-generation",
            "tags:",
            *(f"- {tag}" for tag in tags),
            "size_categories:",
            f"- {size}",
            "# The columns are binary planes, which the Hub's viewer cannot show.",
            "viewer: false",
            "---",
        ]
    )


def _body(spec: RunSpec, manifest: Manifest, name: str) -> Iterator[str]:
    yield f"# {name}"
    yield (
        f"{CARD_MARK.decode()} `{spec.kind}`: {_WHAT[spec.kind]}.\n\n"
        "**Licence: not chosen yet.** Whoever publishes this store fills it in, here and in the first lines of this "
        "file; it depends on the texts and, of targets and scores, on the model's own licence."
    )
    rows = [("", ""), ("---", "---"), *_facts(spec, manifest)]
    yield "\n".join(f"| {what} | {_cell(value)} |" for what, value in rows)
    yield (
        "## Read\n\n```python\nfrom potstill.storage import StoreReader\n\n"
        f'reader = StoreReader("{name}")  # or "hf://datasets/ORG/NAME@COMMIT/PATH"\n'
        f"row = reader.row(0)\n{_READ[spec.kind]}\n```\n\n"
        "Every unit is an Arrow IPC file, whose planes any Arrow reader gets at; docs/format.md says what they mean."
    )
    yield (
        f"## Verify\n\n```\npotstill verify {name} --deep\n```\n\nreads every byte against its checksum and every row "
        f"against the rules. The store is the one of this card where `potstill stats {name} --json` names the digest "
        "above."
    )


def _facts(spec: RunSpec, manifest: Manifest) -> Iterator[tuple[str, str]]:
    yield from _model(spec)
    yield "tokenizer", f"{spec.vocab_size:,} entries, digest `{spec.tokenizer_digest}`"
    if spec.selection is not None:
        yield "selection", ", ".join(f"{key} {value}" for key, value in sorted(spec.selection.items(), key=_mode_first))
        yield "temperatures", ", ".join(f"{value:g}" for value in (1.0, *spec.temperatures))
    if spec.input_digest is not None:
        yield "tokens store that it speaks of", f"digest `{spec.input_digest}`"
    yield "rows", f"{manifest.num_rows:,} of {spec.row_length:,} tokens at most"
    yield "tokens", f"{manifest.num_tokens:,}"
    per_token = f"{manifest.num_bytes / manifest.num_tokens:.1f} bytes a token" if manifest.num_tokens else "no tokens"
    yield "size", f"{manifest.num_bytes:,} bytes in {len(manifest.units):,} units, {per_token}"
    yield "digest", f"`{manifest.store_digest}`"


def _model(spec: RunSpec) -> Iterator[tuple[str, str]]:
    if spec.teacher is None:
        return
    model: Mapping[str, Any] = spec.teacher
    yield ("teacher" if spec.kind == "targets" else "model"), str(model.get("id", "not recorded"))
    step = model.get("checkpoint_step")
    if step is not None:
        yield "checkpoint", f"step {step}"
    yield "sha256 of its weights", f"`{model.get('weights_digest', 'not recorded')}`"
    yield "run in", f"{model.get('dtype', 'not recorded')} by engine {model.get('engine', 'not recorded')}"
    for member in model.get("ensemble", ()):
        yield "with", f"{member.get('id')} (weight {member.get('weight')}), weights `{member.get('weights_digest')}`"


def _mode_first(item: tuple[str, Any]) -> tuple[bool, str]:
    return item[0] != "mode", item[0]


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
