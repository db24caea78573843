"""The ledger keeps every result once, whatever happens to the process that writes it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grids
import pytest
from tiny_unit import record

from quest_dist.ledger import Ledger, lock

POINTS = grids.points()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "out" / "ledger.db")


def test_a_record_is_kept_once_and_never_changed(ledger: Ledger) -> None:
    point = POINTS[0]
    assert ledger.add([record(point, 0), record(point, 1)]) == 2
    changed = record(point, 0) | {"score": 99.0}
    assert ledger.add([changed, record(point, 2)]) == 1
    assert ledger.records(point.key) == [record(point, i) for i in range(3)]
    assert ledger.done(point.key) == {0, 1, 2}
    assert ledger.done(POINTS[1].key) == set()


def test_a_failure_is_not_done_and_is_forgotten_on_success(ledger: Ledger) -> None:
    point = POINTS[0]
    assert ledger.add([record(point, 0, "ValueError: x"), record(point, 1)]) == 1
    assert ledger.done(point.key) == {1}
    assert [r["error"] for r in ledger.records(point.key)] == ["ValueError: x", None]
    assert [r["sample"] for r in ledger.failures(point.key)] == [0]
    ledger.add([record(point, 0, "again")])
    assert [r["error"] for r in ledger.failures(point.key)] == ["again"]
    ledger.add([record(point, 0)])
    assert ledger.failures(point.key) == []
    ledger.add([record(point, 0, "late news of an earlier try")])
    assert [r["error"] for r in ledger.records(point.key)] == [None, None]


def test_complete_needs_every_sample_of_every_point(ledger: Ledger) -> None:
    counts = {p.key: 2 for p in POINTS}
    ledger.add([record(p, i) for p in POINTS for i in range(2)][:-1])
    assert not ledger.complete(POINTS, counts)
    ledger.add([record(POINTS[-1], 1)])
    assert ledger.complete(POINTS, counts)


def test_keys_can_be_followed_back_and_pace_is_measured(ledger: Ledger) -> None:
    ledger.add_points(POINTS)
    ledger.add_points(POINTS)
    assert ledger.identity(POINTS[1].key) == POINTS[1].identity
    assert ledger.identity("0" * 16) is None
    assert ledger.pace("small", "qasper") is None
    ledger.add([record(POINTS[0], 0)])
    assert ledger.pace("small", "qasper") == (1.5, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, "exactly one of score and error"),
        ({"error": "x"}, "exactly one of score and error"),
        ({"scores": 1.0}, r"unknown fields \['scores'\]"),
    ],
)
def test_malformed_records_are_refused(
    ledger: Ledger, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ledger.add([record(POINTS[0], 0) | change])
    assert ledger.done(POINTS[0].key) == set()


WRITER = """
import sys; sys.path[:0] = {path!r}
import grids, tiny_unit
from quest_dist.ledger import Ledger
ledger = Ledger({file!r})
for sample in range(10**6):
    ledger.add([tiny_unit.record(point, sample) for point in grids.points()])
    print(sample, flush=True)
"""


def test_what_add_returned_from_survives_a_kill(tmp_path: Path) -> None:
    """A batch is there whole or not at all, and each one that was acknowledged is there."""
    file = tmp_path / "ledger.db"
    here = Path(__file__).parent
    code = WRITER.format(path=[str(here), str(here.parent)], file=str(file))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split()]
    process.wait()
    with Ledger(file) as ledger:
        held = {point.key: ledger.done(point.key) for point in POINTS}
    assert all(set(acknowledged) <= samples for samples in held.values())
    assert len({frozenset(samples) for samples in held.values()}) == 1


HOLDER = """
import sys; from quest_dist.ledger import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        where = rf"another sweep .*process {holder.pid} on {re.escape(socket.gethostname())}\)"
        with pytest.raises(ValueError, match=where), lock(tmp_path):
            pass
        holder.kill()
    with lock(tmp_path), pytest.raises(ValueError, match=str(os.getpid())), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass
