"""What runs inside vLLM's workers: they say which model class and which attention they have really taken."""

from __future__ import annotations

from typing import Any


class WorkerReport:
    """Mixed into vLLM's worker class (`worker_extension_cls`), and called by name on every worker."""

    def potstill_report(self) -> dict[str, Any]:
        """Names only: they travel between processes as plain values."""
        worker: Any = self
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        backends = {backend.get_name() for layer in layers if (backend := getattr(layer, "attn_backend", None))}
        return {"model": type(worker.get_model()).__name__, "attention": sorted(backends)}
