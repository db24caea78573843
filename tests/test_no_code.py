"""Neither a configuration nor a model's folder can have code run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_byte_model

from quest_dist import models, sweep, weights
from quest_dist.folders import PACKAGE
from quest_dist.plan import Spec

FILES = sorted(PACKAGE.rglob("*.py"))
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
CALLS |= {
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
}
#: A keyword -> the one value that it may be given.
ONLY = {
    "trust_remote_code": False,
    "allow_pickle": False,
    "shell": False,
    "weights_only": True,
    "use_safetensors": True,
}


def dangers(code: str) -> Iterator[str]:
    """What of a source file could run what it read."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            named = []
        yield from (n for n in named if n.split(".")[0] in UNPICKLERS or n in CALLS)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield name
            for keyword in node.keywords:
                allowed = ONLY.get(keyword.arg or "")
                constant = getattr(keyword.value, "value", None)
                if allowed is not None and constant is not allowed:
                    yield f"{keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_nothing_here_runs_what_it_reads(path: Path) -> None:
    assert list(dangers(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from torch import load",
        "torch.load(path)",
        "yaml.load(text)",
        "f(trust_remote_code=yes)",
        "f(trust_remote_code=True)",
        "run(command, shell=True)",
        "load(path, weights_only=False)",
        "eval(text)",
    ],
)
def test_and_it_would_be_seen(code: str) -> None:
    assert len(list(dangers(code))) == 1


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "quest_dist.spec.importlib.import_module",
        "quest_dist.tasks.files.functools.partial",
        "quest_dist.tasks.files.Path",
        "quest_dist.tasks.files.Stored",  # of another module: not defined in this one
        "quest_dist.tasks.hub.zipfile.ZipFile",
        "quest_dist.tasks.hub.importlib.import_module",
        "quest_dist.tasks.sources.digest",  # a function
        "quest_dist.schedule.resolve",
        "quest_dist.ledger.Ledger",
        "quest_dist.methods.quest.__class__",
        "quest_dist.methods.quest.__builtins__.eval",
        "quest_dist.methods.quest.Quest.__init__",
        "quest_dist.methods.quest.Quest.__subclasses__",
        "quest_dist.methods..os.system",
        "quest_dist.methods.",
        "quest_dist.methods.quest.Quest ",
        "quest_dist.methods.quest.Quest\n",
        "quest_dist.bench.__main__.main",
    ],
)
def test_a_target_is_a_class_of_ours_and_nothing_else(target: str) -> None:
    with pytest.raises(ValueError, match=r"_target_|no '.*' in quest_dist\.") as caught:
        Spec("evil", {"_target_": target}).target()
    assert caught.value.args


def test_a_sweep_with_a_foreign_target_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = f"+method.evil={{_target_: os.system, command: 'touch {tmp_path}/ran'}}"
    status = sweep.main(["+sweep=smoke", "grid.method=[evil]", evil, "plan=true"])
    assert status == sweep.MISTAKE
    assert capsys.readouterr().err.startswith("error: evil: _target_ must name a class of")
    assert not (tmp_path / "ran").exists()


CALLBACK = """# @package _global_
defaults: [/sweep/smoke]
hydra:
  callbacks:
    evil: {_target_: evil_callback.Ran}
  job_logging:
    handlers:
      console: {"()": evil_callback.Ran}
  hydra_logging:
    handlers:
      console: {"()": evil_callback.Ran}
"""


