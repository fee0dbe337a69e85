"""From the answers by row of the input to a tokens store of whole documents, which a stage can train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from potstill.storage import RunSpec, StoreReader, seal_store
from potstill.teacher_dump.config import WINDOW
from potstill.teacher_dump.documents import Place
from potstill.teacher_dump.prepared import MASK_COLUMN, Output, StoreSummary
from potstill.teacher_dump.rollouts.config import RolloutConfig
from potstill.teacher_dump.rollouts.questions import all_rows
from potstill.teacher_dump.tokenizer import text_encoder
from potstill.teacher_dump.train_and_heldout import copy_beside, place_copy


def pack_kept(config: RolloutConfig, *, answers: str, output: str, tokenizer: str | None) -> StoreSummary | None:
    """Seal the answers and pack them, whole documents in rows of the input's length; None where nothing was kept.

    tokenizer: its folder or name, of which a copy is put beside the stores; None: ids without text. Continues what an
    earlier run began. Raises UserError or StoreError.
    """
    seal_store(answers)
    reader = StoreReader(answers)
    source = StoreReader(config.tokens).spec
    spec = RunSpec(
        kind="tokens",
        row_length=source.row_length,
        rows_per_unit=source.rows_per_unit,
        num_rows=None,
        vocab_size=source.vocab_size,
        tokenizer_digest=source.tokenizer_digest,
        columns=(MASK_COLUMN,),
        info={
            **_inherited(source.info),
            "part": "rollout",
            "answers": reader.digest,
            "rollout": reader.spec.info["rollout"],
            "keep": config.keep,
            "packing": {"rule": "whole", "window": WINDOW, "too_long": "cut"},
        },
    )
    kept = None
    if tokenizer is not None and "://" not in config.output:
        encoder = text_encoder(tokenizer, append_eos=False, add_bos=False)
        kept = copy_beside(Path(config.output), tokenizer, encoder, force=config.force)
    packed = Output(output, spec, force=config.force, tokenizer=kept, packing="whole", window=WINDOW)
    place_copy(kept, {"tokens": packed})
    number = 0
    for row in all_rows(reader):
        assert row.mask is not None
        ends = np.cumsum(row.doc_lens)
        for end, size in zip(ends.tolist(), row.doc_lens.tolist(), strict=True):
            place, here = Place(0, number), slice(end - size, end)
            number += 1
            if row.mask[here].any() and packed.wants(place):
                packed.add(place, row.tokens[here], row.mask[here])
    packed.close(Place(0, number), bad_lines=0)
    if packed.empty:
        return None
    summary = packed.finish(bad_lines=0)
    packed.seal()
    return summary


def _inherited(info: Any) -> dict[str, Any]:
    """What a store of answers takes from that of the prompts: the marks round documents, and where the tokenizer is."""
    return {key: info[key] for key in ("prefix", "suffix", "tokenizer") if key in info}
