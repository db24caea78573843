"""The command: every sweep composes to the points it promises, every mistake is one clear line."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic_sweep as synthetic
import tiny_sweep
from rich.console import Console

from quest_dist import closing, compose, figures, launch, sweep, welcome, work
from quest_dist.folders import find
from quest_dist.parts import combined
from quest_dist.plan import Point
from quest_dist.prepare import prepare

SWEEPS = compose.sweep_files()
TIMES = {"kernels": 36, "breakdown": 12, "textgen": 24}
POINTS = {
    "attention_map": 1,
    "longbench_budgets": 156,
    "matched": 87,
    "methods": 144,
    "passkey": 72,
    "perplexity_budgets": 21,
    "pg19": 6,
    "recall": 36,
    "ruler": 84,
    "smoke": 10,
    "sparsity": 15,
    "speculation": 12,
    **TIMES,
}


def grid_points(name: str, *overrides: str) -> tuple[Point, ...]:
    """The points of a sweep, for a model that is here on every machine."""
    return prepare(compose.composed([f"+sweep={name}", *overrides])).points


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = sweep.main(list(arguments))
    text = capsys.readouterr()
    return status, text.out, text.err


def test_every_sweep_has_a_number_of_points_here() -> None:
    assert set(SWEEPS) == {*POINTS, "paper"}


def test_the_paper_is_every_figure_with_shared_points_once() -> None:
    whole = compose.composed(["+sweep=paper"])
    found = combined(whole, compose.parts(whole, ["+sweep=paper"]))
    assert [part.name for part in found.parts] == whole["parts"]
    assert [len(part.points) for part in found.parts] == [POINTS[n] for n in whole["parts"]]
    drawn = [name for part in found.parts for name in part.figures]
    assert sorted(drawn) == sorted({*figures.NAMES} - {"curves", "pareto_moved", "pareto_held"})
    apart = {point.key for part in found.parts for point in part.points}
    assert {point.key for point in found.points} == apart
    assert len(found.points) < sum(POINTS[name] for name in whole["parts"])


@pytest.mark.parametrize("name", sorted(POINTS))
def test_sweeps_expand_to_the_points_they_promise(name: str, tmp_path: Path) -> None:
    found = grid_points(name)
    assert len(found) == len({point.key for point in found}) == POINTS[name]
    config = compose.composed([f"+sweep={name}"])
    assert config["name"] == name
    assert config["about"]


def test_longbench_has_26_points_a_task() -> None:
    found = grid_points("longbench_budgets")
    assert {
        task: sum(p.task.name == task for p in found) for task in {p.task.name for p in found}
    } == dict.fromkeys(
        ("qasper", "hotpotqa", "gov_report", "triviaqa", "narrativeqa", "multifieldqa_en"), 26
    )


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_headers_say_command_cost_and_expectation(name: str) -> None:
    lines = SWEEPS[name].read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert f"python -m quest_dist.sweep +sweep={name}" in header
    assert "Cost" in header
    assert "Expect" in header
    assert welcome.headline(SWEEPS[name])


def test_options_hold_one_key_their_own_name() -> None:
    config = compose.composed(["+sweep=smoke"])
    for group in compose.OPEN_GROUPS:
        names = [path.stem for path in (find("conf") / group).glob("*.yaml")]
        assert sorted(config[group]) == sorted(names)


def test_a_folder_of_ones_own_adds_options(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("mine: {source: local, path: /models/mine}")
    config = compose.composed([f"hydra.searchpath=[file://{tmp_path}]", "+sweep=smoke"])
    assert config["model"]["mine"] == {"source": "local", "path": "/models/mine"}
    assert "smollm2" in config["model"]


def test_the_paper_profile_means_other_models_data_and_budgets() -> None:
    config = compose.composed(["+sweep=longbench_budgets", "profile=paper"])
    assert config["grid"]["model"] == ["longchat_7b", "llama31_8b", "qwen25_7b"]
    assert config["grid"]["budget"] == [256, 512, 1024, 2048, 4096]
    assert config["data"]["label"] == "hub"
    files = compose.composed(["+sweep=passkey", "profile=paper", "data=files", "data.root=/x"])
    assert files["data"]["label"] == "files"


def test_the_protocol_says_how_many_layers_stay_dense_unless_the_grid_does() -> None:
    def dense(*overrides: str) -> set[int]:
        return {point.dense_layers for point in grid_points("smoke", *overrides)}

    assert dense() == {2}
    assert dense("protocol=kvpress") == {0}
    assert dense("protocol=kvpress", "grid.dense_layers=[1,2]") == {1, 2}


def test_a_point_is_named_by_its_own_dense_layers_not_by_where_they_came_from() -> None:
    stated = grid_points("smoke", "protocol.dense_layers=3")
    given = grid_points("smoke", "grid.dense_layers=[3]")
    assert [p.key for p in stated] == [p.key for p in given]
    other = grid_points("smoke", "grid.dense_layers=[3]", "protocol.truncation=head")
    assert not {p.key for p in other} & {p.key for p in given}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+sweep=passky"], r"unknown sweep 'passky'; did you mean 'passkey'\?"),
        (["sweep=passkey"], r"'sweep=' needs a plus: \+sweep=NAME"),
        (["cluster.env.FOO=bar"], r"it needs a plus, \+cluster\.env\.FOO=VALUE"),
        (["limit=3"], r"no sweep: add \+sweep=NAME"),
        (
            ["+sweep=smoke", "grid.model=[smolm2]"],
            r"unknown model 'smolm2'; did you mean 'smollm2'",
        ),
        (["+sweep=smoke", "grid.method=[qest]"], r"unknown method 'qest'; did you mean 'quest'"),
        (["+sweep=smoke", "grid.task=[pasky]"], r"unknown task 'pasky'; did you mean 'passkey'"),
        (["+sweep=smoke", "data=file"], r"unknown data 'file'; did you mean 'files'"),
        (["+sweep=smoke", "model=longchat_7b"], r"give 'grid.model=\[longchat_7b\]' instead"),
        (["+sweep=smoke", "grid.budgets=[1]"], r"no 'budgets' in grid; did you mean 'budget'"),
        (
            ["+sweep=smoke", "method.quest.gqaa=max"],
            r"no 'gqaa' in method.quest; did you mean 'gqa'",
        ),
        (
            ["+sweep=smoke", "+method.quest.gqaa=max"],
            r"quest.gqaa: no such setting; did you mean 'gqa'",
        ),
        (["+sweep=smoke", "method.quest.gqa=maxx"], r"gqa='maxx'"),
        (["+sweep=smoke", "device=cuda"], r"setting 'device'; did you mean 'cluster.device'"),
        (
            ["+sweep=smoke", "model.smollm2.dtype=float16"],
            r"model.smollm2.dtype='float16' runs on a GPU only: set cluster.device=cuda",
        ),
        (["+sweep=smoke", "+gird.x=1"], r"unknown setting 'gird'; did you mean 'grid'"),
        (["+sweep=smoke", "+cluster.adress=auto"], r"cluster.adress'; did you mean 'address'"),
        (["+sweep=smoke", "grid.budget=[0]"], r"grid.budget: .* at least 1, got 0"),
        (["+sweep=smoke", "grid.budget=[-8]"], r"grid.budget: .* at least 1, got -8"),
        (["+sweep=smoke", "grid.budget=[abc]"], r"grid.budget=\[abc\]: .*could not be converted"),
        (["+sweep=smoke", "grid.budget=64"], r"expected a list, as in 'grid.budget=\[64\]'"),
        (["+sweep=smoke", "grid.budget=[1"], r"cannot read the override 'grid.budget=\[1'"),
        (["+sweep=smoke", "grid.dense_layers=[99]"], r"dense_layers=99: smollm2 has 30 layers"),
        (
            ["+sweep=smoke", "task.passkey.length=9999"],
            r"task passkey: a sample takes 10009 tokens, more than model.smollm2.max_length=8192",
        ),
        (
            ["+sweep=perplexity_budgets", "task.pg19.prefill=9000"],
            r"task pg19: a sample takes 9065 tokens, more than model.smollm2.max_length=8192",
        ),
        (["+sweep=smoke", "data.tokens=9000"], r"task qasper: a sample takes 90\d\d tokens, more"),
        (
            ["+sweep=smoke", "protocol.truncation=heads"],
            r"protocol.truncation='heads'.*did you mean 'head'",
        ),
        (["+sweep=smoke", "protocol.dense_layers=-1"], r"grid.dense_layers: .* got -1"),
        (
            ["+sweep=smoke", "~protocol.dense_layers"],
            r"grid.dense_layers.*'protocol.dense_layers' not found$",
        ),
        (["+sweep=smoke", "limit=0"], r"limit=0: must be at least 1"),
        (["+sweep=smoke", "name=a/b"], r"name='a/b'"),
        (["+sweep=smoke", "figures=[fig7]"], r"no figure 'fig7'; did you mean 'fig07'"),
        (["+sweep=smoke", "cluster.backend=rya"], r"cluster.backend='rya': choose ray or inline"),
        (["+sweep=smoke", "data=files"], r"data.root is not set"),
        (
            ["+sweep=smoke", "data=files", "data.root=/nowhere"],
            r"data.root='/nowhere' is not a folder",
        ),
        (["+sweep=smoke", "-m"], r"-m: a sweep expands its own grid"),
        (["+sweep=smoke", "--config-dir", "/x"], r"--config-dir: .*'hydra.searchpath=\["),
        (["--cfg", "job", "+sweep=passky"], r"unknown sweep 'passky'; did you mean 'passkey'\?"),
        (["--info", "defaults", "data=file"], r"unknown data 'file'; did you mean 'files'"),
        (["+sweep=smoke", "hydra.run.dir=x"], r"hydra.run.dir: .*output_dir says where"),
        (["+sweep=smoke", "hydra.searchpath=[file:///nowhere]"], r"'file:///nowhere' is not a f"),
        (["+sweep=smoke", "grid.budget=64,128"], r"a list, as in 'grid.budget=\[64,128\]'$"),
        (["+sweep=smoke", "grid.budget=range(64,128,32)"], r"\): .* a list, as in 'grid.budget="),
        (["+sweep=smoke", "grid.budget=[2147483648]"], r"budget: expected at most 2147483647, got"),
        (["+sweep=smoke", "output_dir="], r"output_dir is empty"),
        (
            ["+sweep=smoke", "tracking.uri=htp://u:pw@h"],
            r"=htp://u:\*\*\*@h: .*did you mean 'http'",
        ),
        (
            ["+sweep=smoke", "tracking.uri=file:///x"],
            r"keeps no runs in a folder .*; choose sqlite",
        ),
        (
            ["+sweep=smoke", "task.passkey.length=900.5"],
            r"passkey.length=900.5: .* a whole number$",
        ),
        (["+sweep=smoke", "task.passkey.length=9"], r"task.passkey.length=9 is below 128"),
        (["+sweep=smoke", "task.passkey.samples=2.5"], r"samples=2.5: expected a whole number$"),
        (["+sweep=smoke", "task.passkey.chat=maybe"], r"chat='maybe': expected true or false$"),
        (["+sweep=smoke", "task.qasper.samples=x"], r"expected a whole number or null$"),
        (["+sweep=smoke", "method.quest.radius_scale=x"], r"radius_scale='x': expected a number$"),
        (["+sweep=smoke", "method.quest.radius_scale=nan"], r"method.quest.radius_scale=nan"),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    status, out, err = command(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []  # nothing is written before all is checked


def test_an_output_directory_that_is_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        status, _, err = command(capsys, "+sweep=smoke", f"output_dir={tmp_path / place}")
        assert status == 2
        assert re.fullmatch(r"error: output_dir=\S+: no folder that can be written .*\n", err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_store_by_a_plugin_of_mlflows_is_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = compose.composed(["+sweep=smoke", "tracking.uri=other://x"])
    with pytest.raises(ValueError, match="no store of MLflow"):
        prepare(config)
    known = tmp_path / "other-1.0.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    (known / "entry_points.txt").write_text("[mlflow.tracking_store]\nother = other:Store\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert prepare(config).points


def test_malformed_data_is_named_by_file_and_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qasper.jsonl").write_text(
        '{"context": "a", "input": "b", "answers": ["c"]}\n{"con'
    )
    given = ["+sweep=smoke", "grid.task=[qasper]", "data=files", f"data.root={tmp_path}"]
    status, _, err = command(capsys, *given)
    assert status == 2
    assert re.search(r"error: .*qasper.jsonl, line 2: not JSON", err)
    status, _, err = command(capsys, *given[:1], "grid.task=[hotpotqa]", *given[2:])
    assert re.search(r"error: .*hotpotqa.jsonl; tasks present: qasper", err)


def test_without_arguments_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = command(capsys)
    assert status == 0
    assert all(f"+sweep={name} " in out for name in SWEEPS)
    assert "outputs/" in out


@pytest.mark.parametrize("flag", ["--help", "--cfg", "--info"])
def test_hydra_answers_at_once_and_without_heavy_imports(flag: str, tmp_path: Path) -> None:
    extra = {"--cfg": ["job"], "--info": ["defaults"]}.get(flag, [])
    arguments = [flag, *extra, "+sweep=longbench_budgets"]
    code = (
        "import sys; from quest_dist import sweep\n"
        f"try: sweep.main({arguments!r})\n"
        "finally: print(sorted({'torch', 'ray', 'mlflow', 'transformers'} & set(sys.modules)))"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(find("conf").parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.monotonic() - started < 20  # about half a second on an idle machine
    assert done.stdout.endswith("[]\n")
    assert "longbench_budgets" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_what_no_worker_here_holds_estimates_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "worker_memory", lambda resources: 2**30)
    given = ["+sweep=passkey", "profile=paper", "plan=true"]
    status, out, _ = command(capsys, *given)
    assert status == 0
    assert "nothing that is left can be begun" in out
    assert "0:00" not in out
    assert "0.0 GiB" not in out


def test_a_plan_says_what_would_run_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = command(capsys, "+sweep=passkey", "plan=true")
    assert status == 0
    assert "72 points, 720 records" in out
    assert "GiB a worker" in out
    assert "nothing was run" in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_what_is_done(tmp_path: Path) -> None:
    tiny_sweep.run(tmp_path / "out", "limit=2")
    out = Console(file=(text := (tmp_path / "text").open("w+")), width=120)
    config = tiny_sweep.config(tmp_path / "out", ["plan=true"])
    assert launch.run(config, run_unit="tiny_unit:run", out=out) == 0
    text.seek(0)
    said = text.read()
    assert "18 records, 6 of them done" in said
    assert "6/18" in said
    assert "from the ledger's own measurements" in said


def test_closing_words_list_scores_files_and_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ERROR_AT", "1")
    out = Console(file=(text := (tmp_path / "text").open("w+")), width=120)
    assert tiny_sweep.run(tmp_path / "out", out=out) == 1
    text.seek(0)
    said = text.read()
    assert "Quest" in said
    assert "points.csv" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("failed: passkey full")
    assert last.endswith("ValueError: wrong")


def test_a_closing_table_counts_samples_and_cuts(tmp_path: Path) -> None:
    rows = synthetic.sweep(tmp_path, synthetic.points(["qasper"]), 3)
    for shown, said in (
        (rows, "3 samples; beside each score its 95 % interval"),
        ([replace(r, truncated=2) for r in rows], "its 95 % interval; 2 cut to fit the model"),
        ([replace(r, n=1, low=math.nan) for r in rows], " 1 sample "),
        ([replace(r, n=1 + (r.budget == 512)) for r in rows], "1 to 2 samples"),
        ([replace(r, n=0) for r in rows], "no results"),
    ):
        out = Console(file=(text := io.StringIO()), width=120)
        closing.results(shown, out)
        assert said in text.getvalue()


def test_table_1_takes_each_length_with_its_own_model_and_budgets() -> None:
    points = grid_points("passkey", "profile=paper", "data=generated")
    found: dict[tuple[str, str], set[int]] = {}
    for point in points:
        budgets = found.setdefault((point.task.name, point.model.name), set())
        budgets |= {point.budget} - {None}
    assert found == {
        ("passkey", "longchat_7b"): {32, 64, 128, 256, 512},
        ("passkey_long", "yarn_llama2_7b_128k"): {256, 512, 1024, 2048, 4096},
    }
