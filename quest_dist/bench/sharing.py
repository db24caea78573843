"""Sharing: the points of one task as rows of one batch, against the same points one at a time.

Both sides run the same engine on the same samples in the same process: shared, each sample is
prefilled once and all points decode as one batch; alone, every point prefills and decodes by
itself, as every other tool does. Model loading and sample making are outside both clocks.

These are seconds of whole evaluations, one run of each side, not latencies: of the contract of
`timing` they keep the synchronised clock, the baseline through the same code and the machine's
state, and have neither warm-up nor repeats.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from quest_dist import compose, engine, machine_state, models, ops, prepare
from quest_dist.bench.report import Report
from quest_dist.engine import Evaluated
from quest_dist.plan import Point
from quest_dist.tasks.task import Sample, Task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this benchmark."""
    parser.add_argument("--task", default="qasper", help="a task of the sweep (default: qasper)")
    parser.add_argument("--sweep", default="longbench_budgets", help="whose points to run")
    parser.add_argument("--samples", type=int, default=1, help="samples to run (default: 1)")
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default): equal tokens are promised; bfloat16"
    )
    parser.add_argument("overrides", nargs="*", help="further overrides of the sweep")


def run(options: argparse.Namespace) -> Report:
    """Measure both sides; ValueError for names that the sweep does not know."""
    if options.samples < 1:
        raise ValueError(f"--samples={options.samples}: at least 1")
    config = compose.composed(
        [
            f"+sweep={options.sweep}",
            f"grid.task=[{options.task}]",
            *options.overrides,
        ]
    )
    for name in config["grid"]["model"]:
        config["model"][name]["dtype"] = options.dtype
    points = prepare.prepare(config).points
    loaded = models.load(points[0].model.settings)
    first = points[0]
    task: Task = first.task.build(
        data=first.data.build(), seed=first.seed, protocol=dict(first.protocol.settings)
    )
    samples = [task.sample(index, loaded.language) for index in range(options.samples)]
    before = machine_state.read()
    shared_seconds, shared = _timed(loaded, samples, [points])
    alone_seconds, alone = _timed(loaded, samples, [[point] for point in points])
    state = machine_state.stated(before, machine_state.read())
    both = (shared_seconds, shared), (alone_seconds, alone)
    return _report(options, task, samples, points, *both, state)


def _timed(
    loaded: models.LoadedModel, samples: Sequence[Sample], batches: Sequence[Sequence[Point]]
) -> tuple[float, list[list[Evaluated]]]:
    """Wall seconds, and for each sample the results of all points in order."""
    seconds, results = 0.0, []
    for sample in samples:
        found: list[Evaluated] = []
        for batch in batches:
            start = time.perf_counter()
            found += engine.evaluate(loaded, sample, batch)
            seconds += time.perf_counter() - start
            print(f"sample {sample.index}: {len(found)} points, {seconds:.0f} s", file=sys.stderr)
        results.append(found)
    return seconds, results


def _report(
    options: argparse.Namespace,
    task: Task,
    samples: Sequence[Sample],
    points: Sequence[Point],
    shared: tuple[float, list[list[Evaluated]]],
    alone: tuple[float, list[list[Evaluated]]],
    state: Mapping[str, object],
) -> Report:
    rows: list[tuple[Any, ...]] = []
    scores_equal = tokens_equal = True
    for number, point in enumerate(points):
        pairs = [(s[number], a[number]) for s, a in zip(shared[1], alone[1], strict=True)]
        scores = [
            tuple(task.score(sample, side.outcome) for side in pair)
            for sample, pair in zip(samples, pairs, strict=True)
        ]
        same = all(one.outcome.token_ids == other.outcome.token_ids for one, other in pairs)
        tokens_equal &= same
        scores_equal &= all(one == other for one, other in scores)
        mean = [sum(side) / len(samples) for side in zip(*scores, strict=True)]
        seconds = sum(other.prefill_seconds + other.seconds for _, other in pairs)
        budget = "all" if point.budget is None else point.budget
        rows.append((point.method.name, budget, *mean, same, seconds))
    tokens = [len(sample.context) + len(sample.tail) for sample in samples]
    return Report(
        name=f"{len(points)} points of {options.task}: shared rows against one at a time",
        columns=("method", "budget", "score shared", "score alone", "same tokens", "seconds alone"),
        rows=rows,
        summary={
            "speedup": alone[0] / shared[0],
            "equal_scores": scores_equal,
            "equal_tokens": tokens_equal,
            "seconds_shared": shared[0],
            "seconds_alone": alone[0],
            "points": len(points),
            "samples": len(samples),
        },
        setting={
            "sweep": options.sweep,
            "task": options.task,
            "dtype": options.dtype,
            "prompt_tokens": tokens,
            "threads": ops.threads(),
            "machine_state": state,
        },
    )
