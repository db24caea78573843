"""Cluster: what a sweep may use, and how many workers that makes (standard library only).

`Cluster` is the settings of conf/cluster; `Workers` is what they come to on this machine. Memory
is bytes, GPUs may be a fraction (several workers on one GPU share its memory, unenforced).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quest_dist import node_types
from quest_dist.node_types import NodeType

BACKENDS = ("ray", "inline")
DEVICES = ("auto", "cpu", "cuda")
#: Share of the memory available at start that workers may plan to use.
MEMORY_SHARE = 0.7


@dataclass
class Cluster:
    """Settings of `cluster`; None means: choose for this machine.

    `backend`: ray (Ray Tune) or inline (this process, one unit after the other). `address`: a
    running Ray cluster to attach to; None starts a private one on this machine. `device`: where
    workers compute; auto is cuda where `gpus_per_worker` gives them a GPU, else cpu; cuda gives
    each one GPU unless `gpus_per_worker` says otherwise.
    `cpus_per_worker` is also a worker's number of threads. `max_failures`: times that a unit is
    tried again after its worker broke. `check_memory`: units that need more memory, by estimate,
    than this machine (or its smallest GPU) has are not begun. `env`: environment variables for the
    workers of an attached cluster. `node_types`: kinds of its nodes, by a name of yours; where
    there are any, units go to nodes of these kinds alone (see node_types).
    """

    backend: str = "ray"
    address: str | None = None
    device: str = "auto"
    workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    samples_per_unit: int | None = None
    max_failures: int = 2
    check_memory: bool = True
    env: dict[str, str] = field(default_factory=dict)
    node_types: dict[str, Any] = field(default_factory=dict)

    @property
    def types(self) -> dict[str, NodeType]:
        """`node_types`, read; ValueError for what is none."""
        return node_types.read(self.node_types)


@dataclass(frozen=True)
class Workers:
    """How many workers run at once, and what each has: CPUs (= threads) and GPUs."""

    count: int
    cpus: int
    gpus: float

    @property
    def device(self) -> str:
        """Where they compute."""
        return "cuda" if self.gpus else "cpu"


def check(cluster: Cluster) -> None:
    """Raise ValueError for settings that no machine can honour."""
    if cluster.backend not in BACKENDS:
        raise ValueError(f"cluster.backend={cluster.backend!r}: choose ray or inline")
    for key in ("workers", "cpus_per_worker", "samples_per_unit"):
        value = getattr(cluster, key)
        if value is not None and value < 1:
            raise ValueError(f"cluster.{key}={value}: must be at least 1, or null to choose")
    if cluster.max_failures < 0:
        raise ValueError(f"cluster.max_failures={cluster.max_failures}: must be at least 0")
    gpus = cluster.gpus_per_worker
    if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise ValueError(
            f"cluster.gpus_per_worker={gpus}: must be a fraction up to 1 or a whole number"
        )
    if cluster.device not in DEVICES:
        raise ValueError(f"cluster.device={cluster.device!r}: choose {', '.join(DEVICES)}")
    if gpus is not None and cluster.device == ("cpu" if gpus else "cuda"):
        raise ValueError(
            f"cluster.device={cluster.device} contradicts cluster.gpus_per_worker={gpus:g};"
            " leave one of them out"
        )
    if cluster.node_types and cluster.address is None:
        raise ValueError("cluster.node_types: one machine has one type; set cluster.address, too")
    node_types.check(cluster.types)


def gpus_of(cluster: Cluster) -> float:
    """GPUs of each worker."""
    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if cluster.device == "cuda" else 0.0


def device_of(cluster: Cluster) -> str:
    """Where its workers compute: cpu or cuda."""
    return "cuda" if gpus_of(cluster) else "cpu"


def fit(cluster: Cluster, memory_per_worker: int) -> Workers:
    """Return the workers that these settings make, before the number of units is known.

    On this machine: as many as its CPUs (or GPUs) and MEMORY_SHARE of its available memory
    hold, at least one. Attached: as set, by default 4 CPUs a worker and 8 workers at once (a
    number for cutting the work; the cluster's resources are what limits them).
    """
    check(cluster)
    gpus = gpus_of(cluster)
    if cluster.address is not None:
        return Workers(cluster.workers or 8, cluster.cpus_per_worker or 4, gpus)
    cpus, devices = available_cpus(), available_gpus()
    if gpus > devices:
        key = "device=cuda" if cluster.gpus_per_worker is None else f"gpus_per_worker={gpus:g}"
        raise ValueError(f"cluster.{key}: this machine has {devices} GPUs")
    if gpus and (lacking := lacking_for_gpus()):
        raise ValueError(f"cluster.device=cuda: {lacking}")
    if (cluster.cpus_per_worker or 1) > cpus:
        raise ValueError(
            f"cluster.cpus_per_worker={cluster.cpus_per_worker}: this machine has {cpus} CPUs"
        )
    if cluster.backend == "inline":
        return Workers(1, cluster.cpus_per_worker or cpus, gpus)
    count = cluster.workers
    if count is None:
        by_memory = int(available_memory() * MEMORY_SHARE / max(memory_per_worker, 1))
        by_device = int(devices / gpus) if gpus else cpus
        count = max(1, min(cpus // (cluster.cpus_per_worker or 1), by_memory, by_device))
    count = max(1, min(count, cpus // (cluster.cpus_per_worker or 1)))
    return Workers(count, cluster.cpus_per_worker or cpus // count, gpus)


def check_fits(cpus: float, gpus: float, nodes: Sequence[Mapping[str, float]]) -> None:
    """Raise ValueError when no node can ever hold one worker; Ray would wait for ever."""
    wanted = {"CPU": cpus, "GPU": gpus}
    if any(all(node.get(name, 0.0) >= n for name, n in wanted.items()) for node in nodes):
        return
    largest = ", ".join(
        f"{max((node.get(name, 0.0) for node in nodes), default=0.0):g} {name}s" for name in wanted
    )
    raise ValueError(
        f"cluster: a worker needs {cpus:g} CPUs and {gpus:g} GPUs on one node;"
        f" the largest of {len(nodes)} nodes have {largest};"
        " set cluster.cpus_per_worker and cluster.gpus_per_worker"
    )


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask and its control group's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        cpus = min(cpus, max(1, int(quota[0]) // int(quota[1])))
    return cpus


def available_gpus() -> int:
    """NVIDIA GPUs this process may use, found without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [p for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name)]
    if visible is None:
        return len(devices)
    named = [part for part in visible.split(",") if part.strip() not in ("", "-1")]
    return min(len(named), len(devices))


