"""No name out of a configuration or an archive leads out of the folder that it belongs to."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from quest_dist import compose
from quest_dist.prepare import check_name, prepare
from quest_dist.tasks import hub
from quest_dist.tasks.hub import Hub

RECORD = json.dumps({"context": "c", "input": "i", "answers": ["a"]}).encode()
OUT = ["../x.jsonl", "a/../../x.jsonl", "/etc/x.jsonl", "~/x.jsonl"]


@pytest.mark.parametrize("path", OUT)
@pytest.mark.parametrize("key", ["file", "books_file"])
def test_a_file_of_a_repository_is_inside_it(key: str, path: str) -> None:
    with pytest.raises(ValueError, match=rf"data\.{key}=.* is no path inside the repository"):
        Hub(**{key: path})


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "/x", ".hidden", "a\\b", "a\nb", ""])
def test_a_sweep_is_named_inside_the_output_folder(name: str) -> None:
    with pytest.raises(ValueError, match="name="):
        check_name(name)


@pytest.mark.parametrize("dataset", ["../qasper", "/etc/passwd"])
def test_a_data_set_is_named_inside_its_source(dataset: str, tmp_path: Path) -> None:
    grid = ("grid.model=[smollm2]", "grid.task=[qasper]", "grid.method=[full]")
    data = ("data=files", f"data.root={tmp_path}", f"task.qasper.dataset={dataset}")
    with pytest.raises(ValueError, match="no such choice"):
        prepare(compose.composed([*grid, *data]))


def test_nothing_of_an_archive_is_unpacked(tmp_path: Path) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = inside / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data/qasper.jsonl", "../../out.jsonl", str(tmp_path / "absolute.jsonl")):
            archive.writestr(name, RECORD)
    for name in ("data/qasper.jsonl", "../../out.jsonl"):
        ((_, record),) = hub._rows(path, name)
        assert record == json.loads(RECORD)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_a_member_that_unpacks_to_too_much_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/qasper.jsonl", b" " * 100_000)
    monkeypatch.setattr(hub, "LARGEST", 50_000)
    with pytest.raises(ValueError, match="unpacks to more than 50000 bytes"):
        hub._rows(tmp_path / "data.zip", "data/qasper.jsonl")
