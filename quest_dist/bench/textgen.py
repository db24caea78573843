"""Text generation: a whole model's decode step, dense against Quest, in latency mode in one run.

Each point is a model of random weights and a cache of random keys and values at one context length,
from which a dense and a Quest `latency.Decoder` go on, one row each, over the same pages. A call is
one step of a decoder: on a GPU one replay of its CUDA graph, timed by events of the stream; on a
CPU the same step as it stands. Both sides move on by a token a call, so pages fill as in real
decoding, and are visited in turn (`timing`).

The first `--dense-layers` layers attend to everything in both, as in the paper. A side's bytes are
those that it must read: every weight but the embeddings of other tokens, and keys, values and
metadata as in the attention benchmark. The summary is of one point, 32K tokens with a budget of
2048 in bfloat16: `quest_vs_dense_7b` is the paired ratio of the two sides' step times.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quest_dist import graphs, models, ops, timing
from quest_dist.attention import Patch, patch
from quest_dist.batch import Group
from quest_dist.bench.places import DEVICES, checked_options, chosen_place
from quest_dist.bench.report import Report
from quest_dist.cluster import available_memory
from quest_dist.decoders import MODELS, Model, continued, filled
from quest_dist.methods.full import Full
from quest_dist.methods.quest import Quest
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, PAGE_SIZE, SHAPES, parsed_sizes
from quest_dist.timing import Side, Times, paired, spread

TARGETS = {"quest_vs_dense_7b": ">= 1.7"}
#: The point of the summary.
CONTEXT, BUDGET, DTYPE = 32768, 2048, torch.bfloat16
COLUMNS = (
    *("shape", "context", "budget", "dense layers", "what", "calls"),
    *("ms", "p10", "p90", "tokens/s", "GB/s", "x dense"),
)
#: What of the free memory weights and cache may take.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Plan:
    """What to measure, and where."""

    models: tuple[Model, ...]
    contexts: tuple[int, ...]
    budget: int
    dense_layers: int
    lists: ops.Reduce
    dtype: torch.dtype
    seconds: float
    place: Place

    @property
    def accepted(self) -> tuple[int, ...]:
        """The contexts whose ratios the summary holds."""
        at = (self.budget, self.dtype) == (BUDGET, DTYPE)
        return tuple(context for context in self.contexts if at and context == CONTEXT)


@dataclass(frozen=True)
class Outcome:
    """A model at a context, and the times of its sides."""

    model: Model
    context: int
    times: Times

    @property
    def ratio(self) -> float:
        """How many times faster Quest's steps are."""
        return paired(self.times.us("dense"), self.times.us("quest"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", help=f"{', '.join(MODELS)} (default: all but tiny)"
    )
    parser.add_argument("--context", nargs="+", metavar="N", help="tokens (default: 32K)")
    parser.add_argument("--budget", metavar="N", help="Quest's budget (default: 2K)")
    parser.add_argument(
        "--dense-layers", type=int, default=2, metavar="N", help="first layers (default: 2)"
    )
    parser.add_argument(
        "--lists",
        default="max",
        help="whose pages Quest selects: max (default), mean: one list a kv head; per_query",
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)} (default: cuda where there is one and kernels are built)",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16 (default), float32; on a GPU float16 too"
    )
    parser.add_argument("--seconds", type=float, help="to time a point (default: 10, on a GPU 3)")


def run(options: argparse.Namespace) -> Report:
    """Measure; ValueError for options that cannot be, and for models larger than the memory."""
    plan = planned(options, chosen_place(options.device))
    check_memory(plan, free_memory(plan.place.device))
    outcomes = []
    for model in plan.models:
        print(f"{model.shape.name}: making {model.parameters:,} random weights", file=sys.stderr)
        made = models.random(model.sizes(max(plan.contexts)), plan.dtype, plan.place.device)
        for context in plan.contexts:
            print(f"{model.shape.name} at {context} tokens", file=sys.stderr)
            with torch.inference_mode(), patch(made, lambda rows: [], PAGE_SIZE) as patched:
                outcomes.append(Outcome(model, context, times(plan, model, context, patched)))
        del made, patched  # before the next model needs the memory
    return report(plan, outcomes)


