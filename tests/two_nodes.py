"""A program: the sweep of `beating_unit` on a Ray cluster of two nodes, both on this machine.

`python two_nodes.py OUTPUT_DIR [override ...]`. A process of its own: Ray, once it has run in one,
keeps too much there to attach to another.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import beating_unit
from ray.cluster_utils import Cluster

CPUS = 2  # of each node


def main(output_dir: Path, *overrides: str) -> int:
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS})
    try:
        nodes.add_node(num_cpus=CPUS)
        beat = {name: value for name, value in os.environ.items() if name.startswith("BEAT_")}
        env = [f"+cluster.env.{name}='{value}'" for name, value in beat.items()]
        place = ["cluster=ray", f"cluster.address={nodes.address}", "cluster.cpus_per_worker=1"]
        return beating_unit.sweep(output_dir, [*place, *env, *overrides])
    finally:
        nodes.shutdown()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
