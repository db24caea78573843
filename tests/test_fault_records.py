"""A disk that is full, a process that dies while it writes, a file that is cut: what was finished
stays, and one line says what to do."""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grids
import pytest
import tiny_sweep
from processes import Launch
from tiny_unit import begun, record

from quest_dist.ledger import Ledger

POINTS = grids.points()
MANY = ("task.passkey.samples=150", "cluster.samples_per_unit=150")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("needs the right to mount a small disk (root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


def held(out: Path, *overrides: str) -> set[int]:
    """The samples that a tiny sweep has of every point."""
    points = tiny_sweep.points(out, *overrides)
    with Ledger(out / "ledger.db") as ledger:
        return set.intersection(*(ledger.done(point.key) for point in points))


@pytest.mark.parametrize("place", ["inline", pytest.param("local", marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_sweep_in_one_line_and_it_goes_on_when_there_is_room(
    disk: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, said = disk / "outputs", tmp_path / "said"
    launch = Launch(out, said, f"cluster={place}", "cluster.max_failures=2", *MANY)
    assert launch.status() == 1
    text = said.read_text()
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "what is finished is kept: make room, and the same command goes on" in last
    make_room(disk)
    kept = held(out, *MANY)
    assert 0 < len(kept) < 150
    monkeypatch.setenv("TINY_LOG", str(tmp_path / "log"))
    assert tiny_sweep.run(out, *MANY) == 0
    assert {started.sample for started in begun(tmp_path / "log")} == set(range(150)) - kept
    whole = tmp_path / "whole"
    assert tiny_sweep.run(whole, *MANY) == 0
    assert tiny_sweep.table(out) == tiny_sweep.table(whole)


def test_a_batch_that_does_not_fit_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.add(record(point, 0) for point in POINTS)
        (pages,) = ledger._db.execute("pragma page_count").fetchone()
        ledger._db.execute(f"pragma max_page_count = {pages + 1}")
        with pytest.raises(OSError, match="database or disk is full") as full:
            ledger.add(record(point, i) for point in POINTS for i in range(1, 100))
        assert full.value.errno == errno.ENOSPC
        assert full.value.filename == str(tmp_path / "ledger.db")
        assert all(ledger.done(point.key) == {0} for point in POINTS)
        ledger._db.execute("pragma max_page_count = 100000")
        assert ledger.add(record(point, i) for point in POINTS for i in range(1, 100)) == 297


WRITER = """
import sys; sys.path[:0] = {path!r}
import grids, tiny_unit
from quest_dist.ledger import Ledger
ledger = Ledger({file!r})
first = {first}
while True:
    records = [tiny_unit.record(p, i) for p in grids.points() for i in range(first, first + 40)]
    print("adding", flush=True)
    ledger.add([record | {{"prediction": "x" * 30_000}} for record in records])
    print(first, flush=True)
    first += 40
"""


@pytest.mark.slow
def test_kills_in_the_middle_of_a_batch_leave_whole_batches(tmp_path: Path) -> None:
    """Batches are larger than SQLite's cache, so that half of one is in the file when it is cut."""
    file, draw, torn = tmp_path / "ledger.db", random.Random(0), 0
    here = Path(__file__).parent
    acknowledged: set[int] = set()
    for _ in range(10):
        path = [str(here), str(here.parent)]
        code = WRITER.format(path=path, file=str(file), first=max(acknowledged, default=-40) + 40)
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "adding\n"
        time.sleep(draw.uniform(0.02, 0.15))
        process.kill()
        words = process.stdout.read().split()
        process.wait()
        acknowledged |= {int(word) for word in words if word != "adding"}
        journal = tmp_path / "ledger.db-journal"
        torn += journal.exists() and journal.stat().st_size > 0
        with Ledger(file) as ledger:
            (sound,) = ledger._db.execute("pragma integrity_check").fetchone()
            done = [ledger.done(point.key) for point in POINTS]
        assert sound == "ok"
        assert all(samples == done[0] for samples in done)
        batches = {sample - sample % 40 for sample in done[0]}
        assert done[0] == {first + i for first in batches for i in range(40)}
        assert acknowledged <= batches
    assert torn > 0, "no kill met a batch that was being written"


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.999])
def test_a_ledger_that_was_cut_is_refused_in_one_line_and_left_as_it_is(
    tmp_path: Path, share: float
) -> None:
    out = tmp_path / "outputs"
    assert tiny_sweep.run(out, "task.passkey.samples=40") == 0
    path = out / "ledger.db"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    cut = path.read_bytes()
    with pytest.raises(ValueError, match=r"ledger\.db is damaged \(.*\): put a copy") as refused:
        tiny_sweep.run(out, "task.passkey.samples=40")
    assert "\n" not in str(refused.value)
    assert path.read_bytes() == cut
    path.write_bytes(whole)
    assert tiny_sweep.run(out, "task.passkey.samples=40") == 0


def test_a_page_that_was_overwritten_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.add(record(point, i) for point in POINTS for i in range(60))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)
    with Ledger(path) as ledger, pytest.raises(ValueError, match="is damaged"):
        _ = [ledger.records(point.key) for point in POINTS]


def test_a_copy_put_back_is_a_ledger(tmp_path: Path) -> None:
    """A copy made while nothing was written is whole: what came after it is computed again."""
    out = tmp_path / "outputs"
    assert tiny_sweep.run(out, "limit=2") == 0
    shutil.copy(out / "ledger.db", tmp_path / "copy.db")
    assert tiny_sweep.run(out) == 0
    (out / "ledger.db").write_bytes(b"nonsense" * 1000)
    with contextlib.suppress(ValueError):
        tiny_sweep.run(out)
    shutil.copy(tmp_path / "copy.db", out / "ledger.db")
    assert held(out) == {0, 1}
    assert tiny_sweep.run(out) == 0
