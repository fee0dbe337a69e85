"""The claims, in the order in which they are told. A new one is a file and a name here."""

from __future__ import annotations

from importlib import import_module

from benchmarks.claims.base import Claim
from potstill.common.errors import UserError

CLAIMS: tuple[str, ...] = (
    "progressive",
    "progressive_grammar",
    "salt",
    "pd",
    "pocl",
    "paced",
    "selector",
    "targets",
    "pruned",
)


def find_claim(name: str) -> Claim:
    """The claim of this name. Raises UserError: there is none."""
    if name not in CLAIMS:
        raise UserError(f"no claim {name!r}; there are {', '.join(CLAIMS)}")
    found: Claim = import_module(f"benchmarks.claims.{name}").CLAIM
    return found


def head(name: str) -> str:
    """What the head of its file says: the paper's words, the set-up, the arms, the rule, the cost."""
    return (import_module(f"benchmarks.claims.{name}").__doc__ or "").strip()
