"""A Ray cluster of several raylets on this machine, each a process that can be killed or added.

As a program it holds the cluster, so that nothing of Ray stays in the tests' own process, and takes
one command a line: an object says what node to add; a name kills one, its raylet and all its
workers at once, as a machine that loses its power. It answers with a line each, first of all with
the address. It ends, and the cluster with it, when its input does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from processes import TESTS, kill

#: A dead node is noticed after a second or two here; Ray's own defaults take 15.
IMPATIENT = {"health_check_period_ms": 400, "health_check_failure_threshold": 3}
STORE = 80 * 2**20
ONE: Mapping[str, float] = {"CPU": 1}
NETWORK, MOUNTS = 0x40000000, 0x00020000  # Linux's CLONE_NEWNET, CLONE_NEWNS
HERE, THERE = "10.213.77.1", "10.213.77.2"  # both ends of a pair of virtual Ethernet devices


class Raylets:
    """A cluster whose head has no CPUs: only the nodes that are added run units."""

    def __init__(self, said: Path) -> None:
        self.address = ""
        self._said = said.open("w")
        self._program = subprocess.Popen(
            [sys.executable, str(TESTS / "raylets.py")],
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
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

    def add(
        self,
        name: str,
        resources: Mapping[str, float] = ONE,
        *,
        apart: bool = False,
        hides: Path | None = None,
        **env: str,
    ) -> str:
        """Start a node with these resources; return its address. Its workers find its name in
        NODE_NAME. `apart`: in a network of its own, where that may be made; `hides`: with an empty
        folder in that place, or PermissionError."""
        asked = {"name": name, "resources": dict(resources), "env": env, "apart": apart}
        answer = self._ask(json.dumps(asked | {"hides": str(hides) if hides else None}))
        if answer == "not permitted":
            raise PermissionError("namespaces may not be made here")
        return answer

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


def main() -> None:
    """Hold a cluster and obey."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray prints, too
    head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": STORE}
    if not os.environ.get("RAYLETS_PATIENT"):
        head["_system_config"] = IMPATIENT
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    print(cluster.address, file=answers, flush=True)
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            if isinstance(asked, str):
                answer = str(_kill(nodes[asked]))
            else:
                answer = _added(cluster, nodes, asked)
            print(answer, file=answers, flush=True)
    finally:
        cluster.shutdown()


def _added(cluster: Any, nodes: dict[str, Any], asked: Mapping[str, Any]) -> str:
    """Start a node; its address, or that what was asked is not permitted."""
    resources = dict(asked["resources"])
    given: dict[str, Any] = {
        "num_cpus": resources.pop("CPU"),
        "resources": resources,
        "object_store_memory": STORE,
        "env_vars": {"NODE_NAME": asked["name"], **asked["env"]},
    }
    with contextlib.ExitStack() as stack:
        try:
            if asked["hides"]:
                stack.enter_context(_namespace(MOUNTS, "mnt"))
                _system("mount --make-rprivate /", f"mount -t tmpfs none {asked['hides']}")
            if asked["apart"]:
                stack.enter_context(_network())
                given["node_ip_address"] = THERE
        except (OSError, subprocess.CalledProcessError):
            stack.close()
            if asked["hides"]:
                return "not permitted"
        nodes[asked["name"]] = node = cluster.add_node(**given)
    return str(node.node_ip_address)


@contextlib.contextmanager
def _namespace(flag: int, name: str) -> Iterator[None]:
    """What this thread starts meanwhile lives in a new namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY)
    if libc.unshare(flag):
        raise OSError(ctypes.get_errno(), f"unshare {name}")
    try:
        yield
    finally:
        if libc.setns(home, flag):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(home)


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """A network of its own, which reaches this one by a pair of virtual Ethernet devices."""
    with _namespace(NETWORK, "net"):
        # It holds the namespace until the node is there, and is how `ip` is told which one.
        holder = subprocess.Popen(["sleep", "600"])
    try:
        _system(
            "ip link add quest0 type veth peer name quest1",
            f"ip link set quest1 netns {holder.pid}",
            f"ip addr add {HERE}/30 dev quest0",
            "ip link set quest0 up",
        )
        with _joined(holder.pid):
            _system(
                "ip link set lo up",
                f"ip addr add {THERE}/30 dev quest1",
                "ip link set quest1 up",
                f"ip route add default via {HERE}",
            )
            yield
    finally:
        holder.kill()
        holder.wait()


@contextlib.contextmanager
def _joined(pid: int) -> Iterator[None]:
    """What this thread starts meanwhile lives in a process's network."""
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if libc.setns(there, NETWORK):
        raise OSError(ctypes.get_errno(), "setns net")
    try:
        yield
    finally:
        libc.setns(home, NETWORK)
        os.close(home)
        os.close(there)


def _system(*commands: str) -> None:
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


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
    main()
