"""quest_dist._cuda needs no driver: it imports anywhere and counts the devices that there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quest_dist
from quest_dist.backend import compiled_cuda

pytest.importorskip("quest_dist._cuda", reason="quest_dist._cuda is not built")
ROOT = Path(quest_dist.__file__).parents[1]


def python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_without_a_visible_device_there_are_none() -> None:
    code = "from quest_dist import _cuda; print(_cuda.device_count())"
    assert python(code, CUDA_VISIBLE_DEVICES="") == "0"


def test_devices_are_those_of_torch() -> None:
    assert compiled_cuda().device_count() == torch.cuda.device_count()


@pytest.mark.parametrize("order", ["_cpu, _cuda", "_cuda, _cpu"])
def test_both_modules_live_in_one_process(order: str) -> None:
    code = (
        f"from quest_dist import {order}; "
        "print(_cpu.Strided(0, 1, 2, 3) is not None, _cuda.Strided(0, 1, 2, 3) is not None)"
    )
    assert python(code) == "True True"


def test_the_workspace_holds_32_parts_of_every_head() -> None:
    assert compiled_cuda().attend_workspace_bytes(2, 8, 128) == 2 * 8 * 32 * (128 + 2) * 4


def test_the_runtime_is_linked_statically() -> None:
    from quest_dist import _cuda

    assert b"libcudart.so" not in Path(_cuda.__file__).read_bytes()
