"""What runs inside vLLM's workers: they say what they run, and end when the process that owns them has ended.

vLLM imports this module in each worker before the weights are loaded (`worker_extension_cls`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from pathlib import Path
from typing import Any

OWNER = "POTSTILL_VLLM_OWNER"  # environment: the mark of the worker of `dump`, while its vLLM starts


class WorkerReport:
    """Mixed into vLLM's worker class, and called by name on every worker."""

    def potstill_report(self) -> dict[str, Any]:
        """Names only: they travel between processes as plain values."""
        worker: Any = self
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        backends = {backend.get_name() for layer in layers if (backend := getattr(layer, "attn_backend", None))}
        return {"model": type(worker.get_model()).__name__, "attention": sorted(backends)}


def owner_mark() -> str:
    """This process, by a text that no other one has: its id, in which namespace of ids, since which boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    if sys.platform != "linux" or not boot.is_file():
        return ""
    return f"{os.getpid()} {os.readlink('/proc/self/ns/pid')} {boot.read_text(encoding='ascii').strip()}"


def end_with_owner(mark: str) -> bool:
    """Kill this process when the one of `owner_mark` ends, at once if it has ended already.

    False where that one is not to be seen from here (another machine or container, no Linux), or is this one. vLLM's
    processes wait without end for a parent that was killed, with their weights in the GPUs' memory. The engine between
    the two ends by itself when its workers are gone.
    """
    owner, _, place = mark.partition(" ")
    if not mark or place != owner_mark().partition(" ")[2] or int(owner) == os.getpid():
        return False
    try:
        handle = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def wait() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with-owner", daemon=True).start()
    return True


if OWNER in os.environ:
    # At import: vLLM calls nothing of an extension by itself, and loading takes minutes in which one may be killed.
    end_with_owner(os.environ[OWNER])
