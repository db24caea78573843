"""The command `python -m quest_dist.bench`: one subcommand a benchmark."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quest_dist.bench import attention, overhead, packed, scale, sharing, textgen, tracking
from quest_dist.folders import check_writable


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark that is named, print its table, and write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m quest_dist.bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME")
    for module in (attention, overhead, packed, scale, sharing, textgen, tracking):
        name = module.__name__.rpartition(".")[2]
        text = (module.__doc__ or "").splitlines()[0]
        command = benchmarks.add_parser(name, help=text, description=text)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        if options.json is not None:
            check_writable("--json", options.json)
        report = options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show()
    if options.json is not None:
        report.write(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
