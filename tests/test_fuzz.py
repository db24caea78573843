"""Whatever stands in a file or on a command line is read, or refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_unit import record

from quest_dist import compose
from quest_dist.folders import PACKAGE
from quest_dist.ledger import FIELDS, Ledger, check_record
from quest_dist.prepare import prepare
from quest_dist.tasks.files import Files
from quest_dist.tasks.sources import checked, parse_lines

QUICK = settings(
    max_examples=150,
    deadline=2000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
FIELD = st.sampled_from(["context", "input", "answers", "_id"])
RECORDS = st.dictionaries(FIELD, JSON | st.lists(st.text(max_size=5), max_size=2))
LINES = st.lists(st.one_of(RECORDS.map(json.dumps), st.text(max_size=20)), max_size=4).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)


def one_line(error: ValueError, naming: str = "") -> None:
    """Hold an explanation to its form."""
    said = str(error)
    assert said
    assert "\n" not in said
    assert naming in said


@QUICK
@given(LINES | st.binary(max_size=60))
@example(b"[" * 200_000)
@example(b'{"context": "\\ud800", "input": "", "answers": ["a"]}')
@example(b"9" * 5000)
@example(b"\xff\xfe{}")
@example(b'{"context": "c", "input": "", "answers": ["a"]}\n{"context": "c", "inp')
def test_any_bytes_as_records(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(data)
    source = Files(str(tmp_path))
    try:
        count = source.count("qasper")
    except ValueError as error:
        one_line(error, naming="qasper.jsonl")
        return
    for index in range(count):
        found = source.record("qasper", index, 0, len)
        assert found["context"].encode()
        assert all(isinstance(answer, str) for answer in found["answers"])


@QUICK
@given(st.lists(RECORDS, min_size=1, max_size=3))
def test_what_json_writes_is_read_back(records: list[dict[str, Any]]) -> None:
    data = "\n".join(map(json.dumps, records)).encode()
    for (place, value), written in zip(parse_lines(data, "f"), records, strict=True):
        assert json.dumps(value) == json.dumps(written)
        try:
            assert checked(value, place) is value
        except ValueError as error:
            one_line(error)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real configuration with one model and few methods and tasks, which is composed in a
    fifth of a second."""
    folder = tmp_path_factory.mktemp("conf") / "conf"
    shutil.copytree(PACKAGE.parent / "conf", folder)
    kept = {"smollm2", "full", "quest", "passkey", "qasper"}
    for group in ("model", "method", "task"):
        for path in (folder / group).glob("*.yaml"):
            if path.stem not in kept:
                path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUEST_CONF_DIR", str(folder))
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield folder


_KEYS = (
    "name about limit output_dir plan figures parts grid grid.model grid.task grid.method exclude"
    " grid.budget grid.page_size grid.dense_layers grid.seed search search.delta data data.tokens"
    " search.first_samples search.confidence model model.smollm2 model.smollm2.dtype method"
    " model.smollm2.shape model.smollm2.eos model.smollm2.chat method.quest method.quest.gqa"
    " method.quest.radius_scale method.quest._target_ task task.passkey task.passkey.samples"
    " task.passkey.length task.qasper.dataset data._target_ protocol protocol.dense_layers profile"
    " cluster cluster.backend cluster.workers cluster.device cluster.gpus_per_worker cluster.env"
    " cluster.samples_per_unit cluster.max_failures tracking tracking.uri tracking.enabled sweep"
    " hydra hydra.searchpath a.b "
)
KEYS = _KEYS.split(" ")
_VALUES = (
    "null true false 0 1 -1 2.5 1e400 nan abc smoke quest [] {} [1] [a] [[]] {a:1} {a:{}} [null]"
    " ${about} ${nowhere} ${oc.env:X} ${oc.env:X,1} ${oc.env:X,Y} ${oc.decode:'['} ${ ${: '' ' \""
    " ??? {_target_:os.system} {_target_:quest_dist.methods.quest.Quest} [full,quest] [passkey]"
    " [smollm2] [64] [-64] [1e9] {samples:1} {label:{a:1}} glob(*) range(1,3) choice(1,2) \\ ../x"
    " /x a,b a=b x:y [{method:quest}] [{method:[quest],budget:x}] [{a:b}] 999999999999999999999999"
)
VALUES = _VALUES.split(" ")
OVERRIDES = st.lists(
    st.builds(
        "{}{}={}".format,
        st.sampled_from(["", "", "", "+", "++", "~"]),
        st.sampled_from(KEYS),
        st.sampled_from(VALUES) | st.text(max_size=5),
    )
    | st.text(max_size=8),
    min_size=1,
    max_size=2,
)
GRID = (
    "grid.model=[smollm2]",
    "grid.task=[passkey]",
    "grid.method=[full,quest]",
    "grid.budget=[64]",
)


