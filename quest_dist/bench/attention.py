"""Attention: our dense and our Quest against torch SDPA and the memory's read bandwidth, one run.

Each point holds a model's attention layer at one context length. Its sides - a read of memory, our
dense, Quest at each budget, torch SDPA - are visited in turn (`timing`), so a ratio compares what
ran within the same second. Layers rotate: a call returns to a layer only after 4 x the last-level
cache of other memory was read, and the read's own buffer is 8 x that cache. Quest is timed as one
sequence of score, select and attend, and so are its parts within it. All results are checked
against torch before they are timed.

A side's bytes are those that it must read: every distinct key and value (dense, SDPA), closed
page's metadata (score), or listed key and value (attend) once, whatever it reads in fact.
`dense_vs_bandwidth` is the paired ratio of dense's GB/s to the read's at 32K of the 8B shape: the
median over cycles of (median of the visit to dense / median of the visit to read in that cycle);
`dense_vs_best_read` divides dense's median by the best single read of the whole run instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from quest_dist import ops
from quest_dist.bench import sides, timing
from quest_dist.bench.attention_table import Figures, Outcome
from quest_dist.bench.report import Report
from quest_dist.bench.shapes import (
    DTYPES,
    PAGE_SIZE,
    SHAPES,
    Point,
    Shape,
    last_level_cache,
    parsed_sizes,
)

CONTEXTS = (8192, 32768, 131072)
BUDGETS = (512, 2048, 8192)
#: The points that share a prefix, and those with several rows, have at most this context.
SHARING_CONTEXT, ROWS_CONTEXT = 8192, 32768
SHARING_ROWS, BATCH_ROWS = 26, 8
#: In units of the last-level cache: bytes between two uses of a layer, and of the read's buffer.
REUSE, READ = 4, 8


@dataclass(frozen=True)
class Plan:
    """What to measure: `points`, and `sharing`, whose rows are also timed one call each."""

    points: tuple[Point, ...]
    sharing: tuple[Point, ...]
    dtype: torch.dtype
    seconds: float
    cache: int
    figures: Figures = field(default_factory=Figures)

    def layers(self, point: Point) -> int:
        """Layers that rotate."""
        if point in self.sharing:
            return point.rows
        dense, visit = point.dense_bytes(self.dtype), timing.UNCOUNTED + timing.COUNTED
        calls = visit * [(READ * self.cache, False)] + visit * [(dense, True)]
        for budget, _ in point.quests:
            calls += visit * [(point.least_quest_bytes(budget, self.dtype), True)]
        return timing.buffers_needed(calls, REUSE * self.cache)

    def copies(self, point: Point) -> int:
        """Keys and values that rotate for SDPA; none for rows that share, as SDPA cannot."""
        if point.shared:
            return 0
        return -(-REUSE * self.cache // point.dense_bytes(self.dtype))

    def memory(self, point: Point) -> int:
        """Bytes of all that is allocated for a point."""
        dense = point.dense_bytes(self.dtype)
        pools = self.layers(point) * point.layer_bytes(self.dtype)
        return pools + max(1, self.copies(point)) * dense + READ * self.cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", help=f"models' shapes: {', '.join(SHAPES)}"
    )
    parser.add_argument("--context", nargs="+", metavar="N", help="tokens (default: 8K 32K 128K)")
    parser.add_argument(
        "--budget", nargs="+", metavar="N", help="Quest's budgets (default: 512 2K 8K)"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="N",
        help="rows of a call (default: 1, and 8 for 8b up to 32K); above 1: both prefixes",
    )
    parser.add_argument(
        "--lists",
        default="max",
        help="whose pages Quest selects: max (default), mean: one list a kv head; per_query",
    )
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default), float32")
    parser.add_argument("--threads", default=None, metavar="N", help="default: torch's")
    parser.add_argument("--seconds", type=float, default=10.0, help="to time a point (default: 10)")
    parser.add_argument("--memory", type=float, default=10.0, help="GB at most (default: 10)")
    parser.add_argument("--quick", action="store_true", help="only the points of the summary")


def run(options: argparse.Namespace) -> Report:
    """Measure; ValueError for options that cannot be."""
    size, source = last_level_cache()
    plan = planned(options, size)
    for point in (*plan.points, *plan.sharing):
        needed = plan.memory(point) / 1e9
        if needed > options.memory:
            raise ValueError(
                f"--memory={options.memory:g}: {point} needs {needed:.1f} GB; "
                "narrow --shape, --context or --rows, or allow more"
            )
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(parsed_sizes("--threads", [options.threads], ())[0])
    try:
        return measured(plan, {"last_level_cache_from": source})
    finally:
        torch.set_num_threads(before)


def planned(options: argparse.Namespace, cache: int) -> Plan:
    """The points that the options name, checked."""
    for name, value, choices in (
        ("lists", options.lists, ops.REDUCTIONS),
        ("dtype", options.dtype, tuple(DTYPES)),
        *(("shape", shape, tuple(SHAPES)) for shape in options.shape or ()),
    ):
        if value not in choices:
            raise ValueError(f"--{name}={value} is unknown; choose one of {', '.join(choices)}")
    if not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds={options.seconds}: expected a positive number")
    shapes = [SHAPES[name] for name in options.shape or SHAPES]
    contexts = parsed_sizes("--context", options.context, CONTEXTS)
    budgets = parsed_sizes("--budget", options.budget, BUDGETS)
    rows = parsed_sizes("--rows", options.rows, (1,))
    lists = next(name for name in ops.REDUCTIONS if name == options.lists)
    figures = Figures(lists=lists)
    if options.quick:
        shapes = [shape for shape in shapes if shape.name in figures.shapes]
        contexts = [number for number in contexts if number == figures.context]
        budgets = [number for number in budgets if number == figures.budget]
    for name, numbers in (("context", contexts), ("budget", budgets)):
        for number in numbers:
            if number % PAGE_SIZE or number < 2 * PAGE_SIZE:
                raise ValueError(f"--{name}={number}: expected a multiple of {PAGE_SIZE} above it")
    points = tuple(
        point
        for shape in shapes
        for context in contexts
        for point in _points(shape, context, rows, [b for b in budgets if b < context], figures)
    )
    sharing: tuple[Point, ...] = ()
    if options.rows is None:
        if not options.quick:
            points += _batches(points)
        if options.quick or SHARING_CONTEXT in contexts:
            sharing = tuple(
                Point(shape, SHARING_CONTEXT, SHARING_ROWS, shared=True)
                for shape in shapes
                if shape.name in figures.shapes
            )
    if not points and not sharing:
        raise ValueError("--quick: none of the summary's points is among those named")
    return Plan(points, sharing, DTYPES[options.dtype], options.seconds, cache, figures)


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


def _batches(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points of the 8B shape again, with several rows, separate and shared."""
    return tuple(
        replace(point, rows=BATCH_ROWS, shared=shared)
        for point in points
        if point.shape.name == "8b" and point.context <= ROWS_CONTEXT
        for shared in (False, True)
    )


