"""Make a method's artefact from a text: `python -m quest_dist.calibrate METHOD --out FILE`.

    python -m quest_dist.calibrate kvquant3 outliers=0.02 --text book.txt --out kvquant.safetensors

`METHOD` and `--model` are options of conf/; settings that go into the making are given as
name=value. Use the file with `method.METHOD.artefact=FILE`; it is refused for another model or
other settings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from quest_dist import artefacts, models
from quest_dist.folders import check_writable, find
from quest_dist.spec import Spec
from quest_dist.suggest import did_you_mean


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m quest_dist.calibrate")
    parser.add_argument("method", help="an option of conf/method that needs an artefact")
    parser.add_argument("settings", nargs="*", help="settings of the method, name=value")
    parser.add_argument("--model", default="smollm2", help="an option of conf/model")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files; default: docstrings")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    asked = parser.parse_args(arguments)
    try:
        calibrate(asked.method, asked.settings, asked.model, asked.text, asked.device, asked.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def calibrate(
    method: str,
    settings: Sequence[str],
    model: str,
    texts: Sequence[Path] | None,
    device: str,
    out: Path,
) -> None:
    """Make the artefact and write it; ValueError for what is wrong with the request."""
    spec = _option("method", method)
    spec = Spec(method, {**spec.settings, **dict(map(_setting, settings))})
    kind = artefacts.kind_of(spec)
    if kind is None:
        raise ValueError(f"method={method!r} needs no artefact as it is set")
    check_writable("--out", out)
    text = artefacts.bundled_text() if not texts else "\n\n".join(map(_text, texts))
    loaded = models.load(_option("model", model).settings, device)
    made_of = artefacts.recipe(
        kind, vars(spec.build()), loaded.identity, artefacts.text_digest(text)
    )
    try:
        artefacts.make(loaded, made_of, text, out)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error})") from error
    print(f"{out}: {kind} of {model}; use it with method.{method}.artefact={out}")


def _option(group: str, name: str) -> Spec:
    folder = find("conf") / group
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"{group}={name!r}: no such {group}; {did_you_mean(name, names)}")
    return Spec(name, yaml.safe_load((folder / f"{name}.yaml").read_text())[name])


def _setting(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"setting {text!r}: expected name=value")
    return name, yaml.safe_load(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {path}: cannot be read ({error})") from error


if __name__ == "__main__":
    raise SystemExit(main())