@settings(parent=QUICK, max_examples=25, deadline=None)
@given(OVERRIDES)
def test_any_overrides_compose_or_are_explained(few: Path, overrides: list[str]) -> None:
    try:
        config = compose.composed([*GRID, *overrides])
    except ValueError as error:
        one_line(error)
        return
    json.dumps(config)
    try:
        prepare(config)
    except ValueError as error:
        one_line(error)


VALID = st.fixed_dictionaries(
    {
        "point": st.text(max_size=6),
        "sample": st.integers(0, 5),
        "score": st.none() | st.floats(),
        "error": st.none() | st.text(max_size=6),
        "finished_at": st.floats(0, 2e9),
        "prediction": st.text(max_size=6),
        "metrics": st.dictionaries(st.text(max_size=4), st.floats(), max_size=2),
        "details": st.dictionaries(st.text(max_size=4), JSON, max_size=2),
    }
)


@QUICK
@given(st.lists(VALID, max_size=4))
def test_records_come_back_as_they_went_in(tmp_path: Path, changed: list[dict[str, Any]]) -> None:
    blank = dict.fromkeys(FIELDS, 0)
    records = [{**blank, **one} for one in changed]
    (tmp_path / "ledger.db").unlink(missing_ok=True)
    with Ledger(tmp_path / "ledger.db") as ledger:
        kept: dict[tuple[str, int], dict[str, Any]] = {}
        failed: dict[tuple[str, int], dict[str, Any]] = {}
        for given_record in records:
            name = (given_record["point"], given_record["sample"])
            try:
                ledger.add([given_record])
            except ValueError as error:
                one_line(error)
                continue
            if given_record["error"] is None:
                kept.setdefault(name, given_record)
                failed.pop(name, None)
            elif name not in kept:
                failed[name] = given_record
        for point in {point for point, _ in (*kept, *failed)}:
            found = {(r["point"], r["sample"]): r for r in ledger.records(point)}
            expected = {n: r for n, r in (kept | failed).items() if n[0] == point}
            assert json.dumps(found[min(found)]) == json.dumps(expected[min(expected)])
            assert found.keys() == expected.keys()
            assert ledger.done(point) == {sample for name, sample in kept if name == point}
        ledger.pace("m", "t")


@QUICK
@given(st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON))
def test_any_mapping_is_a_record_or_refused(changed: dict[str, Any]) -> None:
    given_record = {**dict.fromkeys(FIELDS, 0), "error": None, **changed}
    try:
        check_record(given_record)
    except ValueError as error:
        one_line(error)
    else:
        assert isinstance(given_record["point"], str)
        assert math.isfinite(given_record["finished_at"])


@settings(parent=QUICK, max_examples=40)
@given(st.binary(min_size=1, max_size=200))
def test_a_file_that_is_no_ledger_is_said_and_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ledger\.db is (no ledger|damaged)") as caught:
        Ledger(path)
    one_line(caught.value)
    assert path.read_bytes() == data


def test_a_score_that_is_no_number_does_not_stop_the_next_launch(tmp_path: Path) -> None:
    from grids import points

    (point, *_) = points()
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.add_points([point])
        ledger.add([{**record(point, 0), "metrics": {"entropy": math.nan}}, record(point, 1)])
        assert ledger.pace(point.model.name, point.task.name) == (1.5, 0.5)
