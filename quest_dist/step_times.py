"""Times of a whole model's decode step, in latency mode: random weights, random keys and values.

Evaluates tasks.textgen.TextGen and serves `bench textgen`, under the contract of `timing`. A repeat
makes a decoder for every side, all going on from the pages of one context; each decodes `warm_up`
tokens that do not count, the first of them apart, and then `steps` that do, in visits of VISIT
steps, sides in turn. Tokens are what the random model likes; none ends a row. The context grows by
one token a step, from its length to that and all steps. On a GPU a step is a replay of its CUDA
graph, and each visit has one more step, which is not counted.

Facts of a point (milliseconds, medians of a repeat's steps unless they say otherwise):
    ms, p5_ms, p95_ms, first_ms   a step; `first` is the first one of all
    wall_ms                       on a GPU: the same by the host's clock
    full_ms, speedup              dense in the same repeat; dense / this, paired
    read_gb, read_gbs             bytes that a step must read, and a second
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from quest_dist import graphs, machine_state, models, timing
from quest_dist.attention import Patch, patch
from quest_dist.batch import Group
from quest_dist.decoders import Model, check_step, continued, filled, pages_needed
from quest_dist.engine import Evaluated
from quest_dist.latency import Decoder
from quest_dist.methods.full import Full
from quest_dist.places import Place, place_of
from quest_dist.pool import Rows
from quest_dist.tasks.task import Outcome, Sample
from quest_dist.tasks.textgen import VISIT
from quest_dist.timing import Side, Times, paired, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quest_dist import plan
    from quest_dist.models import UnloadedModel

FULL = "full"
#: Positions of the models made here: more than any context timed.
POSITIONS = 1 << 20

_weights: dict[tuple[int, int], PreTrainedModel] = {}


def steps_needed(steps: int, warm_up: int) -> int:
    """Steps that a decoder makes in a repeat, those of a GPU's visits that do not count too."""
    return warm_up + 1 + -(-steps // VISIT) * (VISIT + 1)


@torch.inference_mode()
def evaluate(
    loaded: UnloadedModel, sample: Sample, points: Sequence[plan.Point]
) -> list[Evaluated]:
    """Time one repeat of `points` (of one page size); results in their order.

    Raises ValueError for a model whose shape lacks what a whole step needs.
    """
    started = time.perf_counter()
    bits = sample.info.get("weight_bits") or loaded.weight_bits
    place, model = place_of(loaded.device), Model.of(loaded.label, loaded.shape, bits)
    context, page_size = len(sample.context), points[0].page_size
    steps = int(sample.info["steps"])
    warm_up = timing.warm_up(sample.info["warm_up"], loaded.device.type)
    groups = {FULL: Group(Full(), [0], 0)}
    moved = {FULL: model.dense_bytes(context, loaded.dtype)}
    names = []
    for point in points:
        names.append(_name(point))
        if point.budget is not None:
            method = point.method.build()
            groups[names[-1]] = Group(method, [point.budget], point.dense_layers)
            moved[names[-1]] = model.quest_bytes(
                context, point.budget, point.dense_layers, loaded.dtype, page_size
            )
    with patch(weights(loaded, model), lambda rows: [], page_size) as patched:
        pages = pages_needed(context, len(groups), steps_needed(steps, warm_up), page_size)
        seed = 1_000_003 * points[0].seed + sample.index
        prefix = filled(patched.geometry, context, loaded.device, pages, page_size, seed)
        filled_at = time.perf_counter()
        before = machine_state.read(place.gpu)
        times, kept = repeat(patched, prefix, groups, moved, place, steps=steps, warm_up=warm_up)
    facts, notes = machine_state.between(before, machine_state.read(place.gpu))
    share = (time.perf_counter() - filled_at) / len(points)
    how = contract(place, context, steps, warm_up, moved[FULL], "a sample each")
    notes = {**stated(place, loaded, bits), **how, **notes}
    return [
        Evaluated(
            outcome=Outcome("", facts=measured(times, name) | facts, notes=notes),
            attended=kept[name][0],
            read=kept[name][0],
            planned_low=kept[name][1],
            planned_high=kept[name][2],
            seconds=share,
            prefill_seconds=filled_at - started,
        )
        for name in names
    ]


def _name(point: plan.Point) -> str:
    if point.budget is None:
        return FULL
    return f"{point.method.canonical()} {point.budget} {point.dense_layers}"


def weights(loaded: UnloadedModel, model: Model) -> PreTrainedModel:
    """The model's random weights, made at their first use and kept as long as `loaded` is."""
    known = id(loaded), model.weight_bits
    if known not in _weights:
        _weights.clear()  # before the next ones need the memory
        _weights[known] = models.random(
            model.sizes(POSITIONS), loaded.dtype, loaded.device, model.weight_bits
        )
        weakref.finalize(loaded, _weights.pop, known, None)
    return _weights[known]


def repeat(
    patched: Patch,
    prefix: Rows,
    groups: Mapping[str, Group],
    moved: Mapping[str, int],
    place: Place,
    *,
    steps: int,
    warm_up: int,
) -> tuple[Times, dict[str, tuple[float, float, float]]]:
    """Step times of a decoder a group, all going on from `prefix`, and what each attended to at its
    last step: (mean, fewest planned, most planned), as `decoders.check_step` says."""
    length = prefix.lengths_list[0]
    made = continued(patched, prefix, groups, steps_needed(steps, warm_up))
    sides = [
        Side(name, {"step": _step(decoder)}, (moved[name],), uncounted=0, counted=VISIT)
        for name, decoder in made.items()
    ]
    cycles = -(-steps // VISIT)
    if place.on_gpu:
        clocked = {name: graphs.Launched(decoder.step) for name, decoder in made.items()}
        walls: dict[str, list[float]] = {name: [] for name in made}

        def visit(side: Side) -> list[tuple[float, ...]]:
            calls: list[tuple[float, ...]] = [(us,) for us in clocked[side.name](side.counted)]
            walls[side.name].append(clocked[side.name].wall)
            return calls

        times = timing.measure(sides, 0.0, visit, warm_up=warm_up, cycles=cycles)
        times.walls.update({name: found[1:] for name, found in walls.items()})
    else:
        times = timing.measure(sides, 0.0, warm_up=warm_up, cycles=cycles)
    kept = {}
    for name, decoder in made.items():
        done = int(decoder.lengths[0])
        assert length < done <= length + steps_needed(steps, warm_up)
        kept[name] = check_step(decoder, groups[name], done)
        decoder.release()
    return times, kept


def _step(decoder: Decoder) -> timing.Step:
    return lambda _: decoder.step()


def measured(times: Times, name: str) -> dict[str, float]:
    """A point's facts, as the module says."""
    ms = spread(times.us(name))
    moved = sum(times.moved[name].values())
    found = {
        "ms": ms.median / 1000,
        "p5_ms": ms.p5 / 1000,
        "p95_ms": ms.p95 / 1000,
        "first_ms": times.first[name] / 1000,
        "full_ms": spread(times.us(FULL)).median / 1000,
        "speedup": paired(times.us(FULL), times.us(name)),
        "read_gb": moved / 1e9,
        "read_gbs": spread(times.rate(name)).median / 1000,
        "calls": float(ms.calls),
    }
    if times.walls.get(name):
        found["wall_ms"] = spread([[wall] for wall in times.walls[name]]).median / 1000
    return found


def stated(place: Place, loaded: UnloadedModel, weight_bits: int) -> dict[str, str]:
    """What a time's reader must know first."""
    shape = loaded.shape
    return {
        "device": place.label,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "shape": (
            f"{shape['layers']} layers, {shape['heads']}/{shape['kv_heads']} heads x"
            f" {shape['head_dim']}, random weights"
        ),
        "weights": f"{weight_bits} bits",
    }


def contract(
    place: Place, context: int, steps: int, warm_up: int, dense_bytes: int, repeats: str
) -> dict[str, str]:
    """How whole steps were timed."""
    last = context + steps_needed(steps, warm_up) if place.on_gpu else context + steps + warm_up
    return timing.contract(
        place.on_gpu,
        warm_up=warm_up,
        repeats=f"{repeats}, each going on from the context anew",
        tokens=(f"{steps} counted, end tokens ignored; the context grows from {context} to {last}"),
        cache=(
            f"as decoding leaves it: a step reads {_outgrown(dense_bytes, place.cache)} last-level"
            f" cache ({place.cache / 2**20:g} MiB)"
        ),
        graphs="on: the whole step is one graph" if place.on_gpu else "off: a CPU",
        baseline="dense attention through the same decoder, a side of the same repeat",
    )


def _outgrown(size: int, cache: int) -> str:
    for times in (1000, 100, 10, 4, 1):
        if size > times * cache:
            return f"more than {times} x the" if times > 1 else "more than the"
    return "less than the"
