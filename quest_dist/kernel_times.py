"""Times of one attention layer in a decode step: dense and under page rules, by its parts.

Evaluates tasks.kernels.Kernels, under the contract of `timing`. A sample is a repeat: a cache of
its own random keys, values and queries (from the point's seed and the sample), on which all points
of the unit, dense attention and a read of memory are sides in turn, so that ratios are paired.
Layers rotate, so that every call finds its pages cold. A point's time is that of the whole, one
`PreparedDecode` without a new token; its parts are timed beside it, as three ops: score, select,
attend.

Facts of a point (microseconds, medians of a repeat's calls unless they say otherwise):
    us, p5_us, p95_us, first_us   the whole; `first` is the first call of all
    wall_us                       on a GPU: the same by the host's clock
    full_us                       dense attention in the same repeat
    score_us, select_us, attend_us, pieces_us   the parts, and all three
    speedup                       dense / whole, paired; score_of_full, select_of_full,
                                  attend_of_full: part / dense, paired
    read_gbs, memory_gbs          bytes that must be read by the whole, a second; a plain read's
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from quest_dist import attention_sides, graphs, machine_state, timing
from quest_dist.attention_sides import Cache, QuestStep
from quest_dist.engine import Evaluated
from quest_dist.methods.method import Method, as_int32
from quest_dist.places import Place, place_of
from quest_dist.shapes import Point, Shape
from quest_dist.tasks.task import Outcome, Sample
from quest_dist.timing import READ, REUSE, Rotation, Side, Times, paired, spread

if TYPE_CHECKING:
    from quest_dist import plan
    from quest_dist.models import UnloadedModel

FULL, MEMORY = "full", "read"
PARTS = ("score", "select", "attend")


@dataclass(frozen=True)
class Timed:
    """A point's sides: the names of its whole and its parts (None: it attends to everything)."""

    whole: str
    pieces: str | None
    attended: float
    planned: tuple[int, int]


@torch.inference_mode()
def evaluate(
    loaded: UnloadedModel, sample: Sample, points: Sequence[plan.Point]
) -> list[Evaluated]:
    """Time one repeat of `points` (of one page size); results in their order.

    Raises ValueError for a context that is no whole number of pages.
    """
    started = time.perf_counter()
    place, context = place_of(loaded.device), len(sample.context)
    at = layer_point(loaded, context, points[0].page_size)
    methods = [point.method.build() for point in points]
    budgets = [point.budget or 0 for point in points]
    seed = 1_000_003 * points[0].seed + sample.index
    layers = buffers(at, budgets, loaded.dtype, place)
    cache = attention_sides.filled(at, layers, loaded.dtype, loaded.device, seed)
    attention_sides.check_dense(cache)
    rotation = Rotation(layers)
    dense = replace(attention_sides.dense(cache, rotation), name=FULL)
    sides = [attention_sides.read(READ * place.cache, loaded.device), dense]
    timed = []
    for method, budget in zip(methods, budgets, strict=True):
        timed.append(_sides(cache, rotation, method, budget, sides))
    filled = time.perf_counter()
    before = machine_state.read(place.gpu)
    warm_up = timing.warm_up(sample.info["warm_up"], loaded.device.type)
    times = _measure(sides, place, warm_up, int(sample.info["cycles"]))
    facts, notes = machine_state.between(before, machine_state.read(place.gpu))
    facts["layers"] = float(layers)
    share = (time.perf_counter() - filled) / len(points)
    notes = {**stated(place, loaded, sample, warm_up), **notes}
    return [
        Evaluated(
            outcome=Outcome("", facts=measured(times, each) | facts, notes=notes),
            attended=each.attended,
            read=each.attended,
            planned_low=float(each.planned[0]),
            planned_high=float(each.planned[1]),
            seconds=share,
            prefill_seconds=filled - started,
        )
        for each in timed
    ]


def layer_point(loaded: UnloadedModel, context: int, page_size: int) -> Point:
    """One row of one layer of a model's attention."""
    if context % page_size:
        raise ValueError(f"context={context} is no multiple of page_size={page_size}")
    sizes = loaded.shape
    heads = (int(sizes[name]) for name in ("heads", "kv_heads", "head_dim"))
    return Point(Shape(loaded.label, loaded.label, *heads), context, page_size=page_size)


