"""The attention benchmark's table and its accepted figures, out of the times of its points.

`x dense` and `x sdpa` say how many times faster a side is than our dense and than SDPA with
enable_gqa; where rows share a prefix and are timed one call each too, `x dense` is against these.
`% of read` is of the bandwidth in the same cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quest_dist.bench.report import Report
from quest_dist.bench.shapes import Point
from quest_dist.bench.timing import Times, paired, spread
from quest_dist.ops import Reduce

COLUMNS = (
    *("shape", "context", "rows", "prefix", "budget", "lists", "what", "calls"),
    *("us", "p10", "p90", "GB/s", "% of read", "x dense", "x sdpa"),
)
TARGETS = {
    "dense_vs_bandwidth": ">= 0.8",
    "quest_vs_dense_8b": ">= 6",
    "quest_vs_dense_7b": ">= 6",
    "quest_vs_sdpa_8b": ">= 30",
    "score_select_vs_attend": "<= 1",
    "shared_rows_ratio": "<= 0.333",
}


@dataclass(frozen=True)
class Outcome:
    """A point and its times."""

    point: Point
    times: Times

    def rows(self) -> list[tuple[Any, ...]]:
        """The table's: one a side, and one more a part of Quest."""
        rows = []
        for name, steps in self.times.moved.items():
            rows.append(self._row(name))
            if len(steps) > 1:
                rows += [self._row(name, step) for step in steps]
        return rows

    def _row(self, side: str, *steps: str) -> tuple[Any, ...]:
        point, times = self.point, self.times
        us = times.us(side, *steps)
        median, low, high, calls = spread(us)
        rate = spread(times.rate(side, *steps)).median / 1000
        quest = side.split() if side.startswith("quest") else None
        ours = quest is not None or side in ("dense", "calls")
        words = "quest" if quest else f"dense, {point.rows} calls" if side == "calls" else side
        compared = side != "read" and not steps
        base = "calls" if self.has("calls") else "dense"
        return (
            point.shape.name,
            point.context,
            point.rows,
            point.prefix if point.rows > 1 else None,
            int(quest[1]) if quest else "all" if ours else None,
            quest[2] if quest else None,
            steps[0] if steps else words,
            calls,
            median,
            low,
            high,
            rate or None,
            100 * paired(times.rate(side, *steps), times.rate("read")) if rate else None,
            paired(times.us(base), us) if compared else None,
            paired(times.us("sdpa gqa"), us) if compared and self.has("sdpa gqa") else None,
        )

    def has(self, side: str) -> bool:
        """Whether this side was timed."""
        return side in self.times.moved


@dataclass(frozen=True)
class Figures:
    """Where the accepted figures are taken: the 8B and the 7B shape at one context and budget."""

    shapes: tuple[str, ...] = ("7b", "8b")
    context: int = 32768
    budget: int = 2048
    lists: Reduce = "max"

    def report(self, outcomes: Sequence[Outcome], setting: Mapping[str, Any]) -> Report:
        """Table, summary and targets."""
        return Report(
            name="decode attention: one new token a row",
            columns=COLUMNS,
            rows=[row for outcome in outcomes for row in outcome.rows()],
            summary=self.summary(outcomes),
            setting=setting,
            targets=TARGETS,
        )

    def summary(self, outcomes: Sequence[Outcome]) -> dict[str, float | None]:
        """The figures by name, None for those whose point was not measured.

        `shared_rows_ratio` is one call with 26 rows that share a prefix over 26 calls with one row,
        for the 7B shape: it computes 26 queries a key, the 8B shape (`_8b`) four times as many, so
        its bytes allow more.
        """
        quest = f"quest {self.budget} {self.lists}"
        each = f"quest {self.budget} per_query"
        reads = [rate for o in outcomes for visit in o.times.rate("read") for rate in visit]

        def at(shape: str, *sides: str, figure: Callable[[Times], float]) -> float | None:
            """The figure of the shape's point that has these sides."""
            for outcome in outcomes:
                point = outcome.point
                here = (point.shape.name, point.context, point.rows) == (shape, self.context, 1)
                if here and all(outcome.has(side) for side in sides):
                    return figure(outcome.times)
            return None

        def faster(base: str, side: str) -> Callable[[Times], float]:
            return lambda times: paired(times.us(base), times.us(side))

        def selecting(times: Times) -> float:
            return paired(times.us(quest, "score", "select"), times.us(quest, "attend"))

        def shared(shape: str) -> float | None:
            for outcome in outcomes:
                if outcome.has("calls") and outcome.point.shape.name == shape:
                    return paired(outcome.times.us("dense"), outcome.times.us("calls"))
            return None

        return {
            "dense_vs_bandwidth": at(
                "8b", figure=lambda times: paired(times.rate("dense"), times.rate("read"))
            ),
            "quest_vs_dense_8b": at("8b", quest, figure=faster("dense", quest)),
            "quest_vs_dense_7b": at("7b", quest, figure=faster("dense", quest)),
            "quest_vs_sdpa_8b": at("8b", quest, "sdpa gqa", figure=faster("sdpa gqa", quest)),
            "score_select_vs_attend": at("8b", quest, figure=selecting),
            "shared_rows_ratio": shared("7b"),
            "dense_vs_best_read": at(
                "8b", figure=lambda times: spread(times.rate("dense")).median / max(reads)
            ),
            "dense_vs_bandwidth_7b": at(
                "7b", figure=lambda times: paired(times.rate("dense"), times.rate("read"))
            ),
            "quest_vs_dense_8b_per_query": at("8b", each, figure=faster("dense", each)),
            "score_select_vs_attend_7b": at("7b", quest, figure=selecting),
            "shared_rows_ratio_8b": shared("8b"),
            "best_read_gbs": max(reads) / 1000,
        }
