"""Counts launches of the losses with the Triton backend in the interpreter, and looks for waits; prints JSON.

A process of its own, as interpreted_worker.py is. Arguments: "all" for every divergence and mode, else the common ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from potstill.kernels import checks, rows_triton
from potstill.kernels.divergences import DIVERGENCES
from potstill.kernels.loss import linear_sparse_loss, sparse_loss
from tests.kernels.fast_interpreter import patch_once_per_launch
from tests.kernels.launches import HostWaitError, count_launches, no_host_waits
from tests.kernels.reference import as_draws, make_targets

V, D = 40, 8
ACTIVE = 6  # tokens that take part


def arguments(*, bias: bool, rows: bool, draws: bool) -> dict[str, Any]:
    """A call on ACTIVE tokens, of which some have no label or no target; with `rows` two more, without a weight."""
    num_tokens = ACTIVE + 2 * rows
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((num_tokens, D), (V, D), (V,))]
    targets = make_targets(num_tokens, V, [5, 0, 3])
    weights = torch.ones(num_tokens)
    if rows:
        weights[[3, 7]] = 0.0
    labels = torch.randint(0, V, (num_tokens,), generator=generator)
    labels[1] = -100
    return {
        "hidden": leaves[0],
        "weight": leaves[1],
        "bias": leaves[2] if bias else None,
        # The move notes how many entries a token has at most.
        "targets": (as_draws(targets, 20) if draws else targets).to("cpu"),
        "labels": labels,
        "token_weights": weights if rows else None,
        "num_active": ACTIVE if rows else None,
        "normalizer": torch.tensor(7.0),
        "backend": "triton",
    }


def step(call: dict[str, Any]) -> None:
    """Forward and backward."""
    loss, _ = linear_sparse_loss(**call)
    loss.backward()


def count(call: dict[str, Any], num_chunks: int) -> Counter[str]:
    for name in ("hidden", "weight", "bias"):
        if call[name] is not None:
            call[name].grad = None
    return count_launches(lambda: step({**call, "chunk_bytes": ACTIVE // num_chunks * V * 4}))


def launches(*, bias: bool = False, rows: bool = False, **settings: Any) -> dict[str, Any]:
    """Launches per chunk and those of a call beside them, from calls of two and of six chunks."""
    call = arguments(bias=bias, rows=rows, draws=settings.get("divergence") == "sampled") | settings
    two, six = (count(call, chunks) for chunks in (2, 6))
    per_chunk = {name: (six[name] - two[name]) / 4 for name in six}
    per_call = {name: two[name] - 2 * number for name, number in per_chunk.items()}
    sums = {"per_chunk": sum(per_chunk.values()), "per_call": sum(per_call.values())}
    return sums | {"chunk": per_chunk, "call": {name: number for name, number in per_call.items() if number}}


def find_wait(*, rows: bool = False, from_logits: bool = False, **settings: Any) -> str | None:
    """What the call would wait for, or None."""
    call = arguments(bias=True, rows=rows, draws=settings.get("divergence") == "sampled") | settings
    if from_logits:
        hidden, weight, _ = (call.pop(name) for name in ("hidden", "weight", "bias"))
        call["logits"] = (hidden @ weight.T).detach().requires_grad_()
    else:
        call["chunk_bytes"] = 2 * V * 4
    try:
        with no_host_waits():
            loss, _ = (sparse_loss if from_logits else linear_sparse_loss)(**call)
            loss.backward()
    except HostWaitError as error:
        return str(error)
    return None


def loss_beyond(**changes: Any) -> list[bool]:
    """Which tokens' losses are not finite where, as on a GPU, nobody has looked at the ids; found one by one."""
    call = arguments(bias=False, rows=False, draws=False)
    labels, ids = call["labels"].clone(), call["targets"].ids.clone()
    if "label" in changes:
        labels[2] = changes["label"]
    if "id" in changes:
        ids[int(call["targets"].offsets[3])] = changes["id"]
    targets = dataclasses.replace(call["targets"], ids=ids)
    found = []
    for number in range(ACTIVE):
        weights = torch.zeros(ACTIVE)
        weights[number] = 1.0
        given = {**call, "labels": labels, "targets": targets, "token_weights": weights, "num_active": 1}
        loss, _ = linear_sparse_loss(**given, alpha=0.5)
        found.append(not bool(loss.isfinite()))
    return found


def every_setting(*, all_of_them: bool) -> dict[str, dict[str, Any]]:
    """Divergences with each of their modes, with and without a temperature and a cap; or two of them."""
    found = {}
    for divergence, entry in DIVERGENCES.items():
        for mode in entry.modes:
            for temperature in (1.0,) if divergence == "sampled" else (1.0, 2.0):
                for cap in (None, 8.0):
                    settings = {"divergence": divergence, "missing_mass": mode, "temperature": temperature}
                    name = f"{divergence} {mode} T={temperature} cap={cap}"
                    found[name] = settings | {"soft_cap": cap, "alpha": 0.6, "z_loss": 0.01}
    few = ("forward_kl tail T=2.0 cap=8.0", "mse_logprobs support T=2.0 cap=None", "sampled renorm T=1.0 cap=None")
    return found if all_of_them else {name: given for name, given in found.items() if name.startswith(few)}


def main(which: str) -> None:
    # As on a GPU: the checks that look at values do so on a CPU alone, where it is free.
    checks.reads_values = lambda device: False
    rows_triton.MAX_BLOCK = rows_triton.HALF_BLOCK = 256
    common: dict[str, Any] = {"alpha": 0.5, "ce_weight": 0.5, "z_loss": 1e-4}
    settings = every_setting(all_of_them=which == "all")
    launches(**common)  # what is kept from call to call
    out: dict[str, Any] = {
        "common": launches(**common),
        "common rows": launches(rows=True, **common),
        "common bias": launches(bias=True, **common),
        "any": {name: launches(**given) for name, given in settings.items()},
        "waits": {},
    }
    beyond = ({"label": V}, {"label": 1 << 40}, {"id": V}, {"id": -1}, {"id": 2**31 - 1})
    out["beyond"] = {str(changes): loss_beyond(**changes) for changes in beyond}
    for name, given in settings.items():
        out["waits"][name] = find_wait(**given)
    for rows in (False, True):
        for from_logits in (False, True):
            name = f"common rows={rows} from_logits={from_logits}"
            out["waits"][name] = find_wait(rows=rows, from_logits=from_logits, **common)
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    patch_once_per_launch()
    main(sys.argv[1] if len(sys.argv) > 1 else "common")
