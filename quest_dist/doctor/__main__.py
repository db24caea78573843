"""The command `python -m quest_dist.doctor`: a line a finding; exit status 1 with any problem."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from quest_dist.doctor.examine import CHECKS, examine, one
from quest_dist.doctor.finding import PROBLEM, Asked, Finding


def main(arguments: list[str] | None = None) -> int:
    """Examine this machine and print what was found."""
    parser = argparse.ArgumentParser(prog="python -m quest_dist.doctor", description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"), metavar="DIR")
    parser.add_argument("--tracking-uri", default="", metavar="URI", help="MLflow's store")
    parser.add_argument("--ray", action="store_true", help="start (and stop) a private cluster too")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead")
    parser.add_argument("--only", choices=CHECKS, help="one check, here, without limits")
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    asked = Asked(options.output_dir, options.tracking_uri, options.ray)
    found = one(options.only, asked) if options.only else examine(asked)
    if options.answer:
        options.answer.write_text(json.dumps([finding.to_dict() for finding in found]))
    elif options.json:
        print(json.dumps([finding.to_dict() for finding in found], indent=1))
    else:
        print("\n".join(map(_line, found)))
    return int(any(finding.status == PROBLEM for finding in found))


def _line(found: Finding) -> str:
    said = f"{found.status:<8} {found.check:<10} {found.fact}"
    return f"{said}: {found.advice}" if found.advice else said


if __name__ == "__main__":
    sys.exit(main())
