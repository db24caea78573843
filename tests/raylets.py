"""A Ray cluster of several raylets on this machine, each a process that can be killed or added.

As a program it holds the cluster, so that nothing of Ray stays in the tests' own process, and takes
one command a line: an object of name, resources and environment adds a node; a name kills one, its
raylet and all its workers at once, as a machine that loses its power. It answers with a line each,
first of all with the address. It ends, and the cluster with it, when its input does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import TESTS, kill

#: A dead node is noticed after a second or two here; Ray's own defaults take 15.
IMPATIENT = {"health_check_period_ms": 400, "health_check_failure_threshold": 3}
STORE = 80 * 2**20
ONE: Mapping[str, float] = {"CPU": 1}


class Raylets:
    """A cluster whose head has no CPUs: only the nodes that are added run units."""

    def __init__(self, said: Path, **env: str) -> None:
        self.address = ""
        self._said = said.open("w")
        self._program = subprocess.Popen(
            [sys.executable, str(TESTS / "raylets.py")],
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Raylets:
        self.address = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._program.stdin is not None
        self._program.stdin.close()
        self._program.wait(60)
        self._said.close()

    def add(self, name: str, resources: Mapping[str, float] = ONE, **env: str) -> None:
        """Start a node with these resources; its workers find its name in NODE_NAME."""
        self._ask(json.dumps({"name": name, "resources": dict(resources), "env": env}))

    def kill(self, name: str) -> int:
        """SIGKILL a node; how many processes died."""
        return int(self._ask(json.dumps(name)))

    def _ask(self, line: str) -> str:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{line}\n")
        self._program.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._program.stdout is not None
        line = self._program.stdout.readline().strip()
        assert line, f"the cluster ended: {Path(self._said.name).read_text()[-2000:]}"
        return line


def main(patient: bool) -> None:
    """Hold a cluster and obey."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too
    head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": STORE}
    if not patient:
        head["_system_config"] = IMPATIENT
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    print(cluster.address, file=answers, flush=True)
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            if isinstance(asked, str):
                answer = _kill(nodes[asked])
            else:
                answer = len(nodes)
                resources = asked["resources"]
                nodes[asked["name"]] = cluster.add_node(
                    num_cpus=resources.pop("CPU"),
                    resources=resources,
                    object_store_memory=STORE,
                    env_vars={"NODE_NAME": asked["name"], **asked["env"]},
                )
            print(answer, file=answers, flush=True)
    finally:
        cluster.shutdown()


def _kill(node: Any) -> int:
    """SIGKILL all processes of a node; the workers are its raylet's children."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if _parent(path) == raylet
    ]
    return sum(kill(pid) for pid in (raylet, *children))


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended meanwhile
        return 0


if __name__ == "__main__":
    main("--patient" in sys.argv)
