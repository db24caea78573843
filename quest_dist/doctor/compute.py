"""What computes: the toolchain, the kernels that are built here, and the GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from quest_dist.cluster import available_gpus
from quest_dist.doctor.finding import Asked, Finding, ok, problem, warning
from quest_dist.folders import PACKAGE

BUILD = "run `make setup`, or `python setup.py build_ext --inplace` in the checkout"
SECONDS = 5.0  # that a tool may take to say its version


def toolchain(asked: Asked) -> Iterator[Finding]:
    """The C++ compiler that builds the kernels, and CUDA's."""
    built = _built("_cpu")
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    found = next((p for name in (*named, "c++", "g++", "clang++") if (p := shutil.which(name))), "")
    install = "install one (apt install g++, dnf install gcc-c++, xcode-select --install)"
    if found:
        yield ok("compiler", _said(found) or found)
    elif built:
        yield warning("compiler", "none in PATH; the kernels are built already", install)
    else:
        yield problem("compiler", "none in PATH, and the kernels are not built", install)
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [str(Path(home) / "bin" / "nvcc") for home in homes if home]
    nvcc = shutil.which(places[0]) or shutil.which("nvcc") or shutil.which(places[-1])
    if nvcc:
        yield ok("nvcc", _said(nvcc) or nvcc)
    elif available_gpus() and not _built("_cuda"):
        advice = f"install CUDA's nvcc or set CUDA_HOME, then {BUILD}"
        yield warning("nvcc", "not found, and there is a GPU without kernels", advice)
    else:
        yield ok("nvcc", "not found; it is only needed to build kernels for a GPU")


def kernels(asked: Asked) -> Iterator[Finding]:
    """Whether the compiled ops load into this Python and answer as the reference does."""
    if not _built("_cpu"):
        tags = [path.name.split(".")[1] for path in PACKAGE.glob("_cpu.*.so")]
        here = str(sysconfig.get_config_var("SOABI"))
        fact = f"built for {', '.join(tags)}, this is {here}" if tags else "not built"
        yield problem("kernels", fact, BUILD)
        return
    import torch

    from quest_dist import ops

    try:
        fact = f"{ops.isa()} (of {', '.join(ops.isas())})"
    except ImportError as error:
        yield problem("kernels", " ".join(str(error).split()), f"unset QUEST_ISA, or {BUILD}")
        return
    made = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 32, generator=made)
    lengths, most = (torch.tensor([n], dtype=torch.int32) for n in (32, 8))
    with ops.backend("reference"):
        expected, _ = ops.select_top(scores, lengths, most, force_last=True)
    index, _ = ops.select_top(scores, lengths, most, force_last=True)
    if not torch.equal(index.sort().values, expected.sort().values):
        fact += f", but a selection differs from the reference's with torch {torch.__version__}"
        yield problem("kernels", fact, BUILD)
        return
    yield ok("kernels", f"{fact}, agree with the reference on torch {torch.__version__}")


def gpu(asked: Asked) -> Iterator[Finding]:
    """The driver's view of the GPUs, torch's, and whether kernels for them are built."""
    devices = available_gpus()
    if not devices:
        yield ok("gpu", "none visible here; workers compute on the CPU")
        return
    smi = shutil.which("nvidia-smi")
    asks = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    lines = _output([smi, *asks]).splitlines() if smi else []
    if lines:
        yield ok("driver", "; ".join(line.strip() for line in lines))
    else:
        advice = "install NVIDIA's driver and its nvidia-smi, or expose them to this container"
        yield warning("driver", f"{devices} GPUs in /dev, but nvidia-smi says nothing", advice)
    import torch

    if not torch.cuda.is_available():
        advice = "install a torch with CUDA whose version the driver supports"
        yield warning("gpu", f"torch {torch.__version__} finds no GPU", advice)
        return
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    fact = f"torch {torch.__version__} (CUDA {torch.version.cuda}): {', '.join(names)}"
    if not _built("_cuda"):
        yield warning("gpu", f"{fact}; our kernels for it are not built", BUILD)
        return
    yield ok("gpu", f"{fact}; `cluster.device=cuda` computes there")


def _said(tool: str) -> str:
    """A tool's name and version, in its own words."""
    lines = [line for line in _output([tool, "--version"]).splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), "").strip()


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _built(name: str) -> bool:
    """Whether a compiled module lies in this package: another checkout's may be found as well."""
    found = importlib.util.find_spec(f"quest_dist.{name}")
    return found is not None and Path(found.origin or "").parent == PACKAGE
