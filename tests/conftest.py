"""What every test file may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import gpu
import pytest
import torch

from quest_dist import ops

# Small tensors: more threads only wait for each other. Tests of threading set their own.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An inline worker sets variables, among them which GPUs are seen, and torch's threads: for
    its test only."""
    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(params=[*ops.isas(), pytest.param("cuda", marks=gpu.needs_gpu)])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once on each instruction set of this machine, and on its GPU."""
    before = ops.isa()
    if request.param == "cuda":
        gpu.move_ops(monkeypatch)
    else:
        ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu.needs_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once on the CPU and once on the GPU."""
    if request.param == "cuda":
        gpu.move_ops(monkeypatch)
    return str(request.param)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu.needs_gpu)])
def place(request: pytest.FixtureRequest) -> str:
    """Runs the test once with the model on the CPU and once with it on the GPU."""
    return str(request.param)
