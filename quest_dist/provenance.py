"""Provenance: what launched a sweep, on what, from which commit; said in figures and in MLflow."""

from __future__ import annotations

import importlib
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from quest_dist import redact
from quest_dist.cluster import available_cpus

OS_RELEASE = "/etc/os-release"
#: Packages whose version can change what is computed, stored or drawn.
PACKAGES = ("torch", "transformers", "ray", "mlflow", "numpy", "matplotlib")


@dataclass(frozen=True)
class Provenance:
    """The command, the composed configuration (YAML, unresolved), git facts, and the hardware and
    software that compute; without secrets, since all of it is kept and shown."""

    command: str = ""
    config: str = ""
    overrides: tuple[str, ...] = ()
    source: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def here(cls, arguments: Sequence[str], config: str, device: str = "cpu") -> Provenance:
        """Return what is true of this process and machine, whose workers compute on `device`."""
        told = tuple(redact.text(argument) for argument in arguments)
        command = shlex.join(["python", "-m", "quest_dist.sweep", *told])
        known = git(), hardware(device), environment(device)
        return cls(command, redact.text(config), told, *known)

    def save(self, directory: Path) -> None:
        """Keep config.yaml and overrides.yaml in a folder named by the time, as Hydra would."""
        folder = directory / time.strftime("%Y%m%d-%H%M%S")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(self.config, encoding="utf-8")
        lines = (f"- {json.dumps(override)}\n" for override in self.overrides)
        (folder / "overrides.yaml").write_text("".join(lines), encoding="utf-8")


def git() -> dict[str, str]:
    """Return commit, branch and repoURL of the checkout this package runs from, else nothing.

    A commit with uncommitted changes ends in '+'.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return {}
    commit = _git(root, "rev-parse", "HEAD")
    if commit and _git(root, "status", "--porcelain", "--untracked-files=no"):
        commit += "+"
    found = {
        "commit": commit,
        "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
        # A remote's address may carry a password.
        "repoURL": re.sub(r"//[^/@]*@", "//", _git(root, "config", "--get", "remote.origin.url")),
    }
    return {name: value for name, value in found.items() if value}


def hardware(device: str = "cpu") -> str:
    """Return the CPU's name and how many of its cores this process may use; for the device cuda,
    also this machine's GPUs."""
    cpu = platform.processor() or platform.machine()
    if sys.platform == "linux":
        found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
        cpu = found[1].strip() if found else cpu
    if device != "cuda":
        return f"{cpu}, {available_cpus()} cores"
    names = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [m[1].strip() for p in names if (m := re.search(r"Model:\s*(.+)", _read(str(p))))]
    gpus = f"{len(models)} x {models[0]}" if models else "cuda"
    return f"{cpu}, {available_cpus()} cores, {gpus}"


def environment(device: str = "cpu") -> dict[str, str]:
    """Return the versions of what computes here: system, Python, packages, and our kernels'
    instruction set, or how they were left out."""
    system = platform.platform()
    if sys.platform == "linux" and (name := re.search(r'PRETTY_NAME="(.+)"', _read(OS_RELEASE))):
        system = f"{name[1]}, Linux {platform.release()}, {platform.machine()}"
    found = {"system": system, "Python": platform.python_version()}
    for package in ("quest_dist", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    try:
        found["kernels"] = str(importlib.import_module("quest_dist._cpu").isa())
    except ImportError as error:
        found["kernels"] = f"not usable: {error}"
    found["device"] = device
    return found


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