def buffers(at: Point, budgets: Sequence[int], dtype: torch.dtype, place: Place) -> int:
    """Layers that rotate: a call returns to one after REUSE x the cache was read elsewhere."""
    dense_bytes = at.dense_bytes(dtype)
    sparse = [at.least_quest_bytes(budget, dtype) for budget in budgets if 0 < budget < at.context]
    if place.on_gpu:  # a pass is of one side, and its shortest record only scores
        least = at.score_bytes(dtype) if sparse else dense_bytes
        return timing.buffers_needed([(max(1, least), True)], REUSE * place.cache)
    visit = timing.UNCOUNTED + timing.COUNTED
    calls = visit * [(READ * place.cache, False)] + visit * [(dense_bytes, True)]
    for size in sparse:
        calls += 2 * visit * [(size, True)]
    # In warm-up, and where there is one side, calls of one kind follow each other.
    return timing.buffers_needed(calls, REUSE * place.cache)


def _sides(
    cache: Cache, rotation: Rotation, method: Method, budget: int, sides: list[Side]
) -> Timed:
    """Add a point's sides unless they are there, and say which are its own."""
    rule, at = method.rule_alone(), cache.point
    pages = -1
    if rule.keep is not None:
        budgets = as_int32([budget], cache.lengths.device)
        pages = int(rule.keep(cache.lengths[:1], budgets, at.page_size)[0])
    planned = method.planned(at.context, budget, at.page_size, 0)
    if pages < 0:
        return Timed(FULL, None, float(at.context), planned)
    step = QuestStep(cache, pages * at.page_size, rule.reduce, rule.radius_scale)
    name = f"{pages} {rule.reduce} {rule.radius_scale:g}"
    if not any(side.name == f"whole {name}" for side in sides):
        whole, pieces = step.sides(rotation)
        sides += [replace(whole, name=f"whole {name}"), replace(pieces, name=f"pieces {name}")]
    attended = float(step.whole(0).attended.float().mean())
    return Timed(f"whole {name}", f"pieces {name}", attended, planned)


def _measure(sides: Sequence[Side], place: Place, warm_up: int, cycles: int) -> Times:
    if place.on_gpu:
        return graphs.measure_passes(sides, 0.0, graphs.graph, warm_up=warm_up, cycles=cycles)
    return timing.measure(sides, 0.0, warm_up=warm_up, cycles=cycles)


def measured(times: Times, timed: Timed) -> dict[str, float]:
    """A point's facts, as the module says."""
    full, whole = times.us(FULL), times.us(timed.whole)
    us = spread(whole)
    found = {
        "us": us.median,
        "p5_us": us.p5,
        "p95_us": us.p95,
        "first_us": times.first[timed.whole],
        "full_us": spread(full).median,
        "speedup": paired(full, whole),
        "read_gbs": spread(times.rate(timed.whole)).median / 1000,
        "memory_gbs": spread(times.rate(MEMORY)).median / 1000,
        "calls": float(us.calls),
    }
    if times.walls.get(timed.whole):
        found["wall_us"] = spread([[wall] for wall in times.walls[timed.whole]]).median
    if timed.pieces is None:
        return found | {"attend_us": us.median, "pieces_us": us.median, "attend_of_full": 1.0}
    found["pieces_us"] = spread(times.us(timed.pieces)).median
    for part in PARTS:
        part_us = times.us(timed.pieces, part)
        found[f"{part}_us"] = spread(part_us).median
        found[f"{part}_of_full"] = paired(part_us, full)
    return found


def stated(place: Place, loaded: UnloadedModel, sample: Sample, warm_up: int) -> Mapping[str, str]:
    """What a time's reader must know: place, shape, and how it was taken."""
    sizes = loaded.shape
    return {
        "device": place.label,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "shape": f"{sizes['heads']}/{sizes['kv_heads']} heads x {sizes['head_dim']}",
    } | timing.contract(
        place.on_gpu,
        warm_up=warm_up,
        repeats=f"a sample each; {sample.info['cycles']} visits of {timing.COUNTED} calls",
        tokens="one query a call; the context does not grow",
        cache=(
            f"cold: layers rotate, and a call returns to one after at least {REUSE} x the"
            f" last-level cache ({place.cache / 2**20:g} MiB) of other memory"
        ),
        graphs="on: passes of many calls are replayed" if place.on_gpu else "off: a CPU",
        baseline="dense attention by the same op on the same cache, a side of the same repeat",
    )
