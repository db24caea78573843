"""Artefacts: what a method needs that is made from a model beforehand, one safetensors file each.

A *recipe* says what one is made of: the kind and its version, the model's weights, the text, and
the settings that matter. Where a method names no file, its artefact is made at first need from the
text that every Python carries, and kept in the user's cache under the digest of its recipe; a file
that `python -m quest_dist.calibrate` wrote is used where `method.NAME.artefact` names it.

Invariants: a file of the cache is complete or absent (written beside its place and renamed; one
process makes it while others wait); what a file was made of stands in its header, and a file of
another model, kind or setting is refused. A named file goes by its content in a point's key, a
made one by its recipe.
"""

from __future__ import annotations

import ast
import fcntl
import functools
import gc
import hashlib
import importlib
import json
import os
import sysconfig
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from quest_dist.bundled import cache_root
from quest_dist.spec import Spec, canonical, digest, with_content

if TYPE_CHECKING:
    from torch import Tensor

    from quest_dist.models import LoadedModel

#: What of a model's identity says whose weights they are.
WEIGHTS = ("source", "weights", "recipe", "repo", "revision", "weight_format", "scales")
HEADER = "quest_dist"
#: Modules of the standard library whose docstrings are the text; characters of it that are kept.
TEXT_CHARACTERS = 1 << 20


def calibrator(kind: str) -> ModuleType:
    """The module that makes artefacts of a kind."""
    return importlib.import_module(f"quest_dist.calibrators.{kind}")


def recipe(
    kind: str, settings: Mapping[str, Any], model: Mapping[str, Any], text: str
) -> dict[str, Any]:
    """What an artefact is made of; `model` is an identity (models.identity), `text` the digest of
    the text."""
    module = calibrator(kind)
    return {
        "kind": kind,
        "version": module.VERSION,
        "model": {key: model[key] for key in WEIGHTS if key in model},
        "text": text,
        "settings": {name: settings[name] for name in module.SETTINGS},
    }


def kind_of(spec: Spec) -> str | None:
    """The kind of artefact that a method, as it is set, needs; None where it needs none."""
    built = spec.build()
    kind: str | None = built.calibration
    return kind


def identified(spec: Spec, model: Mapping[str, Any]) -> Spec:
    """A method's spec whose identity holds its artefact by content.

    Raises ValueError for a named file that is missing, malformed or of another model, kind or
    setting.
    """
    kind, path = kind_of(spec), spec.settings.get("artefact")
    if kind is None:
        if path is not None:
            raise ValueError(f"artefact={path!r}: it needs none as it is set; leave it out")
        return spec
    kept = {key: value for key, value in spec.settings.items() if key != "artefact"}
    settings = vars(spec.build())
    if path is None:
        made = digest(recipe(kind, settings, model, text_digest(bundled_text())))
        return with_content(spec, {**kept, "artefact": made})
    check(Path(path), kind, settings, model)
    with Path(path).open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return with_content(spec, {**kept, "artefact": content})


def check_named(spec: Spec) -> None:
    """Raise ValueError where a method needs an artefact and names none, or one of another kind or
    setting; for models that have no identity here, so that nothing can be made or looked up."""
    kind, path = kind_of(spec), spec.settings.get("artefact")
    if kind is None:
        return
    if path is None:
        raise ValueError(
            f"method={spec.name!r} needs artefact=FILE, made for this model:"
            f" python -m quest_dist.calibrate {spec.name} --out FILE"
        )
    check(Path(path), kind, vars(spec.build()), None)


def check(
    path: Path, kind: str, settings: Mapping[str, Any], model: Mapping[str, Any] | None
) -> None:
    """Raise ValueError unless the file is an artefact of this kind, these settings and, where it
    is known, this model."""
    header = header_of(path)
    wanted = recipe(kind, settings, model or {}, header.get("text", ""))
    for part in ("kind", "version", "settings", "model"):
        if part == "model" and model is None:
            continue
        if canonical(header.get(part)) != canonical(wanted[part]):
            raise ValueError(
                f"artefact={str(path)!r}: made for {part} {canonical(header.get(part))}, needed is"
                f" {canonical(wanted[part])}; python -m quest_dist.calibrate makes one"
            )


