"""The attention benchmark's plan: its points, and the buffers that keep caches out of the times."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from quest_dist import graphs, timing
from quest_dist.bench.attention_figures import Figures, GpuFigures
from quest_dist.bench.places import checked_options
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, PAGE_SIZE, SHAPES, Point, Shape, parsed_sizes
from quest_dist.timing import READ, REUSE

CONTEXTS = (8192, 32768, 131072)
BUDGETS = (512, 2048, 8192)
#: The points that share a prefix, and those with several rows, have at most this context.
SHARING_CONTEXT, ROWS_CONTEXT = 8192, 32768
SHARING_ROWS, BATCH_ROWS = 26, 8
SHARED_SHAPES = ("7b", "8b")


@dataclass(frozen=True)
class Plan:
    """What to measure: `points`, and `sharing`, whose rows are also timed one call each.

    `record` makes passes ready (see `graphs`); None: calls are timed one by one.
    """

    points: tuple[Point, ...]
    sharing: tuple[Point, ...]
    dtype: torch.dtype
    seconds: float
    place: Place
    figures: Figures = field(default_factory=Figures)
    record: graphs.Record | None = None

    @property
    def cache(self) -> int:
        """Bytes of the last-level cache."""
        return self.place.cache

    def layers(self, point: Point) -> int:
        """Layers that rotate."""
        if point in self.sharing:
            return point.rows
        if self.record is not None:  # a pass is of one side, and the first piece reads least
            least = point.score_bytes if point.quests else point.dense_bytes
            return timing.buffers_needed([(least(self.dtype), True)], REUSE * self.cache)
        dense, visit = point.dense_bytes(self.dtype), timing.UNCOUNTED + timing.COUNTED
        calls = visit * [(READ * self.cache, False)] + visit * [(dense, True)]
        for budget, _ in point.quests:
            calls += 2 * visit * [(point.least_quest_bytes(budget, self.dtype), True)]
        return timing.buffers_needed(calls, REUSE * self.cache)

    def copies(self, point: Point) -> int:
        """Keys and values that rotate for SDPA; none for rows that share, as SDPA cannot."""
        if point.shared:
            return 0
        dense = point.dense_bytes(self.dtype)
        if self.record is not None:
            return timing.buffers_needed([(dense, True)], REUSE * self.cache)
        return -(-REUSE * self.cache // dense)

    def memory(self, point: Point) -> int:
        """Bytes of all that is allocated for a point."""
        dense = point.dense_bytes(self.dtype)
        pools = self.layers(point) * point.layer_bytes(self.dtype)
        buffers = (2 if self.place.on_gpu else 1) * READ * self.cache
        return pools + max(1, self.copies(point)) * dense + buffers


def planned(options: argparse.Namespace, place: Place) -> Plan:
    """The points that the options name, checked."""
    lists = checked_options(options, place, SHAPES)
    seconds = place.seconds if options.seconds is None else options.seconds
    if not 0 < seconds < float("inf"):
        raise ValueError(f"--seconds={seconds}: expected a positive number")
    shapes = [SHAPES[name] for name in options.shape or SHAPES]
    contexts = parsed_sizes("--context", options.context, CONTEXTS)
    budgets = parsed_sizes("--budget", options.budget, BUDGETS)
    rows = parsed_sizes("--rows", options.rows, (1,))
    figures = GpuFigures(lists) if place.on_gpu else Figures(lists)
    if options.quick:
        budgets = [number for number in budgets if number == figures.budget]
    for name, numbers in (("context", contexts), ("budget", budgets)):
        for number in numbers:
            if number % PAGE_SIZE or number < 2 * PAGE_SIZE:
                raise ValueError(f"--{name}={number}: expected a multiple of {PAGE_SIZE} above it")
    points = tuple(
        point
        for shape in shapes
        for context in contexts
        if not options.quick or (shape.name, context) in figures.places
        for point in _points(shape, context, rows, [b for b in budgets if b < context], figures)
    )
    points += _shuffled(points, figures)
    sharing: tuple[Point, ...] = ()
    if options.rows is None:
        if not options.quick:
            points += _batches(points)
        if not place.on_gpu if options.quick else SHARING_CONTEXT in contexts:
            sharing = tuple(
                Point(shape, SHARING_CONTEXT, SHARING_ROWS, shared=True)
                for shape in shapes
                if shape.name in SHARED_SHAPES
            )
    if not points and not sharing:
        raise ValueError("--quick: none of the summary's points is among those named")
    record = graphs.graph if place.on_gpu else None
    return Plan(points, sharing, DTYPES[options.dtype], seconds, place, figures, record)


def _points(
    shape: Shape, context: int, rows: Sequence[int], budgets: Sequence[int], figures: Figures
) -> list[Point]:
    """One shape at one context; where the figures are, also with lists for every query head."""
    quests = [(budget, figures.lists) for budget in budgets]
    grouped = shape.heads > shape.kv_heads and figures.lists != "per_query"
    if grouped and context == figures.context and figures.budget in budgets:
        quests.append((figures.budget, "per_query"))
    return [
        Point(shape, context, number, shared, tuple(quests))
        for number in rows
        for shared in ((False, True) if number > 1 else (False,))
    ]


def _shuffled(points: Sequence[Point], figures: Figures) -> tuple[Point, ...]:
    """The figures' points again, with the figures' budget, their pages in random order."""
    quests = ((figures.budget, figures.lists),)
    return tuple(
        replace(point, quests=quests, shuffled=True)
        for point in points
        if point.rows == 1
        and (point.shape.name, point.context) in figures.places
        and quests[0] in point.quests
    )


def _batches(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points of the 8B shape again, with several rows, separate and shared."""
    return tuple(
        replace(point, rows=BATCH_ROWS, shared=shared)
        for point in points
        if point.shape.name == "8b" and point.context <= ROWS_CONTEXT and not point.shuffled
        for shared in (False, True)
    )
