"""What every test file may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quest_dist import ops

# Small tensors: more threads only wait for each other. Tests of threading set their own.
torch.set_num_threads(1)


@pytest.fixture(params=ops.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set of this machine."""
    before = ops.isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)