def planned(options: argparse.Namespace, place: Place) -> Plan:
    """What the options name, checked."""
    seconds, lists = checked_options(options, place, MODELS)
    contexts = parsed_sizes("--context", options.context, (CONTEXT,))
    budget = parsed_sizes("--budget", options.budget and [options.budget], (BUDGET,))[0]
    for name, number in (("budget", budget), *(("context", one) for one in contexts)):
        if number % PAGE_SIZE:
            raise ValueError(f"--{name}={number}: expected a multiple of {PAGE_SIZE}")
    if budget >= min(contexts):
        raise ValueError(f"--budget={budget}: expected less than --context={min(contexts)}")
    chosen = tuple(MODELS[name] for name in options.shape or SHAPES)
    fewest = min(model.layers for model in chosen)
    if not 0 <= options.dense_layers < fewest:
        raise ValueError(f"--dense-layers={options.dense_layers}: expected 0..{fewest - 1}")
    return Plan(
        models=chosen,
        contexts=tuple(contexts),
        budget=budget,
        dense_layers=options.dense_layers,
        lists=lists,
        dtype=DTYPES[options.dtype],
        seconds=seconds,
        place=place,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that could be used there now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def check_memory(plan: Plan, free: int) -> None:
    """ValueError naming every model that is too large for the memory, and its sizes."""
    wanting, context = [], max(plan.contexts)
    for model in plan.models:
        weights = model.parameters * plan.dtype.itemsize
        cache = model.cache_bytes(context, plan.dtype)
        if weights + cache > MEMORY_SHARE * free:
            sizes = f"{weights / 1e9:.1f} GB of weights and {cache / 1e9:.1f} GB of cache"
            wanting.append(f"{model.shape.name} at {context} tokens needs {sizes}")
    if wanting:
        raise ValueError(
            f"--shape: {'; '.join(wanting)}; the {plan.place.device.type} has {free / 1e9:.1f} GB"
            " free: name smaller ones, as --shape 1b or tiny, --context 4K"
        )


def times(plan: Plan, model: Model, context: int, patched: Patch) -> Times:
    """The step times of the dense and the Quest decoder, and the bytes that they must read."""
    prefix = filled(patched.geometry, context, plan.place.device)
    groups = {
        "dense": Group(Full(), [0], plan.dense_layers),
        "quest": Group(Quest(gqa=plan.lists), [plan.budget], plan.dense_layers),
    }
    moved = {
        "dense": model.dense_bytes(context, plan.dtype),
        "quest": model.quest_bytes(context, plan.budget, plan.dense_layers, plan.dtype),
    }
    decoders = continued(patched, prefix, groups)
    steps = {name: decoder.step for name, decoder in decoders.items()}
    sides = [
        Side(name, {"step": lambda _, step=step: step()}, (moved[name],))  # type: ignore[misc]
        for name, step in steps.items()
    ]
    if not plan.place.on_gpu:
        return timing.measure(sides, plan.seconds)
    clocked = {name: graphs.launched(step) for name, step in steps.items()}

    def visit(side: Side) -> list[tuple[float, ...]]:
        return [(us,) for us in clocked[side.name](side.counted)]

    return timing.measure(sides, plan.seconds, visit)


def report(plan: Plan, outcomes: Sequence[Outcome]) -> Report:
    """Table, summary and targets."""
    setting = {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "page_size": PAGE_SIZE,
        "rows": 1,
        "dense_layers": plan.dense_layers,
        "lists": plan.lists,
        "models": {m.shape.name: f"{m.shape.model}, random weights" for m in plan.models},
        "data": "normal keys and values; both sides go on from the same pages",
        **plan.place.setting(),
        "transformers": importlib.metadata.version("transformers"),
        "timing": (
            "replays of a CUDA graph of the whole step, between events of the stream"
            if plan.place.on_gpu
            else "the whole step, call by call"
        ),
        "ratios": "median over cycles of the ratio of two sides' medians in the same cycle",
        "seconds_a_point": plan.seconds,
    }
    return Report(
        name="text generation: one decode step of a whole model",
        columns=COLUMNS,
        rows=[row for outcome in outcomes for row in _rows(plan, outcome)],
        summary=summary(plan, outcomes),
        setting=setting,
        targets=TARGETS,
    )


def _rows(plan: Plan, outcome: Outcome) -> list[tuple[Any, ...]]:
    found = []
    for name in ("dense", "quest"):
        us, quest = spread(outcome.times.us(name)), name == "quest"
        found.append(
            (
                outcome.model.shape.name,
                outcome.context,
                plan.budget if quest else "all",
                plan.dense_layers if quest else outcome.model.layers,
                name,
                us.calls,
                *(one / 1000 for one in us[:3]),
                1e6 / us.median,
                spread(outcome.times.rate(name)).median / 1000,
                outcome.ratio if quest else 1.0,
            )
        )
    return found


def summary(plan: Plan, outcomes: Sequence[Outcome]) -> Mapping[str, float | None]:
    """The figures by name; the ratios of models that were not measured at their point are None."""
    found: dict[str, float | None] = {f"quest_vs_dense_{name}": None for name in SHAPES}
    for outcome in outcomes:
        name = outcome.model.shape.name
        if outcome.context in plan.accepted and name in SHAPES:
            found[f"quest_vs_dense_{name}"] = outcome.ratio
            for side in ("dense", "quest"):
                found[f"{side}_ms_{name}"] = spread(outcome.times.us(side)).median / 1000
    return found
