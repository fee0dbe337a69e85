"""Several Ray nodes on this machine: prints the address, then obeys lines `add NODE`, `remove NODE`, `drain NODE`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        word, number = line.split()
        if word == "add":
            nodes[number] = cluster.add_node(num_cpus=1)
        elif word == "drain":  # as a provider announces that it takes a spot machine back
            ray = str(Path(sys.executable).with_name("ray"))
            asked = ["drain-node", "--address", cluster.address, "--node-id", nodes[number].node_id]
            why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            when = ["--deadline-remaining-seconds", "25"]
            subprocess.run([ray, *asked, *why, *when], check=True, stdout=sys.stderr)
        else:
            cluster.remove_node(nodes.pop(number), allow_graceful=False)
        print("done", flush=True)
