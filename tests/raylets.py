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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from processes import TESTS, kill

#: A killed node is given up after a second or two here; Ray's own defaults take some 15.
IMPATIENT = {"health_check_period_ms": 400, "health_check_failure_threshold": 3}
STORE = 80 * 2**20
ONE: Mapping[str, float] = {"CPU": 1}
# Linux's CLONE_NEWNET, CLONE_NEWNS and CLONE_FS
NETWORK, MOUNTS, ROOTS = 0x40000000, 0x00020000, 0x200
LIBC = ctypes.CDLL(None, use_errno=True)


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
                stack.enter_context(_back("mnt", MOUNTS))
                _hide(asked["hides"])
            if asked["apart"]:
                stack.enter_context(_back("net", NETWORK))
                given["node_ip_address"] = _network()
        except (OSError, subprocess.CalledProcessError):
            if asked["hides"]:
                return "not permitted"
        nodes[asked["name"]] = node = cluster.add_node(**given)
    return str(node.node_ip_address)


@contextlib.contextmanager
def _back(name: str, flag: int) -> Iterator[None]:
    """Return to this namespace at the end, if it was left; what was started stays in the other."""
    place = Path(f"/proc/thread-self/ns/{name}")
    with place.open() as home:
        here = place.stat().st_ino
        yield
        if place.stat().st_ino != here:
            LIBC.unshare(ROOTS)  # of threads that share their root none may change its mounts
            assert LIBC.setns(home.fileno(), flag) == 0, os.strerror(ctypes.get_errno())


def _hide(folder: str) -> None:
    """Put an empty folder in a folder's place, for this thread and what it starts."""
    if LIBC.unshare(MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    _system("mount --make-rprivate /", f"mount -t tmpfs none {folder}")


def _network() -> str:
    """Move this thread into a network of its own, which reaches ours by a pair of virtual Ethernet
    devices; its address there."""
    name, here = f"q{os.getpid()}", Path("/proc/self/ns/net").stat().st_ino
    ours, theirs = (f"10.213.{os.getpid() % 250}.{n}" for n in (1, 2))
    holder = subprocess.Popen(["unshare", "--net", "sleep", "60"], stderr=subprocess.DEVNULL)
    try:
        place = Path(f"/proc/{holder.pid}/ns/net")
        while place.stat().st_ino == here:
            if holder.poll() is not None:
                raise OSError("no network namespaces")
            time.sleep(0.01)
        _system(
            f"ip link add {name} type veth peer name {name}x",
            f"ip link set {name}x netns {holder.pid}",
            f"ip addr add {ours}/30 dev {name}",
            f"ip link set {name} up",
        )
        with place.open() as file:
            if LIBC.setns(file.fileno(), NETWORK):
                raise OSError(ctypes.get_errno(), "setns")
        _system(
            "ip link set lo up",
            f"ip addr add {theirs}/30 dev {name}x",
            f"ip link set {name}x up",
            f"ip route add default via {ours}",
        )
    finally:
        holder.kill()
        holder.wait()
    return theirs


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
