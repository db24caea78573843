"""The attention benchmark's table, out of the times of its points.

`x dense`, `x sdpa` and `x flashinfer` say how many times faster a side is than our dense, than SDPA
with enable_gqa and than the faster of FlashInfer's dense kernels; where rows share a prefix and are
timed one call each too, `x dense` is against these. `% of bandwidth` is of a read of memory, on a
GPU of a copy, in the same cycles. `low` and `high` are the median's 95 % interval over repeats,
`first` is the side's first call of all (see `timing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quest_dist.bench import flashinfer_sides
from quest_dist.ops import REDUCTIONS
from quest_dist.shapes import Point
from quest_dist.timing import Times, paired, spread

COLUMNS = (
    *("shape", "context", "rows", "prefix", "pages", "budget", "lists", "what", "calls"),
    *("us", "p5", "p10", "p90", "p95", "low", "high", "first"),
    *("GB/s", "% of bandwidth", "x dense", "x sdpa"),
)
FLASHINFER_COLUMN = "x flashinfer"


@dataclass(frozen=True)
class Outcome:
    """A point and its times."""

    point: Point
    times: Times

    @property
    def bandwidth(self) -> str:
        """The side that stands for it."""
        return "copy" if self.has("copy") else "read"

    @property
    def flashinfer(self) -> str | None:
        """The faster of FlashInfer's dense sides, where they were timed."""
        timed = [name for name in flashinfer_sides.DENSE if self.has(name)]
        return min(timed, key=lambda name: spread(self.times.us(name)).median, default=None)

    def has(self, side: str) -> bool:
        """Whether this side was timed."""
        return side in self.times.moved

    def faster(self, base: str | None, side: str | None) -> float | None:
        """How many times faster than `base` the side is; None where one was not timed."""
        if base is None or side is None or not (self.has(base) and self.has(side)):
            return None
        return paired(self.times.us(base), self.times.us(side))

    def rows(self) -> list[tuple[Any, ...]]:
        """The table's, FlashInfer's column included: one a side, and one more a part of it."""
        rows = []
        for name, steps in self.times.moved.items():
            rows.append(self._row(name))
            if len(steps) > 1:
                rows += [self._row(name, step) for step in steps]
        return rows

    def _row(self, side: str, *steps: str) -> tuple[Any, ...]:
        point, times = self.point, self.times
        us = times.us(side, *steps)
        found = spread(us)
        rate = spread(times.rate(side, *steps)).median / 1000
        words = side.split()
        quest = words[-1] in REDUCTIONS
        dense = side in ("dense", "calls", *flashinfer_sides.DENSE)
        what = " ".join(words[:-2]) if quest else side
        what = f"dense, {point.rows} calls" if side == "calls" else what
        compared = None if side in ("read", "copy") or steps else side
        return (
            point.shape.name,
            point.context,
            point.rows,
            point.prefix if point.rows > 1 else None,
            point.order,
            int(words[-2]) if quest else "all" if dense else None,
            words[-1] if quest else None,
            steps[0] if steps else what,
            found.calls,
            found.median,
            *found[1:7],
            None if steps else times.first.get(side),
            rate or None,
            100 * paired(times.rate(side, *steps), times.rate(self.bandwidth)) if rate else None,
            self.faster("calls" if self.has("calls") else "dense", compared),
            self.faster("sdpa gqa", compared),
            self.faster(self.flashinfer, compared),
        )


def table(outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Columns and rows; FlashInfer's column only where it was timed."""
    rows = [row for outcome in outcomes for row in outcome.rows()]
    if any(outcome.flashinfer for outcome in outcomes):
        return (*COLUMNS, FLASHINFER_COLUMN), rows
    return COLUMNS, [row[:-1] for row in rows]
