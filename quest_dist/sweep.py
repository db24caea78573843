"""The command: compose, prepare, schedule, track, draw.

    python -m quest_dist.sweep +sweep=longbench_budgets

Exit status: 0 when every point is finished, 1 when some failed or the sweep was interrupted or ran
out of disk, 2 for a mistake in the command line, the configuration or the data. Torch, Ray and
MLflow are imported only once a sweep really starts, so that --help and --cfg answer at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quest_dist import compose, welcome
from quest_dist.folders import find

if TYPE_CHECKING:
    from omegaconf import DictConfig

FINISHED, INCOMPLETE, MISTAKE = 0, 1, 2
#: Options with which Hydra prints something; it is never let run anything (compose says why).
PRINTING = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i"}
PRINTING |= {"--shell-completion", "-sc"}
#: A disk that takes no more: the same command goes on when it does.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: sys.argv); return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)

    def command() -> int:
        if not given:
            sys.stdout.write(welcome.text(compose.sweep_files()) + "\n")
            return FINISHED
        return _hydra(given)

    return in_one_line(command)


def in_one_line(command: Callable[[], int]) -> int:
    """Return the status of a command; what a user can mend is one line on standard error."""
    full_errors = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        return command()
    except KeyboardInterrupt:
        return _mistake("interrupted; the same command again goes on from here", INCOMPLETE)
    except ValueError as error:
        if full_errors:
            raise
        return _mistake(str(error))
    except Exception as error:
        from quest_dist import mistakes

        if full_errors:
            raise
        if isinstance(error, mistakes.ERRORS):  # some are OSErrors, too
            return _mistake(mistakes.explain(error, compose.defaults))
        if not isinstance(error, OSError) or error.errno not in DISK:
            raise
        return _mistake(
            f"{error.filename or 'output_dir'}: {error.strerror}; what is finished is kept: make"
            " room, and the same command goes on from here",
            INCOMPLETE,
        )


def _hydra(arguments: list[str]) -> int:
    """Compose and run; or let Hydra print, where an option asks for that."""
    refused = {"-m", "--multirun"} & set(arguments)
    if refused:
        raise ValueError(
            f"{refused.pop()}: a sweep expands its own grid; give lists instead,"
            " as in 'grid.budget=[256,512]'"
        )
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        if re.match(r"hydra[./]", key) and key != "hydra.searchpath":
            raise ValueError(
                f"{key}: Hydra composes the configuration here and runs nothing; of its settings"
                " only hydra.searchpath is read (output_dir says where results go)"
            )
    options = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    if not options:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        return _run(*compose.composed_with_text(arguments), arguments)
    if not PRINTING & set(options):
        raise ValueError(
            f"{options[0]}: a sweep is run by overrides alone; see --help (a folder of your own"
            " YAML files joins with 'hydra.searchpath=[file:///my/conf]')"
        )
    import hydra

    compose.check_printable([a for a in arguments if a[:1] != "-" and ("=" in a or a[:1] == "~")])

    def task(cfg: DictConfig) -> None:
        raise AssertionError("Hydra was asked to print")

    # Hydra would print and exit by itself; the errors are ours to explain.
    wanted = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    saved, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(find("conf")), config_name="config")(task)()
    finally:
        sys.argv = saved
        del os.environ["HYDRA_FULL_ERROR"]
        if wanted is not None:
            os.environ["HYDRA_FULL_ERROR"] = wanted
    return FINISHED


def _run(config: dict[str, Any], text: str, arguments: list[str]) -> int:
    """Launch what was composed, outside of Hydra, which composes the parts once more."""
    from quest_dist import launch
    from quest_dist.cluster import Cluster, device_of
    from quest_dist.provenance import Provenance

    parts = compose.parts(config, arguments)
    device = device_of(Cluster(**config["cluster"]))
    return launch.run(config, Provenance.here(arguments, text, device), parts=parts)


def _mistake(text: str, status: int = MISTAKE) -> int:
    sys.stderr.write(f"error: {text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
