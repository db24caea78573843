"""The report: one file with everything in it, the same for the same rows, readable in a browser."""

from __future__ import annotations

import csv
import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import launches
import pytest
import tiny_sweep

from quest_dist import closing, compose, stats
from quest_dist.prepare import prepare
from quest_dist.report import definitions, files, launched, rerun, verdicts
from quest_dist.report.launched import Launched, Part
from quest_dist.spec import Spec

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: Measures the page in frames of two widths, and writes what it found into the document.
HARNESS = """<!doctype html><meta charset="utf-8">
<iframe src="report.html" style="width:1280px;height:900px;border:0"></iframe>
<iframe src="report.html" style="width:400px;height:900px;border:0"></iframe>
<script>
window.onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, view = frame.contentWindow;
    return {
      width: view.innerWidth, wide: page.documentElement.scrollWidth,
      images: [...page.images].map((image) => [image.naturalWidth, image.alt]),
      loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
      ground: view.getComputedStyle(page.body).backgroundColor,
    };
  });
  document.body.innerHTML = "";
  document.body.dataset.found = JSON.stringify(found);
};
</script>"""


class Sources(HTMLParser):
    """What a page would load or link to, its tags, and its visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "href" and tag == "a":
                self.linked.append(value or "")
            elif name in ("src", "srcset", "href", "data", "poster", "action"):
                self.loaded.append(value or "")
            elif name == "id":
                self.ids.add(value or "")

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a launch of two parts, with a failure, a gap and a figure without points."""
    folder = tmp_path_factory.mktemp("launch")
    found = launches.launch(launches.longbench(folder), launches.passkey(folder))
    files.write(found, folder / "out")
    return folder / "out"


def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_folder_reads_back_as_the_launch_and_gives_the_same_bytes(
    made: Path, tmp_path: Path
) -> None:
    again = launched.read(lambda name: (made / name).read_text(encoding="utf-8"))
    paths = files.write(again, tmp_path)
    assert len(paths) == 4 + 2 * 3 + 2
    assert {p.relative_to(tmp_path): p.read_bytes() for p in paths} == {
        p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()
    }


def test_the_page_loads_nothing_and_links_only_into_itself(made: Path) -> None:
    found = Sources(page(made))
    assert [source[:22] for source in found.loaded] == ["data:image/png;base64,"] * 2
    assert found.linked
    assert {link.removeprefix("#") for link in found.linked} <= found.ids
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert not re.findall(r"url\(|@import|https?:", page(made))
    assert "default-src &#39;none&#39;" in page(made) or "default-src 'none'" in page(made)


def test_the_page_says_what_ran_what_came_of_it_and_how_to_rerun(made: Path) -> None:
    words = " ".join(Sources(page(made)).words.split())
    for said in (
        "generated data",
        "incomplete",
        launches.COMMAND,
        "Some CPU, 2 cores",
        "0123456789ab",
        "2026-09-21",
        "Against the paper: not comparable",
        "fig07.pdf",
        "Quest at 256 on Passkey (0 of 6 samples)",
        "A page bound.",
        "Wilson for the share of pairs",
        "avx2",
        "'grid.task=[passkey]' 'grid.method=[full,h2o]' 'grid.budget=[512]'",
    ):
        assert said in words, said


def test_what_comes_from_outside_is_text(made: Path, tmp_path: Path) -> None:
    assert "ValueError: &lt;b&gt; &amp; &#39;c&#39;" in page(made)
    part = launches.longbench(tmp_path)
    bad = [replace(row, label="<script>x</script>", task_label="<i>") for row in part.rows]
    found = launches.launch(replace(part, rows=tuple(bad)), about="</title><script>y</script>")
    files.write(found, tmp_path)
    assert not {"script", "i"} & Sources(page(tmp_path)).tags


def test_every_figure_has_a_verdict_and_a_missing_one_says_what_runs_it(made: Path) -> None:
    with (made / verdicts.FILE).open(encoding="utf-8") as file:
        lines = {line["figure"]: line for line in csv.DictReader(file)}
    assert [(name, line["verdict"], line["n"], line["file"]) for name, line in lines.items()] == [
        ("fig07", "not comparable", "6", "fig07.png"),
        ("table1", "not comparable", "6", "table1.png"),
        ("fig06", "not run", "0", ""),
    ]
    passkey = "python -m quest_dist.sweep +sweep=passkey"
    assert lines["table1"]["reason"].endswith(
        f"; of 5 points 1 failed, 1 not run; to go on: {passkey}"
    )
    assert lines["fig06"]["reason"] == (
        "passkey has no point of it; to run it: python -m quest_dist.sweep +sweep=pg19"
    )


def test_a_launch_without_results_is_reported_too(tmp_path: Path) -> None:
    part = launches.longbench(tmp_path)
    none = dict.fromkeys(("score", "finished_at", "attended"), float("nan"))
    rows = tuple(replace(row, n=0, status="missing", **none) for row in part.rows)
    files.write(launches.launch(replace(part, rows=rows)), tmp_path)
    (line,) = verdicts.lines(launches.launch(replace(part, rows=rows)))
    assert (line.verdict, line.n) == ("not run", "0")
    assert line.reason == f"of 10 points 10 not run; to go on: {launches.COMMAND}"
    assert "Newest record</dt><dd>none" in page(tmp_path)