def lacking_for_gpus() -> str:
    """What this installation lacks to compute on a GPU and what to do; empty if nothing."""
    if importlib.util.find_spec("quest_dist._cuda") is None:
        return (
            "quest_dist._cuda is not built; run `python setup.py build_ext --inplace` with CUDA's"
            " nvcc in PATH (QUEST_CUDA=1 says what is missing)"
        )
    torch = importlib.metadata.version("torch")
    return f"torch {torch} was built without CUDA; install one with it" if "+cpu" in torch else ""


def available_memory() -> int:
    """Bytes that could be used now: the machine's, or what its control group still allows."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else 8 * 2**30
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdigit() and used.isdigit():
        free = min(free, max(0, int(limit) - int(used)))
    return free


def worker_memory(cluster: Cluster) -> int | None:
    """Bytes that one worker can have at most; None where that is not known here (another machine
    whose node types say nothing, or no nvidia-smi)."""
    if cluster.address is not None:
        return node_types.largest(cluster.types, gpus_of(cluster))
    gpus = gpus_of(cluster)
    if not gpus:
        found = re.search(r"MemTotal:\s+(\d+) kB", _read("/proc/meminfo"))
        limit = _read("/sys/fs/cgroup/memory.max")
        sizes = [int(found[1]) * 1024] if found else []
        sizes += [int(limit)] if limit.isdigit() else []
        return min(sizes, default=None)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    each = [int(line) * 2**20 for line in said.stdout.split() if line.isdigit()]
    return int(min(each) * gpus) if each else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
