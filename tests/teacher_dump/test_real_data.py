"""A model and a text that nobody here wrote: the stored label log-probabilities give transformers' own perplexity."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from potstill.storage import ScoresRow, StoreReader, TargetsRow
from potstill.teacher_dump import DumpConfig, PrepareConfig, ScoreConfig, dump, prepare, score
from potstill.teacher_dump.tokenizer import load_tokenizer, tokenizer_digest


@pytest.fixture(scope="module")
def stories(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model = shared_data / "models" / "stories260K"
    source = shared_data / "tinystories" / "valid.jsonl.xz"
    output = tmp_path_factory.mktemp("stories")
    prepare(
        PrepareConfig(
            input=[source],
            output=output,
            tokenizer=model,
            row_length=512,
            rows_per_unit=8,
            append_eos=False,
            add_bos=True,
        )
    )
    return model, output / "train"


def straight_loss(model_folder: Path, source: Path, *, row_length: int) -> float:
    """Mean loss of transformers over the same cut of the text: documents end to end, cut every row_length tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    total, count, filled = 0.0, 0, 0
    with lzma.open(source, "rt") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        while ids:
            span, ids = ids[: row_length - filled], ids[row_length - filled :]
            filled = (filled + len(span)) % row_length
            if len(span) > 1:
                tensor = torch.tensor([span])
                with torch.no_grad():
                    logprobs = model(input_ids=tensor).logits[0, :-1].double().log_softmax(-1)
                total -= float(logprobs.gather(1, tensor[0, 1:, None]).sum())
                count += len(span) - 1
    return total / count


def test_dumped_perplexity_is_that_of_transformers(
    shared_data: Path, stories: tuple[Path, Path], tmp_path: Path
) -> None:
    model, tokens = stories
    dump(
        DumpConfig(
            tokens=tokens,
            output=tmp_path / "t",
            teacher={"model": model},
            selection={"mode": "top_p_k", "k": 50, "p": 0.95},
        )
    )
    score(ScoreConfig(tokens=tokens, output=tmp_path / "s", model={"model": model}))
    expected = math.exp(straight_loss(model, shared_data / "tinystories" / "valid.jsonl.xz", row_length=512))
    assert expected < 6.0  # a teacher that knows these texts; a wrong layout gives tens
    for path in (tmp_path / "t", tmp_path / "s"):
        reader = StoreReader(path)
        weights = reader.row_stats["num_targets"].astype(np.float64)
        exact = math.exp(float((reader.row_stats["mean_loss"] * weights).sum() / weights.sum()))
        assert exact == pytest.approx(expected, rel=1e-5)
        total, count = 0.0, 0
        for row in reader.rows(range(reader.num_rows)):
            column = row.targets if isinstance(row, TargetsRow) else row
            assert isinstance(row, TargetsRow | ScoresRow)
            assert column.label_logprob is not None and column.label_rank is not None and column.entropy is not None
            total -= float(column.label_logprob.astype(np.float64).sum())
            count += int(reader.row_stats["num_targets"][row.row])
        # A targets store keeps label log-probabilities on steps of 1/16 nat, a scores store on 1/256.
        assert math.exp(total / count) == pytest.approx(expected, rel=3e-3 if path.name == "t" else 1e-3)


@pytest.mark.parametrize("name", ["gpt2-50k", "mistral-32k", "demo-bpe-8k"])
def test_real_tokenizers_load_and_have_their_own_digest(shared_data: Path, name: str) -> None:
    folder = shared_data / "tokenizers" / name
    digest = tokenizer_digest(load_tokenizer(str(folder)))
    assert digest == tokenizer_digest(load_tokenizer(str(folder)))
    if name == "demo-bpe-8k":
        assert digest == tokenizer_digest(load_tokenizer(str(shared_data / "models" / "teacher-7m")))