@pytest.mark.parametrize(
    "options",
    [("plan=true",), ("--cfg", "job"), ("--info",), ("--help",), ("--config-dir", "here")],
)
def test_a_sweep_file_cannot_have_hydra_call_anything(
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "evil_callback.py").write_text(
        f"import logging, pathlib\npathlib.Path({str(tmp_path)!r}, 'ran').touch()\n"
        "class Ran(logging.NullHandler):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "evil.yaml").write_text(CALLBACK)
    status = sweep.main([f"hydra.searchpath=[file://{tmp_path}]", "+sweep=evil", *options])
    text = capsys.readouterr()
    expected = {
        "plan=true": "",  # what Hydra would have called is not looked at
        "--config-dir": "error: --config-dir: a sweep is run by overrides alone; see --help (a"
        " folder of your own YAML files joins with 'hydra.searchpath=[file:///my/conf]')\n",
    }.get(
        options[0], "error: hydra.callbacks is set: a configuration has nothing called by Hydra\n"
    )
    assert text.err == expected
    assert status == (sweep.MISTAKE if expected else sweep.FINISHED)
    assert not (tmp_path / "ran").exists()


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model's folder."""
    made = tmp_path / "model"
    made.mkdir()
    save_byte_model(made)
    return made


def arm(folder: Path, **config: object) -> Path:
    """Add code to a model's folder, and pickled weights; returns the file that either touches."""
    ran = folder.parent / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(ran)))
    for name, kinds in (
        ("config.json", ("AutoConfig", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
    ):
        read = json.loads((folder / name).read_text())
        named = {
            kind: "evil.Evil" if kind != "AutoTokenizer" else ["evil.E", None] for kind in kinds
        }
        read |= {"auto_map": named, **(config if name == "config.json" else {})}
        (folder / name).write_text(json.dumps(read))
    return ran


def settings(folder: Path) -> dict[str, str]:
    return {"source": "local", "path": str(folder), "dtype": "float32"}


def test_code_beside_a_known_model_is_not_run(folder: Path) -> None:
    ran = arm(folder)
    loaded = models.load(settings(folder))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not ran.exists()


def test_a_model_that_needs_its_own_code_is_refused(folder: Path) -> None:
    ran = arm(folder, model_type="evil")
    with pytest.raises(ValueError, match="cannot be loaded"):
        models.load(settings(folder))
    assert not ran.exists()


def test_pickled_weights_are_refused(folder: Path) -> None:
    ran = arm(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors weights \(other formats are refused\)"):
        models.load(settings(folder))
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../model/model.safetensors", "/x.safetensors", 3]
)
def test_an_index_that_names_other_weights_is_refused(folder: Path, name: object) -> None:
    ran = arm(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json names the weights"):
        models.load(settings(folder))
    assert not ran.exists()


def test_a_configuration_that_names_other_weights_is_refused(folder: Path) -> None:
    arm(folder, transformers_weights="pytorch_model.bin")
    with pytest.raises(ValueError, match=r"config\.json names the weights 'pytorch_model\.bin'"):
        models.check(settings(folder))


LOAD = """
import sys
from quest_dist import models
for repo in sys.argv[1:]:
    try:
        models.load({"source": "hub", "repo": repo, "dtype": "float32"})
        print("loaded")
    except ValueError as error:
        print(error)
"""


def test_repositories_are_held_to_the_same(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    ran = arm(folder)

    def cached(name: str) -> Path:
        """The folder as a repository of the hub's cache."""
        place = home / "hub" / f"models--some--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0" * 40)
        (place / "snapshots").mkdir()
        here = place / "snapshots" / ("0" * 40)
        here.mkdir()
        for file in folder.iterdir():
            (here / file.name).write_bytes(file.read_bytes())
        return here

    cached("good")
    (cached("pickled") / "model.safetensors").unlink()
    here = cached("indexed")
    (here / "model.safetensors").rename(here / "other.safetensors")
    (here / weights.INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}})
    )
    done = subprocess.run(
        [sys.executable, "-c", LOAD, "some/good", "some/pickled", "some/indexed"],
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(PACKAGE.parent),
        },
        capture_output=True,
        text=True,
    )
    good, pickled, indexed = done.stdout.splitlines()
    assert good == "loaded", good
    assert pickled.startswith("model some/pickled: cannot be loaded")
    assert indexed.startswith("model.repo='some/indexed': model.safetensors.index.json names")
    assert not ran.exists()
