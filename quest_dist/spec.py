"""Specs: named, configured things, and the canonical text by which they are told apart.

A spec is one option of a configuration group (a model, task, method, data source or protocol).
Its identity is its settings less what only presents or counts; equal identities behave alike.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quest_dist.suggest import did_you_mean

#: Settings that only say how a thing is shown or scheduled; they never reach a constructor.
PRESENTATION = frozenset({"label", "title", "color", "marker", "budgeted", "shape", "about"})
#: Settings that say how much is measured; records are kept by sample, so they name nothing.
QUANTITY = frozenset({"samples"})
#: Whose classes a configuration may have made: a name is no way to reach any other code.
_TARGETS = re.compile(r"quest_dist\.(?:methods|tasks)(?:\.[a-z][a-z0-9_]*)+\.[A-Za-z][A-Za-z0-9]*")
#: What a parameter may be declared as, as YAML can write it: how it is told, and its name.
_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "int": (lambda value: type(value) is int, "a whole number"),
    "float": (lambda value: type(value) is int or _is_finite(value), "a number"),
    "bool": (lambda value: type(value) is bool, "true or false"),
    "str": (lambda value: type(value) is str, "text"),
    "None": (lambda value: value is None, "null"),
}


def canonical(value: Any) -> str:
    """Return the one JSON text of a plain value: sorted keys, whole floats written as integers."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Spec:
    """A named, configured thing: a model, task, method, data source or protocol.

    `settings` is plain JSON and may carry `_target_`, the class that `build` calls.
    `content` replaces the settings in a point's identity where settings hold paths (a data
    folder goes by the digest of its files); None means the settings themselves.
    """

    name: str
    settings: Mapping[str, Any]
    content: Mapping[str, Any] | None = None

    @property
    def label(self) -> str:
        """The name that figures and tables print."""
        return str(self.settings.get("label", self.name))

    @property
    def budgeted(self) -> bool:
        """Whether a token budget means anything to this method (False for full attention)."""
        return bool(self.settings.get("budgeted", True))

    @property
    def identity(self) -> dict[str, Any]:
        """What of this spec can change a score."""
        source = self.settings if self.content is None else self.content
        return {k: v for k, v in source.items() if k not in PRESENTATION | QUANTITY}

    def canonical(self) -> str:
        """Return name and identity as one text; equal texts mean equal behaviour."""
        return canonical({"name": self.name, **self.identity})

    def target(self) -> Callable[..., Any]:
        """Import and return the class that `_target_` names.

        Raises ValueError for anything but a class that a module of quest_dist.methods or
        quest_dist.tasks defines itself: what it imports from elsewhere is not reached through it.
        """
        path = str(self.settings.get("_target_", ""))
        if not _TARGETS.fullmatch(path):
            raise ValueError(
                f"{self.name}: _target_ must name a class of quest_dist.methods or"
                f" quest_dist.tasks (quest_dist.methods.MODULE.CLASS), got '{path}'"
            )
        module_name, _, attribute = path.rpartition(".")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                raise ValueError(f"{self.name}: _target_ names no module: '{path}'") from error
            raise
        found = getattr(module, attribute, None)
        if not (isinstance(found, type) and found.__module__ == module_name):
            own = [n for n, v in vars(module).items() if _is_public_class(n, v, module_name)]
            hint = did_you_mean(attribute, own)
            raise ValueError(f"{self.name}: no '{attribute}' in {module_name}; {hint}")
        return found

    def build(self, **extra: Any) -> Any:
        """Call the target with the settings (less presentation keys) and `extra`.

        Raises ValueError for a setting the target does not take, with the nearest that it does.
        """
        target = self.target()
        settings = {k: v for k, v in self.settings.items() if k not in PRESENTATION}
        settings.pop("_target_", None)
        parameters = inspect.signature(target).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            valid = [n for n in parameters if n not in extra and n != "self"]
            for key in settings:
                if key not in valid:
                    hint = did_you_mean(key, valid)
                    raise ValueError(f"{self.name}.{key}: no such setting; {hint}")
            absent = [
                n
                for n in valid
                if n not in settings
                and parameters[n].default is inspect.Parameter.empty
                and parameters[n].kind is not inspect.Parameter.VAR_POSITIONAL
            ]
            if absent:
                raise ValueError(f"{self.name}.{absent[0]}: this setting is required and not set")
        for key, value in settings.items():
            if key in parameters and (wanted := _misses(value, parameters[key].annotation)):
                raise ValueError(f"{self.name}.{key}={value!r}: expected {wanted}")
        try:
            return target(**settings, **extra)
        except (TypeError, AttributeError) as error:  # a list where a number belongs
            told = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.name}: a setting has the wrong type ({told})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as plain JSON."""
        content = None if self.content is None else dict(self.content)
        return {"name": self.name, "settings": dict(self.settings), "content": content}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Return the spec that `to_dict` wrote."""
        return cls(data["name"], data["settings"], data.get("content"))


def with_content(spec: Spec, content: Mapping[str, Any]) -> Spec:
    """Return the spec with `content` as what its identity holds."""
    return replace(spec, content=json.loads(canonical(content)))


def _is_public_class(name: str, value: object, module: str) -> bool:
    return isinstance(value, type) and value.__module__ == module and not name.startswith("_")


def _misses(value: object, annotation: object) -> str:
    """What a parameter takes, where it is declared as plain values and this is none of them: Python
    would compute with half a token, and take `maybe` for true."""
    declared = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = [kind.strip() for kind in declared.split("|")]
    if not set(kinds) <= set(_KINDS) or any(_KINDS[kind][0](value) for kind in kinds):
        return ""
    return " or ".join(_KINDS[kind][1] for kind in kinds)


def _is_finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int):  # most are: asked first
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
