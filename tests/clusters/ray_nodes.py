"""Several Ray nodes on this machine: prints the address, then obeys lines `add NODE` and `remove NODE`."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {}
    print(cluster.address, flush=True)
    for line in sys.stdin:
        word, number = line.split()
        if word == "add":
            nodes[number] = cluster.add_node(num_cpus=1)
        else:
            cluster.remove_node(nodes.pop(number), allow_graceful=False)
        print("done", flush=True)
