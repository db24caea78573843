"""Artefacts: named by what they are made of, refused where they do not fit, whole or absent, made
once; and the command that makes them."""

from __future__ import annotations

import ast
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from artefact_maker import Maker
from cache_harness import settings_of
from safetensors.torch import load_file, save_file
from tiny_models import save_byte_model

from quest_dist import artefacts, calibrate, compose, launch, models
from quest_dist.calibrators import kvquant
from quest_dist.folders import find
from quest_dist.models import LoadedModel
from quest_dist.prepare import prepare
from quest_dist.spec import Spec

GRID = (
    "name=tiny",
    "grid.model=[tiny]",
    "grid.task=[pg19]",
    "grid.method=[full,kvquant3]",
    "grid.dense_layers=[0]",
    "task.pg19.samples=1",
    "task.pg19.prefill=60",
    "task.pg19.tokens=6",
    "tracking=none",
    "cluster=inline",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny local model that reads bytes."""
    made = tmp_path_factory.mktemp("model")
    save_byte_model(made)
    return made


@pytest.fixture(scope="module")
def settings(folder: Path) -> dict[str, str]:
    return {"source": "local", "path": str(folder), "dtype": "float32"}


@pytest.fixture(scope="module")
def loaded(settings: dict[str, str]) -> LoadedModel:
    return models.load(settings)


@pytest.fixture(scope="module")
def made(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact for KVQuant as its YAML sets it, of a text of its own."""
    place = tmp_path_factory.mktemp("artefact") / "kvquant.safetensors"
    what = artefacts.recipe("kvquant", vars(kv().build()), loaded.identity, "text")
    artefacts.make(loaded, what, TEXT, place)
    return place


TEXT = "The cat sat on the mat and thought about its cache. " * 200


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quest_dist" / "artefacts"


def kv(name: str = "kvquant3", **changes: object) -> Spec:
    return Spec(name, {**settings_of(name), **changes})


# ---- identity


def test_a_made_artefact_goes_by_its_recipe(loaded: LoadedModel) -> None:
    model = loaded.identity

    def name_of(spec: Spec, of: object = model) -> str:
        return str(artefacts.identified(spec, of).identity["artefact"])  # type: ignore[arg-type]

    plain = name_of(kv())
    assert plain == name_of(kv("kvquant2")) == name_of(kv("kvquant4", qnorm=True))
    assert plain == name_of(kv(), {**model, "dtype": "bfloat16", "chat": "llama2"})
    others = [
        name_of(kv(outliers=0.02)),
        name_of(kv(sinks=4)),
        name_of(kv(), {**model, "weights": "0" * 16}),
        name_of(kv(), {"source": "hub", "repo": "a/b", "revision": "main"}),
    ]
    assert len({plain, *others}) == 5


def test_its_name_changes_with_version_and_text(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name_now() -> object:
        return artefacts.identified(kv(), loaded.identity).identity["artefact"]

    before = name_now()
    monkeypatch.setattr(artefacts, "bundled_text", lambda: "another text")
    other = name_now()
    monkeypatch.setattr(kvquant, "VERSION", 0)
    assert len({before, other, name_now()}) == 3


def test_a_named_artefact_goes_by_its_content(
    made: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    def key(path: Path) -> str:
        return artefacts.identified(kv(artefact=str(path)), loaded.identity).canonical()

    copy = tmp_path / "copy.safetensors"
    shutil.copy(made, copy)
    assert key(copy) == key(made)
    tensors, header = load_file(copy), artefacts.header_of(copy)
    tensors["k3"] = tensors["k3"] + 1
    before = artefacts.read(str(copy))
    artefacts.write(tensors, header, copy)
    assert key(copy) != key(made)
    assert torch.equal(artefacts.read(str(copy))["k3"], before["k3"] + 1)


def test_a_method_that_needs_none_takes_none(loaded: LoadedModel) -> None:
    plain = Spec("full", settings_of("full"))
    assert artefacts.identified(plain, loaded.identity) is plain
    assert artefacts.ready(loaded, plain) is None
    named = Spec("full", {**plain.settings, "artefact": "a.safetensors"})
    with pytest.raises(ValueError, match=r"artefact='a\.safetensors': it needs none"):
        artefacts.identified(named, loaded.identity)


# ---- files that do not fit


def spoiled(made: Path, place: Path, how: str) -> Path:
    """A file that is no artefact, or another one."""
    header = artefacts.header_of(made)
    changed = {
        "kind": {"kind": "less"},
        "version": {"version": 0},
        "settings": {"settings": {"outliers": 0.5, "sinks": 1}},
        "model": {"model": {"source": "hub", "repo": "a/b", "revision": "main"}},
    }
    if how in changed:
        artefacts.write(load_file(made), {**header, **changed[how]}, place)
    elif how == "torn":
        place.write_bytes(made.read_bytes()[:-100])
    elif how == "text":
        place.write_text("an artefact?")
    elif how == "foreign":
        save_file({"a": torch.ones(1)}, place)
    elif how == "folder":
        place.mkdir()
    return place


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "no such file; python -m quest_dist.calibrate makes one"),
        ("folder", "no such file"),
        ("torn", "no artefact of quest_dist"),
        ("text", "no artefact of quest_dist"),
        ("foreign", "no artefact of quest_dist"),
        ("kind", 'made for kind "less", needed is "kvquant"'),
        ("version", "made for version 0, needed is 1"),
        ("settings", 'made for settings {"outliers":0.5,"sinks":1}, needed is {"outliers":0.01'),
        ("model", 'made for model {"repo":"a/b"'),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line_before_anything_runs(
    made: Path, folder: Path, tmp_path: Path, how: str, said: str
) -> None:
    file = spoiled(made, tmp_path / f"{how}.safetensors", how)
    named = f"method.kvquant3.artefact={file}"
    config = composed(folder, tmp_path / "out", named)
    with pytest.raises(ValueError, match="method kvquant3: artefact=") as refused:
        prepare(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)


def composed(folder: Path, out: Path, *more: str) -> dict[str, object]:
    model = f"+model.tiny={{source:local,path:{folder},label:Tiny,dtype:float32}}"
    return compose.composed([*GRID, model, f"output_dir={out}", *more])


def test_a_worker_looks_again(made: Path, loaded: LoadedModel, tmp_path: Path) -> None:
    """A file may be replaced between planning and running."""
    assert artefacts.ready(loaded, kv(artefact=str(made))) == str(made)
    other = spoiled(made, tmp_path / "a.safetensors", "model")
    with pytest.raises(ValueError, match="made for model"):
        artefacts.ready(loaded, kv(artefact=str(other)))


# ---- made at first need


@pytest.fixture(scope="module", autouse=True)
def maker(folder: Path) -> Iterator[Maker]:
    """Started before the first test, as it takes seconds to import what it needs."""
    started = Maker(folder)
    yield started
    started.close()


def job(tmp_path: Path, folder: Path, dies: bool = False) -> dict[str, object]:
    """The arguments of a process that needs the artefact."""
    return {
        "cache": str(tmp_path / "cache"),
        "folder": str(folder),
        "method": "kvquant3",
        "settings": settings_of("kvquant3"),
        "log": str(tmp_path / "log"),
        "dies": dies,
    }


def test_processes_that_need_it_at_once_make_it_once(
    maker: Maker, cache: Path, folder: Path, tmp_path: Path, loaded: LoadedModel
) -> None:
    both = maker.together(*2 * [job(tmp_path, folder)])
    assert [process.code for process in both] == [0, 0]
    [place] = {Path(process.said) for process in both}
    assert (tmp_path / "log").read_text() == "made\n"
    assert [file for file in cache.iterdir() if not file.name.endswith(".lock")] == [place]
    before = place.stat()
    assert artefacts.ready(loaded, kv("kvquant2")) == str(place)  # other bits, the same artefact
    assert place.stat().st_mtime_ns == before.st_mtime_ns
    artefacts.check(place, "kvquant", vars(kv().build()), loaded.identity)


def test_a_process_that_is_killed_while_writing_leaves_nothing_that_counts(
    maker: Maker, cache: Path, folder: Path, tmp_path: Path
) -> None:
    [dying] = maker.together(job(tmp_path, folder, dies=True))
    assert dying == (-signal.SIGKILL, "")
    torn = [file for file in cache.iterdir() if not file.name.endswith(".lock")]
    assert all(file.name.startswith(".") for file in torn)
    [again] = maker.together(job(tmp_path, folder))
    assert again.code == 0
    place = Path(again.said)
    artefacts.header_of(place)
    assert [file for file in cache.iterdir() if not file.name.endswith(".lock")] == [place]


def test_the_bundled_text_is_prose_and_no_part_of_what_is_measured() -> None:
    text = artefacts.bundled_text()
    assert 1 << 19 < len(text) <= artefacts.TEXT_CHARACTERS
    assert text == artefacts.bundled_text.__wrapped__()
    from pydoc_data.topics import topics

    longest = max(topics.values(), key=len)
    assert not any(longest[at : at + 200] in text for at in range(0, len(longest), 1000))


def test_documented_statements_are_found_in_the_order_of_a_walk() -> None:
    tree = ast.parse(Path(artefacts.__file__).read_text() + NESTED)
    found, walked = (
        [node for node in nodes if isinstance(node, ast.stmt)]
        for nodes in (artefacts._statements(tree), ast.walk(tree))
    )
    assert found == walked


NESTED = """
try:
    def a(): pass
except Exception:
    def b(): pass
else:
    match a:
        case 1:
            def c(): pass
        case _:
            class D:
                async def e():
                    async for _ in a: pass
                    else:
                        def f(): pass
finally:
    with a:
        def g(): pass
"""


# ---- the command


@pytest.fixture
def conf(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of conf/, and the tiny model."""
    own = tmp_path / "conf"
    shutil.copytree(find("conf"), own)
    (own / "model" / "tiny.yaml").write_text(
        f"tiny: {{source: local, path: {folder}, label: Tiny, dtype: float32}}\n"
    )
    monkeypatch.setenv("QUEST_CONF_DIR", str(own))


@pytest.mark.usefixtures("conf", "cache")
def test_the_command_makes_what_a_sweep_then_uses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "book.txt", tmp_path / "made" / "a.safetensors"
    text.write_text(TEXT)
    asked = ["kvquant3", "outliers=0.05", "--model", "tiny", "--text", str(text), "--out", str(out)]
    assert calibrate.main(asked) == 0
    assert f"use it with method.kvquant3.artefact={out}" in capsys.readouterr().out
    header = artefacts.header_of(out)
    assert header["settings"] == {"outliers": 0.05, "sinks": 1}
    assert header["text"] == artefacts.text_digest(TEXT)
    named = f"method.kvquant3.artefact={out}"
    with pytest.raises(ValueError, match=r'"outliers":0\.05.*needed is \{"outliers":0\.01'):
        prepare(compose.composed([*GRID, f"output_dir={tmp_path}", named]))
    told = [named, "method.kvquant3.outliers=0.05", f"output_dir={tmp_path / 'out'}"]
    assert launch.run(compose.composed([*GRID, *told])) == launch.FINISHED
    assert not (tmp_path / "cache" / "quest_dist" / "artefacts").exists()  # nothing else was made


@pytest.mark.usefixtures("conf")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kvqant3"], "method='kvqant3': no such method; did you mean 'kvquant3'"),
        (["quest"], "method='quest' needs no artefact as it is set"),
        (["kvquant3", "bits=7"], "bits=7: choose 2, 3 or 4"),
        (["kvquant3", "bit=3"], "kvquant3.bit: no such setting; did you mean 'bits'"),
        (["kvquant3", "bits"], "setting 'bits': expected name=value"),
        (["kvquant3", "--model", "tinny"], "model='tinny': no such model; did you mean 'tiny'"),
        (["kvquant3", "--text", "/no/such.txt"], "--text /no/such.txt: cannot be read"),
        (["kvquant3", "--text", "SHORT"], "text of 12 tokens: kvquant reads 8 x 512"),
        (["kvquant3", "--text", "LONG", "--out", "/proc/a"], "--out /proc/a: cannot be written"),
        (["kvquant3", "--text", "SHORT", "--out", "/proc/a"], "--out /proc/a: cannot be written"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    for name, text in (("SHORT", "twelve bytes"), ("LONG", TEXT)):
        (tmp_path / name).write_text(text)
    told = [str(tmp_path / a) if a in ("SHORT", "LONG") else a for a in arguments]
    more = [] if "--out" in told else ["--out", str(tmp_path / "a.safetensors")]
    model = [] if "--model" in told else ["--model", "tiny"]
    assert calibrate.main([*told, *more, *model]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()


def test_a_header_says_what_a_file_was_made_of(made: Path, loaded: LoadedModel) -> None:
    header = artefacts.header_of(made)
    assert header == json.loads(json.dumps(header))
    assert header["kind"] == "kvquant"
    assert header["model"] == {"source": "local", "weights": loaded.identity["weights"]}
    assert {name: list(t.shape) for name, t in artefacts.read(str(made)).items()} == {
        "lower": [4, 2, 16],
        "upper": [4, 2, 16],
        **{f"{x}{b}{q}": [4, 1 << b] for x in "kv" for b in (2, 3, 4) for q in ("", "_qnorm")},
    }