def header_of(path: Path) -> dict[str, Any]:
    """What an artefact was made of, read from its file; ValueError where it is none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(
            f"artefact={str(path)!r}: no such file; python -m quest_dist.calibrate makes one, and"
            " null makes it at first need"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header: Any = json.loads((file.metadata() or {})[HEADER])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise ValueError(f"artefact={str(path)!r}: no artefact of quest_dist ({error})") from error
    return dict(header)


def read(path: str) -> dict[str, Tensor]:
    """The tensors of an artefact, on the CPU; kept while they are among the last few in use and
    the file is the same."""
    state = Path(path).stat()
    return _read(path, (state.st_ino, state.st_mtime_ns))


@functools.lru_cache(maxsize=8)
def _read(path: str, state: tuple[int, int]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def ready(loaded: LoadedModel, spec: Spec) -> str | None:
    """The artefact of a method for this model, made now where it is nowhere yet; None where the
    method needs none."""
    kind = kind_of(spec)
    if kind is None:
        return None
    settings = vars(spec.build())
    if (named := spec.settings.get("artefact")) is not None:
        check(Path(named), kind, settings, loaded.identity)
        return str(named)
    return made(loaded, kind, settings)


def made(loaded: LoadedModel, kind: str, settings: Mapping[str, Any]) -> str:
    """The artefact of a kind and settings for this model in the user's cache, made now where it is
    absent."""
    text = bundled_text()
    what = recipe(kind, settings, loaded.identity, text_digest(text))
    place = cache_root() / "artefacts" / f"{kind}-{digest(what)}.safetensors"
    if not place.is_file():
        with _alone(place):
            if not place.is_file():
                for torn in place.parent.glob(f".{place.name}-*"):  # of a process that was killed
                    torn.unlink(missing_ok=True)
                make(loaded, what, text, place)
    return str(place)


def make(loaded: LoadedModel, what: Mapping[str, Any], text: str, place: Path) -> None:
    """Make the artefact of a recipe from a text and write it to `place`, all or nothing.

    Raises ValueError for a text that is too short.
    """
    import torch

    module = calibrator(what["kind"])
    own = "sequences" in module.SETTINGS
    sequences = int(what["settings"]["sequences"]) if own else int(module.SEQUENCES)
    ids = loaded.language.encode(text)
    if len(ids) < sequences * module.LENGTH:
        raise ValueError(
            f"text of {len(ids)} tokens: {what['kind']} reads {sequences} x {module.LENGTH}"
        )
    apart = len(ids) // sequences  # sequences are spread over the text
    starts = range(0, apart * sequences, apart)
    # Gradients do not flow through what is made in inference mode, tokens among it.
    with torch.inference_mode(False):
        tokens = torch.tensor([ids[start : start + module.LENGTH] for start in starts])
        tensors = module.make(loaded, tokens.to(loaded.device), what["settings"])
    write(tensors, what, place)


def write(tensors: Mapping[str, Tensor], what: Mapping[str, Any], place: Path) -> None:
    """Write an artefact with its recipe to `place`, all or nothing."""
    from safetensors.torch import save_file

    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{place.name}-", dir=place.parent)
    os.close(handle)
    try:
        plain = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
        save_file(plain, name, metadata={HEADER: canonical(what)})
        Path(name).replace(place)
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Hold the lock beside `place`; a process that dies lets go of it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def text_digest(text: str) -> str:
    """A text's name in a recipe."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def bundled_text() -> str:
    """The docstrings of the standard library, a MiB of English that every CPython carries; not the
    language reference, which is what perplexity is measured on."""
    found: list[str] = []
    with _uncollected():
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found.append(ast.get_docstring(node) or "")
    text = "\n\n".join(part for part in found if len(part) > 200)
    return text[:TEXT_CHARACTERS]


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector, which takes as long as parsing and finds nothing: trees are no
    cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """A module and what holds statements in it, in the order of `ast.walk`, whose other nodes
    are the most and have no docstring."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            inner = getattr(node, name, None)
            if isinstance(inner, list):
                todo.extend(inner)
