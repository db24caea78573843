"""Where `conf/` and `sweeps/` are: named by the environment, carried by the installed package, or
in the checkout; and whether a file that is asked for can be written."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
VARIABLES = {"conf": "QUEST_CONF_DIR", "sweeps": "QUEST_SWEEPS_DIR"}


def find(kind: str) -> Path:
    """The folder of `kind` (conf | sweeps); ValueError names the variable when there is none."""
    variable = VARIABLES[kind]
    named = os.environ.get(variable)
    if named:
        folder = Path(named).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"{variable}={named!r} is not a folder")
        return folder
    for folder in (PACKAGE / f"_{kind}", PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise ValueError(f"{kind}/ is neither in the package nor beside it; set {variable}")


def check_writable(name: str, path: Path) -> None:
    """Raise ValueError where a file could not be written, before minutes are spent on what is to
    be in it."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"{name} {path}: cannot be written ({error.strerror})") from error
    if not there:
        path.unlink()
