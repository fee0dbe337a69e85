"""What a dump must hold, computed the long way: each document alone, dense float64, no code of this room."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tests.teacher_dump.tiny import token_rows


@dataclass(frozen=True)
class Token:
    """Truth at one position: logits and log-probabilities [V] over the tokenizer's ids, next token or None."""

    logits: np.ndarray
    logprobs: np.ndarray
    label: int | None

    @property
    def order(self) -> np.ndarray:
        return np.lexsort((np.arange(len(self.logprobs)), -self.logprobs.astype(np.float32)))

    @property
    def entropy(self) -> float:
        return float(-(np.exp(self.logprobs) * self.logprobs).sum())

    def log_tail(self, ids: np.ndarray, temperature: float = 1.0) -> float:
        """Log of the mass outside `ids` after a softmax at this temperature."""
        scaled = self.logits / temperature
        probabilities = np.exp(scaled - np.logaddexp.reduce(scaled))
        with np.errstate(divide="ignore"):
            return float(np.log(np.delete(probabilities, ids).sum()))


def dense_truth(model_folder: Path, tokens: Path, *, vocab_size: int) -> list[list[Token]]:
    """Truth of every row, token by token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rows = []
    for row in token_rows(tokens):
        found = []
        for document in torch.from_numpy(row.tokens).long().split(row.doc_lens.tolist()):
            with torch.no_grad():
                logits = model(input_ids=document[None]).logits[0, :, :vocab_size].double()
            logprobs = logits.log_softmax(-1).numpy()
            labels = [*document[1:].tolist(), None]
            found += [Token(logits[i].numpy(), logprobs[i], labels[i]) for i in range(len(labels))]
        rows.append(found)
    return rows
