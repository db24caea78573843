"""The machine's state: what may disturb a time, read before and after it is taken.

Of a CPU: load average, frequency where it can be read, and the share of time that a hypervisor took
away (steal). Of a GPU: clocks, power, temperature and throttle reasons, through nvidia-smi. What
cannot be read is said, never made up. The standard library alone; reading it takes milliseconds on
a CPU, a process on a GPU. The part for a GPU has not been run on one yet.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: What nvidia-smi is asked for: its name there, and ours.
GPU_FIELDS = {
    "clocks.sm": "gpu_sm_mhz",
    "clocks.mem": "gpu_memory_mhz",
    "power.draw": "gpu_watts",
    "temperature.gpu": "gpu_celsius",
    "clocks_throttle_reasons.active": "gpu_throttle",
}
THROTTLE = "gpu_throttle"
#: Of nvidia-smi's mask of throttle reasons, those that only say that nothing asks for more.
IDLE_REASONS = 0x1 | 0x2


@dataclass(frozen=True)
class State:
    """One reading: `numbers` by name, `texts` for what is no number or could not be read."""

    numbers: Mapping[str, float] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    ticks: tuple[int, int] = (0, 0)
    """Stolen and all ticks of all CPUs since boot."""


def processor() -> str:
    """The CPU's name."""
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return found[1].strip() if found else platform.processor() or platform.machine()


def read(gpu: str | None = None) -> State:
    """The state now; `gpu` is the id of the GPU that is timed (its UUID or number), None: none."""
    numbers: dict[str, float] = {}
    texts: dict[str, str] = {}
    if hasattr(os, "getloadavg"):
        numbers["load"] = os.getloadavg()[0]
    mhz = _frequencies()
    if mhz:
        numbers["cpu_mhz"] = statistics.mean(mhz)
    else:
        texts["cpu_mhz"] = "the system gives no frequency"
    if gpu is not None:
        gpu_numbers, texts["gpu_state"] = parsed_gpu(_nvidia_smi(gpu))
        numbers |= gpu_numbers
    return State(numbers, {name: text for name, text in texts.items() if text}, _ticks())


def between(before: State, after: State) -> tuple[dict[str, float], dict[str, str]]:
    """Numbers named *_before and *_after and the share stolen between, and texts."""
    facts = {f"{name}_before": value for name, value in before.numbers.items()}
    facts |= {f"{name}_after": value for name, value in after.numbers.items()}
    passed = after.ticks[1] - before.ticks[1]
    texts = {**before.texts, **after.texts}
    if passed > 0:
        facts["steal_share"] = (after.ticks[0] - before.ticks[0]) / passed
    masks = [int(state.numbers[THROTTLE]) for state in (before, after) if THROTTLE in state.numbers]
    if masks:
        active = [mask & ~IDLE_REASONS for mask in masks]
        texts["throttled"] = f"nvidia-smi's mask {max(active):#x}" if any(active) else "no"
    return facts, texts


def stated(before: State, after: State) -> dict[str, Any]:
    """Both readings as a report holds them."""
    facts, texts = between(before, after)
    return {"processor": processor(), **facts, **texts}


def parsed_gpu(line: str) -> tuple[dict[str, float], str]:
    """Numbers of a line that nvidia-smi gave for GPU_FIELDS, and what could not be read."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(GPU_FIELDS):
        return {}, line.strip() or "nvidia-smi gave nothing"
    numbers, lacking = {}, []
    for cell, name in zip(cells, GPU_FIELDS.values(), strict=True):
        try:
            numbers[name] = float(int(cell, 16)) if cell.startswith("0x") else float(cell)
        except ValueError:
            lacking.append(f"{name}: {cell}")
    return numbers, "; ".join(lacking)


def _nvidia_smi(gpu: str) -> str:
    """Its line for one GPU, or why there is none."""
    command = ["nvidia-smi", f"--id={gpu}", "--format=csv,noheader,nounits"]
    command.append(f"--query-gpu={','.join(GPU_FIELDS)}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi cannot be run ({type(error).__name__})"
    if done.returncode:
        return f"nvidia-smi failed with status {done.returncode}"
    return done.stdout.strip()


def _frequencies() -> list[float]:
    """MHz of every CPU."""
    folder = Path("/sys/devices/system/cpu")
    texts = [_read(str(p)) for p in folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq")]
    found = [int(text) / 1000 for text in texts if text.isdigit()]
    if not found:
        found = [float(m) for m in re.findall(r"cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"))]
    return found


def _ticks() -> tuple[int, int]:
    """Stolen and all ticks of /proc/stat's first line: user nice system idle iowait irq softirq
    steal (guest times are in user's)."""
    cells = _read("/proc/stat").split("\n")[0].split()[1:9]
    counts = [int(cell) for cell in cells if cell.isdigit()]
    return (counts[7], sum(counts)) if len(counts) == 8 else (0, 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
