"""Packed: attention over a KV cache of few bits, and what else is packed, against bf16.

Each part (see `packed_part`) times its sides in one run, the bf16 baseline among them; a ratio is
the median over cycles of the ratio of two sides' medians in the same cycle. CPU only.
"""

from __future__ import annotations

import argparse
import math

import torch

from quest_dist import machine_state, timing
from quest_dist.bench import packed_cache, packed_weights
from quest_dist.bench.packed_part import COLUMNS
from quest_dist.bench.report import Report
from quest_dist.places import place_of
from quest_dist.shapes import SHAPES
from quest_dist.timing import REUSE

#: Modules of parts by the name that --part takes.
PARTS = {"cache": packed_cache, "weights": packed_weights}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument(
        "--part", nargs="+", metavar="NAME", help=f"of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--shape", default="8b", help=f"of {', '.join(SHAPES)} (default: 8b)")
    parser.add_argument("--context", default="32K", metavar="N", help="tokens (default: 32K)")
    parser.add_argument("--seconds", type=float, default=10.0, help="to time a part (default: 10)")


def run(options: argparse.Namespace) -> Report:
    """Measure; ValueError for options that cannot be."""
    chosen = options.part or list(PARTS)
    asked = [("part", name, list(PARTS)) for name in chosen]
    for key, value, choices in [*asked, ("shape", options.shape, list(SHAPES))]:
        if value not in choices:
            raise ValueError(f"--{key}={value} is unknown; choose one of {', '.join(choices)}")
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"--seconds={options.seconds}: expected a positive number")
    place = place_of(torch.device("cpu"))
    before = machine_state.read()
    with torch.inference_mode():
        parts = {name: PARTS[name].measured(options, place) for name in chosen}
    state = machine_state.stated(before, machine_state.read())
    return Report(
        name="packed in few bits, against bf16",
        columns=COLUMNS,
        rows=[row for part in parts.values() for row in part.rows],
        summary={key: value for part in parts.values() for key, value in part.summary.items()},
        setting={
            **place.setting(),
            "ratios": "median over cycles of the ratio of two sides' medians in the same cycle",
            "contract": timing.contract(
                on_gpu=False,
                warm_up=timing.WARM_UP["cpu"],
                repeats=f"{timing.FEWEST_CYCLES} to {timing.MOST_CYCLES} cycles",
                tokens="one query a call; the context does not grow",
                cache=f"cold: {REUSE} x the last-level cache is read between two uses of a buffer",
                graphs="off: a CPU",
                baseline="the same in bf16 through our own kernels",
            ),
            "seconds_a_part": options.seconds,
            "machine_state": state,
            **{name: dict(part.setting) for name, part in parts.items()},
        },
        targets={key: value for part in parts.values() for key, value in part.targets.items()},
    )
