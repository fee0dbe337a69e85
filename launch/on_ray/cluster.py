"""The connection to a Ray cluster, and what it has."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from potstill.common.errors import UserError
from potstill.launch.on_ray.options import RayOptions

log = logging.getLogger(__name__)


class Cluster:
    """A connection, made when it is first used and closed with the context; a cluster started here ends then."""

    def __init__(self, options: RayOptions) -> None:
        self.options = options
        self._is_open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            import ray

            ray.shutdown()

    def connect(self) -> None:
        """Join the cluster, or start one of this machine. Raises UserError."""
        if self._is_open:
            return
        # Asked of nobody, Ray would report figures of its use to its makers.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        address = self.options.address
        try:
            ray.init(
                address=address, logging_level=logging.WARNING, include_dashboard=False if address == "local" else None
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster at {address or os.environ.get('RAY_ADDRESS') or 'this machine'}: {error}. Give its "
                "HOST:PORT (that of `ray start --head`), or --ray local for one of this machine alone"
            ) from error
        self._is_open = True
        nodes = [node for node in ray.nodes() if node["Alive"]]
        log.info(
            "Ray cluster %s: %d nodes, %s", ray.get_runtime_context().gcs_address, len(nodes), describe(self.has())
        )

    def has(self) -> dict[str, float]:
        """CPUs, GPUs and bytes of memory of all living nodes."""
        import ray

        return dict(ray.cluster_resources())

    def num_gpus(self) -> float:
        """GPUs of an actor: as the options say, else one where the cluster has any."""
        asked = self.options.num_gpus
        return (1.0 if self.has().get("GPU") else 0.0) if asked is None else asked

    def asked(self) -> dict[str, float]:
        """What one actor asks for."""
        return {"CPU": self.options.num_cpus, "GPU": self.num_gpus()}

    def room(self) -> int:
        """How many actors the living nodes have room for, others' work left aside."""
        import ray

        asked = {name: value for name, value in self.asked().items() if value > 0}
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not asked:
            return len(alive)
        return sum(int(min(node.get(name, 0.0) / value for name, value in asked.items())) for node in alive)


def describe(resources: Mapping[str, Any]) -> str:
    """Resources in words: `16 CPU, 2 GPU`."""
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


def is_alive(node: str) -> bool:
    """Whether a node of the cluster is there."""
    import ray

    return any(one["NodeID"] == node and one["Alive"] for one in ray.nodes())
