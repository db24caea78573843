"""Mistakes: what Hydra says about a wrong command line, as one line with the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from quest_dist.suggest import did_you_mean

#: Everything that Hydra raises for a command line or file that is wrong.
ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, defaults: Callable[[], Mapping[str, Any]]) -> str:
    """Return one line for an error of ERRORS.

    `defaults` composes the configuration without overrides; its keys are the valid names.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"unknown {group} '{name}'; {did_you_mean(name, error.options)}"
    if isinstance(error, OverrideParseException):
        quoted = f"quote it in the shell, as in '{error.override}'"
        return (
            f"cannot read the override {error.override!r} ({_line(text.splitlines()[0])}); {quoted}"
        )
    if found := re.search(r"(?:Sweep parameters|Ambiguous value for argument) '(\S+)'", text):
        key, _, value = found[1].partition("=")
        listed = f"{key}=[{value}]" if "(" not in value else f"{key}=[...]"
        return f"{found[1]}: a sweep expands its own grid; give a list, as in '{listed}'"
    if found := re.search(r"Could not override '([^']+)'\. No match in the defaults list", text):
        return f"'{found[1]}=' needs a plus: +{found[1]}=NAME"
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown(found[1], defaults())
    cause = f"{text}\n{error.__cause__ or ''}"
    found = re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", cause)
    path = re.search(r"full_key: (\S+)", cause)
    if found:
        where = re.search(r"In '([^']+)'", text)
        prefix = f"in {where[1]}: " if where else ""
        return prefix + _unknown(path[1] if path else found[1], defaults())
    if found := re.search(r"Error merging override (.+)", text):
        return _wrong_value(found[1].strip(), str(error.__cause__ or ""))
    return _line(re.split(r"\n\s*(?:full_key|object_type|See https)", cause)[0])


def _unknown(path: str, known: Mapping[str, Any]) -> str:
    """An unknown setting, with the valid names beside it."""
    parts = path.split(".")
    level: Any = known
    for depth, part in enumerate(parts):
        if not isinstance(level, Mapping) or part not in level:
            choices = list(level) if isinstance(level, Mapping) else []
            suffix = f" in {'.'.join(parts[:depth])}" if depth else ""
            groups = {k: v for k, v in known.items() if isinstance(v, Mapping) and depth == 0}
            if inside := [name for name, group in groups.items() if part in group]:
                return f"unknown setting '{path}'; did you mean '{inside[0]}.{path}'?"
            if isinstance(level, Mapping) and not level:
                return f"'{path}=' is new there: it needs a plus, +{path}=VALUE"
            return f"unknown setting '{path}': no '{part}'{suffix}; {did_you_mean(part, choices)}"
        level = level[part]
    return f"cannot set '{path}'"


def _wrong_value(override: str, cause: str) -> str:
    key, _, value = override.partition("=")
    if "is not a ListConfig" in cause:
        return f"{override}: expected a list, as in '{key}=[{value}]'"
    return f"{override}: {_line(cause.splitlines()[0] if cause else 'not a valid value')}"


def _line(text: str) -> str:
    return " ".join(text.split())
