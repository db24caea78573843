"""What a GPU's kernels noted: kept in one number a device, and named where it can be."""

from __future__ import annotations

import pytest
import torch

from quest_dist import faults
from quest_dist.arguments import Arguments

pytest.importorskip("quest_dist._cuda", reason="quest_dist._cuda is not built")
HERE = torch.device("cpu")  # kernels that note something are not needed here


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_faults", {})
    monkeypatch.setattr(faults, "debug", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def note(kind: str, at: int, column: int) -> None:
    key = (faults.KINDS.index(kind) + 1) << 58 | at << 32 | column
    with torch.inference_mode():
        faults.fault_of(HERE).fill_(key)


def test_a_number_made_in_inference_mode_is_forgotten_outside_of_it() -> None:
    note("keep", 3, 0)
    with pytest.raises(ValueError, match=r"cpu met a wrong value of keep \(place 3, 0\); QUEST_D"):
        faults.check_faults(HERE)
    faults.check_faults(HERE)


def test_an_op_is_told_of_a_fault_that_is_not_its_own() -> None:
    note("lengths", 1, 0)
    table = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"a wrong value of lengths \(place 1, 0\), in a graph or"):
        faults.check(Arguments("gather"), page_table=table)
    faults.check(Arguments("gather"), page_table=table)


def test_the_number_is_no_graphs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="the first op on cpu cannot be captured; run one"):
            faults.fault_of(HERE)
    number = faults.fault_of(HERE)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert faults.fault_of(HERE) is number


def test_a_device_without_an_index_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    number = torch.full((1,), (faults.KINDS.index("items") + 1) << 58)
    monkeypatch.setitem(faults._faults, torch.device("cuda", 1), number)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(ValueError, match="an op on cuda met a wrong value of items"):
        faults.check_faults(torch.device("cuda"))
    faults.check_faults(torch.device("cuda:1"))
