"""Errors of ranks that lost a partner: what torch says of it names neither the cause nor what to do.

By name and text, because this room does not import torch.
"""

from __future__ import annotations

NETWORK_ERRORS = ("DistNetworkError", "DistStoreError", "DistBackendError")  # of torch.distributed
GLOO = "gloo/transport"  # gloo raises RuntimeError, with the source file that found it


def is_lost_rank(error: BaseException) -> bool:
    """Whether ranks could not reach one another, or no longer."""
    return type(error).__name__ in NETWORK_ERRORS or GLOO in str(error)


def lost_rank_text(error: BaseException) -> str:
    """What a person has to know of such an error."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "EADDRINUSE" in text:
        return f"another process has the port where the ranks meet; set another MASTER_PORT ({text})"
    return (
        "another rank has ended, or does not answer any more (a machine that is lost or cut off). What is committed or "
        f"saved is safe, and the same command continues; of several ranks, the first that failed says why ({text})"
    )