def measured(plan: Plan, more: dict[str, object] | None = None) -> Report:
    """Every point of a plan, one after the other."""
    outcomes, count = [], len(plan.points) + len(plan.sharing)
    with torch.inference_mode():
        for number, point in enumerate((*plan.points, *plan.sharing), start=1):
            print(f"{number}/{count}: {point}", file=sys.stderr)
            outcomes.append(_outcome(plan, point))
    reads = [outcome.times.rate("read") for outcome in outcomes]
    shapes = dict.fromkeys(outcome.point.shape for outcome in outcomes)
    setting = {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "threads": ops.threads(),
        "instruction_set": ops.isa(),
        "torch": torch.__version__,
        "page_size": PAGE_SIZE,
        "shapes": {
            shape.name: f"{shape.model}: {shape.heads}/{shape.kv_heads} x {shape.head_dim}"
            for shape in shapes
        },
        "last_level_cache": plan.cache,
        **(more or {}),
        "buffers": (
            f"layers rotate: a call returns to a layer after at least {REUSE} x the last-level "
            f"cache of other memory was read; {READ} x for the read's own buffer"
        ),
        "page_table": "random permutation of the pool's pages",
        "data": "normal keys, values and queries; other queries, hence lists, in every layer",
        "ratios": "median over cycles of the ratio of two sides' medians in the same cycle",
        "seconds_a_point": plan.seconds,
        "layers": {str(outcome.point): plan.layers(outcome.point) for outcome in outcomes},
        "read_gbs": {
            str(outcome.point): timing.spread(read).median / 1000
            for outcome, read in zip(outcomes, reads, strict=True)
        },
    }
    return plan.figures.report(outcomes, setting)


def _outcome(plan: Plan, point: Point) -> Outcome:
    cache = sides.filled(point, plan.layers(point), plan.dtype)
    sides.check_dense(cache)
    rotation = timing.Rotation(cache.layers)
    chosen = [sides.read(READ * plan.cache)]
    if point in plan.sharing:
        chosen.append(sides.apart(cache, rotation))
    chosen.append(sides.dense(cache, rotation))
    for budget, lists in point.quests:
        chosen.append(sides.QuestStep(cache, budget, lists).side(rotation))
    if plan.copies(point):
        chosen += sides.sdpa(cache, plan.copies(point))
    return Outcome(point, timing.measure(chosen, plan.seconds))
