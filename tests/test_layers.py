"""Imports go down, each heavy library has one door, and no file grows beyond reading."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quest_dist.folders import PACKAGE

FILES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 400
#: A library -> the modules that may import it, by the start of their path in the package.
DOORS = {
    "ray": ("schedule_ray",),
    "mlflow": ("mlflow_store", "mlflow_read"),
    "transformers": ("models", "bundled", "attention"),
    "matplotlib": ("figures/",),
    "hydra": ("sweep", "compose", "mistakes"),
    "omegaconf": ("sweep", "compose", "mistakes"),
    "sqlite3": ("ledger", "doctor/"),
    "jinja2": ("report/",),
    "flashinfer": ("on_flashinfer",),
    "sklearn": ("calibrators/kvquant", "methods/clusters"),
    "rich": ("progress", "closing", "estimate", "launch", "bench/"),
}
#: From the bottom up; a module imports from its own layer or from lower ones (types excepted).
LAYERS = (
    ("suggest", "folders", "redact", "spec", "plan", "node_types", "cluster"),
    ("_cpu", "_cuda", "backend", "metadata", "nuq", "packing"),
    ("arguments", "reference", "reference_prefill", "reference_packed"),
    ("on_cpu", "on_cuda", "page_requests", "on_flashinfer", "faults", "ops", "prefill", "packed"),
    ("int4", "token_tree", "prepared"),
    ("tasks/", "ledger", "cost", "stats", "anytime", "search", "machine_state", "shapes", "places"),
    ("bundled", "weights", "artefacts"),
    ("pool", "batch", "group", "methods/", "details", "timing", "graphs"),
    ("table", "ordering", "lossless", "matched"),
    ("linear4", "awq_files", "overview", "projection", "attention_sides"),
    ("attention", "attention_inputs", "models"),
    ("calibrators/",),
    (
        "engine",
        "latency",
        "recall",
        "sparsity",
        "attention_map",
        "figures/",
        "mlflow_store",
        "mlflow_read",
        "tracker",
        "provenance",
    ),
    ("decoders", "kernel_times", "step_times", "drafts", "speculation", "task_models"),
    ("worker", "prepare", "report/", "calibrate"),
    ("parts",),
    ("schedule", "work", "follow", "progress", "closing", "welcome"),
    ("estimate", "reported"),
    ("launch", "compose", "mistakes"),
    ("sweep", "figures/__main__", "bench/", "doctor/"),
)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports(path: Path, *, types: bool = False) -> Iterator[str]:
    """Modules that a file imports, anywhere in it; those for type checking only if `types`."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if guarded and not types:
            skipped |= set(ast.walk(node))
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    named = [number for number, members in enumerate(LAYERS) if name in members]
    if named:
        return named[0]
    for number, members in enumerate(LAYERS):
        for member in members:
            if name == member or (member.endswith("/") and f"{name}/".startswith(member)):
                return number
            if member in ("schedule", "tracker") and name.startswith(f"{member}_"):
                return number
    return None


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_have_one_door(path: Path) -> None:
    for module in imports(path):
        doors = DOORS.get(module.split(".")[0])
        assert doors is None or name_of(path).startswith(doors), f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    name = name_of(path)
    if name == "__init__":
        return
    own = layer(name.removesuffix("/__init__"))
    assert own is not None, f"{name}: give this module a place in LAYERS"
    for module in imports(path):
        if module.startswith("quest_dist."):
            below = layer(module.removeprefix("quest_dist.").replace(".", "/"))
            assert below is None or below <= own, f"{name} imports {module}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES
