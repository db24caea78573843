"""Attention: our dense and our Quest against torch SDPA, FlashInfer and the memory, in one run.

Each point holds a model's attention layer at one context length. Its sides - a read of memory (on a
GPU a copy too), our dense, Quest at each budget, torch SDPA, FlashInfer where it is installed and
there is a GPU - are visited in turn (`timing`; `graphs` on a GPU), so a ratio compares what ran
within the same second. Layers rotate: a call returns to a layer only after 4 x the last-level cache
of other memory was read, and the read's own buffer is 8 x that cache. Quest is timed whole, as one
op, and once more in pieces: score, select and attend, each with its own time. All results are
checked against torch before they are timed, FlashInfer's against ours.

A side's bytes are those that it must read: every distinct key and value (dense, SDPA), closed
page's metadata (score), or listed key and value (attend) once, whatever it reads in fact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import torch

from quest_dist import attention_sides as sides
from quest_dist import graphs, machine_state, on_flashinfer, timing
from quest_dist.bench.attention_plan import Plan, planned
from quest_dist.bench.attention_table import Outcome, table
from quest_dist.bench.flashinfer_sides import FlashInferSides
from quest_dist.bench.places import DEVICES, chosen_place
from quest_dist.bench.report import Report
from quest_dist.shapes import PAGE_SIZE, SHAPES, Point, parsed_sizes
from quest_dist.timing import READ, REUSE

CALLS = "call by call"
PASSES = (
    "passes over all layers, on a GPU as replays of a graph between two events; "
    "a piece's time is what it adds to the pieces before it"
)


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
    parser.add_argument(
        "--device",
        help=f"{', '.join(DEVICES)} (default: cuda where there is one and kernels are built)",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16 (default), float32; on a GPU float16 too"
    )
    parser.add_argument("--threads", default=None, metavar="N", help="CPU's; default: torch's")
    parser.add_argument("--seconds", type=float, help="to time a point (default: 10, on a GPU 3)")
    parser.add_argument("--memory", type=float, help="GB at most (default: 10, on a GPU 40)")
    parser.add_argument("--quick", action="store_true", help="only the points of the summary")


def run(options: argparse.Namespace) -> Report:
    """Measure; ValueError for options that cannot be."""
    plan = planned(options, chosen_place(options.device))
    allowed = plan.place.memory if options.memory is None else options.memory
    for point in (*plan.points, *plan.sharing):
        needed = plan.memory(point) / 1e9
        if needed > allowed:
            raise ValueError(
                f"--memory={allowed:g}: {point} needs {needed:.1f} GB; "
                "narrow --shape, --context or --rows, or allow more"
            )
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(parsed_sizes("--threads", [options.threads], ())[0])
    try:
        return measured(plan)
    finally:
        torch.set_num_threads(before)


def measured(plan: Plan) -> Report:
    """Every point of a plan, one after the other."""
    outcomes, count = [], len(plan.points) + len(plan.sharing)
    before = machine_state.read(plan.place.gpu)
    with torch.inference_mode():
        for number, point in enumerate((*plan.points, *plan.sharing), start=1):
            print(f"{number}/{count}: {point}", file=sys.stderr)
            outcomes.append(_outcome(plan, point))
    after = machine_state.read(plan.place.gpu)
    columns, rows = table(outcomes)
    return Report(
        name="decode attention: one new token a row",
        columns=columns,
        rows=rows,
        summary=plan.figures.summary(outcomes),
        setting=_setting(plan, outcomes, machine_state.stated(before, after)),
        targets=plan.figures.targets,
    )


def _setting(plan: Plan, outcomes: list[Outcome], state: Mapping[str, object]) -> dict[str, object]:
    shapes = dict.fromkeys(outcome.point.shape for outcome in outcomes)
    hosts = {str(o.point): o.times.hosts() for o in outcomes if o.times.walls}
    without = {_no_flashinfer(plan, outcome.point) for outcome in outcomes} - {None}
    rates = {str(o.point): o.times.rate(o.bandwidth) for o in outcomes}
    return {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "page_size": PAGE_SIZE,
        "shapes": {
            shape.name: f"{shape.model}: {shape.heads}/{shape.kv_heads} x {shape.head_dim}"
            for shape in shapes
        },
        **plan.place.setting(),
        "flashinfer": "; ".join(map(str, without)) or on_flashinfer.version(),
        "buffers": (
            f"layers rotate: a call returns to a layer after at least {REUSE} x the last-level "
            f"cache of other memory was read; {READ} x for the read's own buffer"
        ),
        "page_table": "as the pool hands pages out, or a random permutation (shuffled)",
        "data": "normal keys, values and queries; other queries, hence lists, in every layer",
        "timing": CALLS if plan.record is None else PASSES,
        "contract": timing.contract(
            plan.place.on_gpu,
            warm_up=timing.WARM_UP[plan.place.device.type],
            repeats=f"cycles, {timing.FEWEST_CYCLES} to {timing.MOST_CYCLES} in the seconds given",
            tokens="one query a call; the context does not grow",
            cache=f"cold: {REUSE} x the last-level cache is read between two uses of a layer",
            graphs="on: passes of many calls are replayed" if plan.place.on_gpu else "off: a CPU",
            baseline="our dense attention on the same cache; torch SDPA; FlashInfer where it is",
        ),
        "machine_state": state,
        **({"host_us": hosts} if hosts else {}),
        "ratios": "median over cycles of the ratio of two sides' medians in the same cycle",
        "seconds_a_point": plan.seconds,
        "layers": {str(outcome.point): plan.layers(outcome.point) for outcome in outcomes},
        "bandwidth_gbs": {
            point: timing.spread(rate).median / 1000 for point, rate in rates.items()
        },
    }


def _no_flashinfer(plan: Plan, point: Point) -> str | None:
    return plan.place.no_flashinfer(plan.dtype, point.shape.head_dim)


def _outcome(plan: Plan, point: Point) -> Outcome:
    device = plan.place.device
    if plan.place.on_gpu:
        torch.cuda.empty_cache()  # of the point before, whose pieces would not fit this one's pool
    cache = sides.filled(point, plan.layers(point), plan.dtype, device)
    sides.check_dense(cache)
    rotation = timing.Rotation(cache.layers)
    chosen = [sides.read(READ * plan.cache, device)]
    if plan.place.on_gpu:
        chosen.append(sides.copy(READ * plan.cache, device))
    if point in plan.sharing:
        chosen.append(sides.apart(cache, rotation))
    chosen.append(sides.dense(cache, rotation))
    rival = FlashInferSides(cache, rotation) if _no_flashinfer(plan, point) is None else None
    if rival is not None:
        chosen += rival.dense()
    for budget, lists in point.quests:
        step = sides.QuestStep(cache, budget, lists)
        chosen += step.sides(rotation)
        if rival is not None:
            chosen.append(rival.quest(step, chosen[-1]))
    if plan.copies(point):
        chosen += sides.sdpa(cache, plan.copies(point))
    if plan.record is None:
        return Outcome(point, timing.measure(chosen, plan.seconds))
    return Outcome(point, graphs.measure_passes(chosen, plan.seconds, plan.record))
