"""What a wheel must carry and what importing the package must not do."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import quest_dist
from quest_dist import ops

ROOT = Path(__file__).resolve().parents[1]
needs_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="not a checkout of the repository"
)


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@needs_checkout
def test_one_version() -> None:
    assert project()["version"] == quest_dist.__version__


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, quest_dist; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'patchd'"):
        _ = quest_dist.patchd


@needs_checkout
def test_constraints_pin_every_dependency_within_its_range() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            assert re.fullmatch(r"[0-9][0-9a-z.]*", version), line
            pins[name.lower().replace("_", "-")] = version
    extras = project()["optional-dependencies"]
    for requirement in [*project()["dependencies"], *extras["dev"]]:  # type: ignore[index,misc]
        name = re.match(r"[A-Za-z0-9_-]+", requirement)
        assert name is not None
        assert name[0].lower().replace("_", "-") in pins, requirement


@needs_checkout
def test_every_kernel_file_is_built_and_every_instruction_set_has_one() -> None:
    names = {path.stem for path in (ROOT / "kernels" / "cpu").glob("isa_*.cpp")}
    assert names == {"isa_scalar", "isa_avx2", "isa_avx512", "isa_avx512bf16"}
    assert ops.isas()[-1] == "scalar"
    assert ops.isa() in ops.isas()


def test_a_wrong_quest_isa_is_said_at_import() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from quest_dist import _cpu"],
        env={"QUEST_ISA": "sse9", "PYTHONPATH": str(Path(quest_dist.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert "ImportError" in last
    assert "'sse9'" in last
    assert "scalar" in last


@needs_checkout
def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    told = set(re.findall(r"^([a-z]+):.*## ", makefile, flags=re.MULTILINE))
    assert targets == told
    assert {"setup", "test", "sweep", "lint", "format", "bench", "clean", "help"} <= targets
