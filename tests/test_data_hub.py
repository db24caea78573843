"""Hub: zip, JSONL and parquet read through huggingface_hub, against a server on this machine."""

from __future__ import annotations

import io
import json
import zipfile

import pytest
from hub_server import hub_server

from quest_dist.tasks.hub import Hub

huggingface_hub = pytest.importorskip("huggingface_hub")

RECORDS = [
    {"context": f"context {i}", "input": f"input {i}", "answers": [f"answer {i}"], "_id": str(i)}
    for i in range(3)
]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
BOOKS = [{"short_book_title": "One", "text": "first book"}, {"text": "second book"}]


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"data/{name}.jsonl", data)
    return file.getvalue()


def parquet(rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as writer

    file = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture
def served(monkeypatch, tmp_path):
    """Serve repositories to a client with an empty cache; returns a function of the files."""
    stack = []

    def serve(**repos):
        named = {key.replace("__", "/"): files for key, files in repos.items()}
        context = hub_server(named)
        endpoint, seen = context.__enter__()
        stack.append(context)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        return seen

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield serve
    for context in stack:
        context.__exit__(None, None, None)


def test_longbenchs_zip(served):
    seen = served(o__n={"data.zip": zipped(qasper=LINES, hotpotqa=LINES[: LINES.index(b"\n")])})
    data = Hub("o/n")
    assert data.count("qasper") == 3
    assert data.record("qasper", 1, 0, len) == RECORDS[1]
    assert data.count("hotpotqa") == 1
    assert data.form("qasper") is None
    assert sum("GET" in line and "data.zip" in line for line in seen) == 1


@pytest.mark.parametrize("file", ["{task}.jsonl", "{task}/*.jsonl", "{task}/test.parquet"])
def test_other_layouts(served, file):
    content = parquet(RECORDS) if file.endswith("parquet") else LINES
    served(o__n={file.replace("{task}", "qasper").replace("*", "test"): content, "README.md": b"x"})
    assert [Hub("o/n", file=file).record("qasper", i, 0, len) for i in range(3)] == RECORDS


def test_books(served):
    served(
        o__b={"data/test-00000-of-00002.parquet": parquet(BOOKS[:1]),
              "data/test-00001-of-00002.parquet": parquet(BOOKS[1:])}
    )  # fmt: skip
    data = Hub(books_repo="o/b")
    assert [text for _, text in data.books()] == ["first book", "second book"]
    assert data.books()[0][0] == "One"
    assert data.identity("pg19")["repo"] == "o/b"


def test_identity_follows_the_content_under_a_moving_branch(served):
    served(o__n={"data.zip": zipped(qasper=LINES)})
    before = Hub("o/n").identity("qasper")
    assert Hub("o/n").identity("qasper") == before
    served(o__n={"data.zip": zipped(qasper=LINES + LINES)})
    after = Hub("o/n").identity("qasper")
    assert after["digest"] != before["digest"]
    assert after["repo"] == before["repo"] == "o/n"


def test_offline_answers_from_the_cache(served, monkeypatch):
    seen = served(o__n={"data.zip": zipped(qasper=LINES)})
    Hub("o/n").count("qasper")
    seen.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Hub("o/n").count("qasper") == 3
    assert seen == []
    with pytest.raises(ValueError, match="dataset o/other at main: cannot be read"):
        Hub("o/other").count("qasper")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"other.zip": b""}, r"dataset o/n at main has no file 'data.zip'"),
        ({"data.zip": b"nonsense"}, "not a zip archive"),
        ({"data.zip": zipped(qaspr=LINES)}, r"no 'data/qasper.jsonl'; did you mean 'data/qaspr"),
        ({"data.zip": zipped(qasper=b"{}\n")}, r"data/qasper.jsonl, line 1: field 'context'"),
        ({"data.zip": zipped(qasper=b"{")}, r"data/qasper.jsonl, line 1: not JSON"),
    ],
)
def test_mistakes_in_a_repository(served, files, match):
    served(o__n=files)
    with pytest.raises(ValueError, match=match) as caught:
        Hub("o/n").count("qasper")
    assert "\n" not in str(caught.value)


def test_a_repository_that_is_not_there(served):
    served(o__n={})
    with pytest.raises(ValueError, match="dataset o/absent at main: cannot be read"):
        Hub("o/absent").count("qasper")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"repo": "longbench"}, "data.repo='longbench' is not owner/name"),
        ({"books_repo": "a/b/c"}, "data.books_repo"),
        ({"file": "data.tar"}, "data.file='data.tar' is not a .zip, .jsonl or .parquet"),
    ],
)
def test_mistakes_in_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        Hub(**settings)


def test_names_are_checked_before_anything_is_asked(served):
    seen = served(o__n={})
    with pytest.raises(ValueError, match="not a plain file name"):
        Hub("o/n").count("../qasper")
    assert seen == []