def test_a_sweep_without_figures_has_no_report(tmp_path: Path) -> None:
    part = replace(launches.longbench(tmp_path), figures=())
    paths = files.write(launches.launch(part), tmp_path / "out")
    assert [path.name for path in paths] == ["points.csv", "launch.json"]


def test_a_points_command_runs_that_point_and_full(tmp_path: Path) -> None:
    points = tiny_sweep.points(tmp_path / "out", "grid.page_size=[16,32]")
    model = f"+model.tiny={{source:local,path:{tmp_path}/tiny_model,label:Tiny}}"
    given = [*tiny_sweep.GRID, model, "grid.page_size=[16,32]", f"output_dir={tmp_path}/out"]
    command = shlex.join(["python", "-m", "quest_dist.sweep", *given])
    blank = launches.rows(tmp_path, "passkey")[0]
    rows = tuple(
        replace(
            blank,
            point=p.key,
            model="tiny",
            method=p.method.name,
            budget=p.budget,
            page_size=p.page_size,
            seed=p.seed,
        )
        for p in points
    )
    for row in rows:
        arguments = shlex.split(rerun.command(row, Part("tiny", (), rows, command)))[3:]
        again = prepare(compose.composed(arguments))
        chosen = {p.key for p in again.points}
        assert row.point in chosen
        assert {p.method.name for p in again.points} == {"full", row.method}
        assert {p.page_size for p in again.points} == {row.page_size}
        assert {p.budget for p in again.points} - {None} <= {row.budget, 64, 128}
        assert len(chosen) == (1 if row.method == "full" else 2)
        assert again.output_dir.name == "again"


def test_definitions_are_the_docstrings_of_what_ran() -> None:
    config = compose.composed(["+sweep=smoke"])
    found = definitions.methods(Spec(name, said) for name, said in config["method"].items())
    assert set(found) == set(config["method"])
    assert all(said["text"] for said in found.values())
    assert "Each closed page keeps" in found["quest"]["text"]
    assert "radius_scale 0.5" in found["tightbound"]["settings"]
    text = "One `a`\nline.\n\n    x = 1\n      y\n\nEnd:\n    z"
    assert definitions.blocks(text) == [
        ("One `a` line.", False),
        ("x = 1\n  y", True),
        ("End:", False),
        ("z", True),
    ]


def test_reading_tells_what_is_wrong(made: Path) -> None:
    facts = json.loads((made / "launch.json").read_text())

    def read(**changes: object) -> Launched:
        return launched.read(lambda name: json.dumps({**facts, **changes}))

    with pytest.raises(ValueError, match=r"launch.json: version 7; this quest_dist reads 1"):
        read(version=7)
    with pytest.raises(ValueError, match=r"launch.json: not as quest_dist writes it"):
        read(parts=[{}])
    with pytest.raises(ValueError, match=r"points/longbench.csv: table: no column"):
        read()


def test_the_table_of_budgets_says_what_the_lines_say(made: Path) -> None:
    rows = launched.read(lambda name: (made / name).read_text(encoding="utf-8")).rows
    lossless = [replace(row, delta_low=-1.0, delta=0.0, delta_high=1.0) for row in rows]
    assert {(a.budget, a.known) for a in stats.advice(lossless)} == {(256, True)}
    loses = [replace(row, delta_low=-9.0, delta=-8.0, delta_high=-7.0) for row in rows if row.n]
    assert {(a.budget, a.known) for a in stats.advice(loses)} == {(None, True)}
    assert all("loses more than 2" in a.text for a in stats.advice(loses))
    wide = [replace(row, delta_low=-9.0, delta=0.0, delta_high=9.0) for row in rows if row.n]
    assert {(a.budget, a.known) for a in stats.advice(wide)} == {(None, False)}


def test_the_closing_table_has_a_line_a_figure(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [verdicts.Line("fig07", "differs", "[ours] 3", "10", "fig07.png")]
    closing.verdicts(lines, closing.console())
    assert "[ours] 3" in capsys.readouterr().out
    assert verdicts.of_the_paper(lines)
    assert not verdicts.of_the_paper([replace(lines[0], figure="curves")])


def browser() -> str:
    """A Chromium, or the reason why there is none."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no {' or '.join(BROWSERS[:3])} on this machine")
    return found


def headless(*arguments: str, folder: Path) -> str:
    """What a browser without a network prints."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--allow-file-access-from-files",
        "--proxy-server=127.0.0.1:9",  # nothing listens there: whatever is asked for fails
        f"--user-data-dir={folder}/profile",
    ]
    run = subprocess.run(
        [browser(), *options, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="paths of files are written otherwise")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_whole_at_both_widths(made: Path, tmp_path: Path, scheme: str) -> None:
    opened = page(made).replace("<details", "<details open")
    (tmp_path / "report.html").write_text(opened, encoding="utf-8")
    (tmp_path / "harness.html").write_text(HARNESS)
    options = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    address = (tmp_path / "harness.html").as_uri()
    dumped = headless("--dump-dom", *options, address, folder=tmp_path)
    text = re.search(r'data-found="([^"]*)"', dumped)
    assert text, dumped[-2000:]
    frames = json.loads(html.unescape(text[1]))
    assert [frame["width"] for frame in frames] == [1280, 400]
    for found in frames:
        assert found["wide"] <= found["width"]
        assert [width for width, _ in found["images"]] == [1800, 1800]
        assert all(alt for _, alt in found["images"])
        assert not [name for name in found["loaded"] if not name.startswith("data:")]
        assert found["ground"] == ("rgb(23, 25, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
