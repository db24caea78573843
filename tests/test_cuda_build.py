"""What ptxas made of the kernels: code for every architecture, no spills, registers in bounds."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
REPORTS = sorted((ROOT / "build" / "cuda").glob("*.ptxas"))
SOURCES = sorted((ROOT / "kernels" / "cuda").glob("*.cu"))
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
#: Kernel -> most registers a thread, so that the blocks that its latency needs stay resident: 168
#: is three blocks of 128 threads on a multiprocessor, 128 four, 80 six, 64 eight; select_top has
#: its list to itself.
MOST_REGISTERS = {
    "append_kernel": 64,
    "gather_kernel": 40,
    "page_scores_kernel": 128,
    "token_scores_kernel": 80,
    "select_top_kernel": 96,
    "union_kernel": 48,
    "twice_kernel": 32,
    "decode_scores_kernel": 128,
    "decode_attend_kernel": 168,
    "attend_kernel": 168,
    "attend_packed_kernel": 168,
    "pack_kernel": 64,
    "probabilities_kernel": 32,
    "linear4_kernel": 128,
    "widen4_kernel": 40,
}
#: fp32, bf16 and fp16; where a row's lanes matter, three widths of each.
INSTANCES = {
    "append_kernel": 3,
    "gather_kernel": 3,
    "page_scores_kernel": 9,
    "token_scores_kernel": 9,
    "attend_kernel": 9,
    "attend_packed_kernel": 9,
    "pack_kernel": 3,
    "decode_scores_kernel": 9,
    "decode_attend_kernel": 9,
    "linear4_kernel": 6,
    "widen4_kernel": 3,
}

pytestmark = pytest.mark.skipif(
    not REPORTS or not any(map(shutil.which, ("nvcc", "/usr/local/cuda/bin/nvcc"))),
    reason="needs a checkout whose CUDA kernels were built",
)


class Entry(NamedTuple):
    """One kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int


def entries() -> list[Entry]:
    """All that ptxas reported."""
    found = []
    for report in REPORTS:
        parts = re.split(r"Compiling entry function ", report.read_text())[1:]
        for part in parts:
            name, architecture = re.match(r"'(\S+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
            stack, stores, loads = map(
                int,
                re.search(  # type: ignore[union-attr]
                    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
                    part,
                ).groups(),
            )
            registers = int(re.search(r"Used (\d+) registers", part)[1])  # type: ignore[index]
            kernel = next(known for known in MOST_REGISTERS if known in name)
            found.append(Entry(kernel, architecture, registers, stack, stores + loads))
    return found


def test_every_source_has_a_report() -> None:
    assert {path.stem for path in REPORTS} == {path.stem for path in SOURCES}


@pytest.mark.skipif("QUEST_CUDA_ARCHS" in os.environ, reason="built for chosen architectures")
def test_every_kernel_has_code_for_every_architecture() -> None:
    seen: dict[str, list[str]] = defaultdict(list)
    for entry in entries():
        seen[entry.kernel].append(entry.architecture)
    assert set(seen) == set(MOST_REGISTERS)
    for kernel, architectures in seen.items():
        assert set(architectures) == ARCHITECTURES, kernel
        for one in ARCHITECTURES:
            assert architectures.count(one) == INSTANCES.get(kernel, 1), (kernel, one)


def test_what_needs_code_of_its_own_from_9_0_says_so_where_the_build_looks() -> None:
    """setup.py reads .cu files only, and compiles those without this header once, as for 8.0."""
    kernels = [*SOURCES, *(ROOT / "kernels").rglob("*.h"), *(ROOT / "kernels").rglob("*.cuh")]
    distinguish = {path.name for path in kernels if "__CUDA_ARCH__" in path.read_text()}
    include = {path.name for path in kernels if '#include "chain.cuh"' in path.read_text()}
    assert distinguish == {"chain.cuh"}
    assert include == {"decode_attend.cu", "decode_scores.cu"}


def test_nothing_is_spilled() -> None:
    assert [entry for entry in entries() if entry.spilled or entry.stack] == []


def test_registers_stay_below_their_ceilings() -> None:
    assert [entry for entry in entries() if entry.registers > MOST_REGISTERS[entry.kernel]] == []
