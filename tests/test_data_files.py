"""Files: LongBench's folder layout, with every mistake named by file and line."""

from __future__ import annotations

import json
import os

import pytest
from tiny_language import tiny_language

from quest_dist.tasks.files import Files
from quest_dist.tasks.longbench import LongBench
from quest_dist.tasks.prompts import FORMS

GOOD = {"context": "c", "input": "i", "answers": ["a"]}


def folder(tmp_path, *lines, task="qasper"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return Files(str(tmp_path))


def test_records_in_order_blank_lines_skipped(tmp_path):
    data = folder(tmp_path, {**GOOD, "input": "1"}, "", {**GOOD, "input": "2\u2028x"}, "")
    assert data.count("qasper") == 2
    assert data.record("qasper", 1, 0, len)["input"] == "2\u2028x"
    assert data.form("qasper") is None


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"qasper\.jsonl, line 2: not JSON"),
        ("[1]", r"qasper\.jsonl, line 2: not a JSON object but list"),
        ({**GOOD, "context": None}, "line 2: field 'context' is missing or not text"),
        ({**GOOD, "context": ""}, "line 2: field 'context' is empty"),
        ({"context": "c", "answers": ["a"]}, "line 2: field 'input'"),
        ({**GOOD, "answers": "a"}, "line 2: field 'answers'"),
        ({**GOOD, "answers": []}, "line 2: field 'answers'"),
        ({**GOOD, "answers": [1]}, "line 2: field 'answers'"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, match):
    with pytest.raises(ValueError, match=match) as caught:
        folder(tmp_path, GOOD, line).count("qasper")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "qasper.jsonl").write_bytes(b'{"context": "\xff"}')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        Files(str(tmp_path)).count("qasper")


def test_missing_places(tmp_path):
    with pytest.raises(ValueError, match=r"data.root='/nowhere' is not a folder"):
        Files("/nowhere")
    with pytest.raises(ValueError, match=r"data\.root is empty"):
        Files("")
    with pytest.raises(ValueError, match=r"no file .*hotpotqa\.jsonl; tasks present: qasper"):
        folder(tmp_path, GOOD).identity("hotpotqa")
    with pytest.raises(ValueError, match="no records"):
        folder(tmp_path, "").count("qasper")
    with pytest.raises(ValueError, match=r"no \.txt books"):
        Files(str(tmp_path)).books()


@pytest.mark.parametrize("name", ["../qasper", "/etc/passwd", "a/b", "", ".hidden", "a\\b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="not a plain file name"):
        Files(str(tmp_path)).count(name)


def test_identity_is_content_not_place(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = folder(tmp_path / "one", GOOD), folder(tmp_path / "two", GOOD)
    assert one.identity("qasper") == two.identity("qasper")
    assert str(tmp_path) not in str(one.identity("qasper"))
    changed = folder(tmp_path / "two", {**GOOD, "input": "j"})
    assert changed.identity("qasper") != one.identity("qasper")


def test_books_by_name_from_pg19_or_root_or_where_told(tmp_path):
    for place in (tmp_path, tmp_path / "pg19", tmp_path / "other"):
        place.mkdir(exist_ok=True)
        (place / "b.txt").write_text(place.name, encoding="utf-8")
        (place / "a.txt").write_text("a", encoding="utf-8")
    assert Files(str(tmp_path)).books() == [("a", "a"), ("b", "pg19")]
    assert Files(str(tmp_path / "other")).books()[1] == ("b", "other")
    told = Files(str(tmp_path), books=str(tmp_path / "other"))
    assert told.books()[1] == ("b", "other")
    assert told.identity("pg19") != Files(str(tmp_path)).identity("pg19")
    (tmp_path / "other" / "c.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"c\.txt is not UTF-8"):
        Files(str(tmp_path / "other")).books()


REAL = os.environ.get("QUEST_TEST_LONGBENCH", "")


@pytest.mark.skipif(not REAL, reason="set QUEST_TEST_LONGBENCH to a folder of LongBench's files")
@pytest.mark.parametrize("name", FORMS)
def test_real_records_make_samples(name):
    metric = "rouge_l" if name == "gov_report" else "f1"
    task = LongBench(data=Files(REAL), dataset=name, metric=metric, samples=2)
    language = tiny_language(max_length=4096)
    for index in range(task.count()):
        sample = task.sample(index, language)
        assert len(sample.context) + len(sample.tail) + sample.max_new_tokens <= 4096
        assert sample.answers
