"""Text generation: a whole model's decode step, dense against Quest, in latency mode in one run.

Each point is a model of random weights and a cache of random keys and values at one context length,
from which a dense and a Quest `latency.Decoder` go on, one row each, over the same pages. A call is
one step of a decoder: on a GPU one replay of its CUDA graph, timed by events of the stream; on a
CPU the same step as it stands. Both sides move on by a token a call, so pages fill as in real
decoding, and are visited in turn. A repeat (`--repeats`) decodes a fixed number of tokens
(`--steps`) from the same context anew; `step_times` and `timing` say what each number is.

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

from quest_dist import machine_state, models, ops, step_times
from quest_dist.attention import Patch, patch
from quest_dist.batch import Group
from quest_dist.bench.places import DEVICES, checked_options, chosen_place
from quest_dist.bench.report import Report
from quest_dist.cluster import available_memory
from quest_dist.decoders import MODELS, Model, filled, pages_needed
from quest_dist.methods.full import Full
from quest_dist.methods.quest import Quest
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, PAGE_SIZE, SHAPES, parsed_sizes
from quest_dist.tasks.textgen import VISIT
from quest_dist.timing import WARM_UP, Times, joined, paired, spread

TARGETS = {"quest_vs_dense_7b": ">= 1.7"}
#: The point of the summary.
CONTEXT, BUDGET, DTYPE = 32768, 2048, torch.bfloat16
COLUMNS = (
    *("shape", "context", "budget", "dense layers", "what", "calls"),
    *("ms", "p5", "p10", "p90", "p95", "low", "high", "first"),
    *("tokens/s", "GB/s", "x dense"),
)
#: Counted tokens of a repeat where none are named; the paper's 256 on a GPU.
STEPS = {"cpu": 8, "cuda": 256}
FEWEST_REPEATS = 5
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
    steps: int
    repeats: int
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
        return paired(self.times.us("full"), self.times.us("quest"))


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
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="counted tokens of a repeat (default: 8, on a GPU 256)",
    )
    parser.add_argument(
        "--repeats", type=int, default=6, metavar="N", help="at least 5 (default: 6)"
    )


def run(options: argparse.Namespace) -> Report:
    """Measure; ValueError for options that cannot be, and for models larger than the memory."""
    plan = planned(options, chosen_place(options.device))
    check_memory(plan, free_memory(plan.place.device))
    outcomes, before = [], machine_state.read(plan.place.gpu)
    for model in plan.models:
        print(f"{model.shape.name}: making {model.parameters:,} random weights", file=sys.stderr)
        made = models.random(model.sizes(step_times.POSITIONS), plan.dtype, plan.place.device)
        for context in plan.contexts:
            print(f"{model.shape.name} at {context} tokens", file=sys.stderr)
            with torch.inference_mode(), patch(made, lambda rows: [], PAGE_SIZE) as patched:
                outcomes.append(Outcome(model, context, times(plan, model, context, patched)))
        del made, patched  # before the next model needs the memory
    after = machine_state.read(plan.place.gpu)
    return report(plan, outcomes, machine_state.stated(before, after))


def planned(options: argparse.Namespace, place: Place) -> Plan:
    """What the options name, checked."""
    lists = checked_options(options, place, MODELS)
    steps = STEPS[place.device.type] if options.steps is None else options.steps
    if steps < VISIT or steps % VISIT:
        raise ValueError(f"--steps={steps}: expected a positive multiple of {VISIT}")
    if options.repeats < FEWEST_REPEATS:
        raise ValueError(f"--repeats={options.repeats}: expected at least {FEWEST_REPEATS}")
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
        steps=steps,
        repeats=options.repeats,
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
        steps = step_times.steps_needed(plan.steps, WARM_UP[plan.place.device.type])
        cache = model.cache_bytes(context, plan.dtype, 2, steps)
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
    groups = {
        "full": Group(Full(), [0], plan.dense_layers),
        "quest": Group(Quest(gqa=plan.lists), [plan.budget], plan.dense_layers),
    }
    moved = {
        "full": model.dense_bytes(context, plan.dtype),
        "quest": model.quest_bytes(context, plan.budget, plan.dense_layers, plan.dtype),
    }
    warm_up = WARM_UP[plan.place.device.type]
    steps = step_times.steps_needed(plan.steps, warm_up)
    pages = pages_needed(context, len(groups), steps)
    prefix = filled(patched.geometry, context, plan.place.device, pages)
    how = {"steps": plan.steps, "warm_up": warm_up}
    repeats = [
        step_times.repeat(patched, prefix, groups, moved, plan.place, **how)[0]
        for _ in range(plan.repeats)
    ]
    return joined(repeats)


def report(plan: Plan, outcomes: Sequence[Outcome], state: Mapping[str, object]) -> Report:
    """Table, summary and targets."""
    setting: dict[str, object] = {
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
        "ratios": "median over repeats of the ratio of two sides' medians in the same repeat",
        "contract": {
            f"{outcome.model.shape.name} at {outcome.context}": step_times.contract(
                plan.place,
                outcome.context,
                plan.steps,
                WARM_UP[plan.place.device.type],
                outcome.model.dense_bytes(outcome.context, plan.dtype),
                f"{plan.repeats} of all sides",
            )
            for outcome in outcomes
        },
        "machine_state": state,
    }
    if plan.place.on_gpu:
        setting["host_us"] = {
            f"{outcome.model.shape.name} at {outcome.context}": outcome.times.hosts()
            for outcome in outcomes
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
    for name in ("full", "quest"):
        us, quest = spread(outcome.times.us(name)), name == "quest"
        found.append(
            (
                outcome.model.shape.name,
                outcome.context,
                plan.budget if quest else "all",
                plan.dense_layers if quest else outcome.model.layers,
                "quest" if quest else "dense",
                us.calls,
                *(one / 1000 for one in us[:7]),
                outcome.times.first[name] / 1000,
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
            for word, side in (("dense", "full"), ("quest", "quest")):
                found[f"{word}_ms_{name}"] = spread(outcome.times.us(side)).median / 1000
    return found
