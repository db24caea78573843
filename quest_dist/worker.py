"""A worker: run one unit, sample by sample, and yield the records of each.

The loaded model stays in this module between units, so that the units that follow in the same
process find it. Nothing else outlives a unit. What goes wrong with one point becomes that
point's record (`error`), and the others go on; only what concerns the whole unit (the model
does not load, the process dies) leaves this module as an exception.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from quest_dist import redact
from quest_dist.plan import Point, Unit, canonical

if TYPE_CHECKING:
    from quest_dist.engine import Evaluated
    from quest_dist.models import LoadedModel, UnloadedModel
    from quest_dist.tasks.task import Sample, Task

    Evaluate = Callable[[LoadedModel | UnloadedModel, Sample, Sequence[Point]], list[Evaluated]]

#: A measured mean of attended tokens may lie this far outside what the method planned.
DENSITY_TOLERANCE = 1.0

_loaded: dict[str, LoadedModel | UnloadedModel] = {}


@dataclass(frozen=True)
class Runtime:
    """What a worker has: CPU threads and (a share of) a GPU, where it then computes."""

    threads: int = 1
    gpus: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self)


def run(unit: Mapping[str, Any], runtime: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield {"unit": key, "sample": index, "records": [...]} after each sample of a unit.

    `unit` is `Unit.to_dict()` and `runtime` `Runtime.to_dict()`.
    """
    work = Unit.from_dict(unit)
    first = work.first
    task: Task = first.task.build(
        data=first.data.build(), seed=first.seed, protocol=dict(first.protocol.settings)
    )
    loaded = _load(work, Runtime(**runtime), task.needs_weights)
    for index in work.samples:
        records = _sample(loaded, task, index, work.points)
        _release_memory(loaded)
        yield {"unit": work.key, "sample": index, "records": records}


def _load(unit: Unit, runtime: Runtime, weights: bool) -> LoadedModel | UnloadedModel:
    """The unit's model, loaded at most once in this process; an earlier one is dropped first."""
    device = "cuda" if runtime.gpus else "cpu"
    if device == "cpu":
        # Ray leaves every GPU visible to workers that asked for none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = str(runtime.threads)
    import torch

    from quest_dist import models

    torch.set_num_threads(runtime.threads)
    key = canonical([device, weights, unit.first.model.to_dict()])
    if key not in _loaded:
        _loaded.clear()
        load = models.load if weights else models.unloaded
        _loaded[key] = load(unit.first.model.settings, device)
    return _loaded[key]


def _release_memory(loaded: LoadedModel | UnloadedModel) -> None:
    """Hand what a sample has freed back to the system, and to the workers that share the GPU.

    A scheduler runs units in threads other than the main one, whose heaps glibc never trims by
    itself: without this a worker grows by a few MB a sample for as long as it lives.
    """
    if loaded.device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _sample(
    loaded: LoadedModel | UnloadedModel, task: Task, index: int, points: Sequence[Point]
) -> list[dict[str, Any]]:
    try:
        sample = task.sample(index, loaded.language)
    except Exception as error:
        return [failed(point, task.metric, index, describe(error)) for point in points]
    results = _evaluate(task, loaded, sample, points)
    return [_record(p, task, index, sample, r) for p, r in zip(points, results, strict=True)]


def _evaluate(
    task: Task, loaded: LoadedModel | UnloadedModel, sample: Sample, points: Sequence[Point]
) -> list[Evaluated | Exception]:
    """Results in the order of the points. If the batch breaks, each method is tried by itself."""
    module, _, name = task.evaluated_by.partition(":")
    evaluate: Evaluate = getattr(importlib.import_module(module), name)
    try:
        found: list[Evaluated | Exception] = list(evaluate(loaded, sample, points))
        _check_faults(loaded)
        return found
    except Exception as error:
        _check_alive(loaded)
        with contextlib.suppress(ValueError):  # of this error, not of what is tried next
            _check_faults(loaded)
        methods = {point.method.canonical() for point in points}
        if len(methods) == 1:
            return [error] * len(points)
    results_of: dict[str, Evaluated | Exception] = {}
    for method in sorted(methods):
        members = [point for point in points if point.method.canonical() == method]
        results = _evaluate(task, loaded, sample, members)
        results_of |= {point.key: result for point, result in zip(members, results, strict=True)}
    return [results_of[point.key] for point in points]


def _check_faults(loaded: LoadedModel | UnloadedModel) -> None:
    """Raise ValueError where a GPU's op met an index out of range: it went on without it, so what
    was evaluated is not what was asked for."""
    from quest_dist import faults

    faults.check_faults(loaded.device)


def _check_alive(loaded: LoadedModel | UnloadedModel) -> None:
    """Raise where an error has ended this process's use of its GPU, which only a new one gets
    back."""
    if loaded.device.type == "cuda":
        import torch

        torch.cuda.synchronize(loaded.device)


def _record(
    point: Point, task: Task, index: int, sample: Sample, result: Evaluated | Exception
) -> dict[str, Any]:
    if isinstance(result, Exception):
        return failed(point, task.metric, index, describe(result), sample)
    low, high = result.planned_low, result.planned_high
    try:
        if not low - DENSITY_TOLERANCE <= result.attended <= high + DENSITY_TOLERANCE:
            raise ArithmeticError(
                f"density differs from plan: {result.attended:.1f} tokens attended,"
                f" {low:.1f} to {high:.1f} planned"
            )
        score = float(task.score(sample, result.outcome))
        if not math.isfinite(score):
            raise ArithmeticError(f"the score is {score}")
        curve = task.curve(sample, result.outcome)
    except Exception as error:
        return failed(point, task.metric, index, describe(error), sample)
    facts = {k: float(v) for k, v in sample.info.items() if type(v) in (int, float)}
    if sample.max_new_tokens:
        facts["max_new_tokens"] = float(sample.max_new_tokens)
    if result.bytes_held:  # a time weighs nothing
        facts |= {"bytes_moved": result.bytes_moved, "bytes_held": result.bytes_held}
    found = result.outcome
    details = {"curve": curve, "notes": dict(found.notes), "drawing": found.drawing}
    return failed(point, task.metric, index, "", sample) | {
        "error": None,
        "score": score,
        "prediction": result.outcome.text,
        "attended": result.attended,
        "planned": (low + high) / 2,
        "read": result.read,
        "new_tokens": len(result.outcome.token_ids),
        "seconds": result.seconds,
        "prefill_seconds": result.prefill_seconds,
        "metrics": facts | dict(found.facts),
        "details": {name: value for name, value in details.items() if value},
    }


def failed(
    point: Point, metric: str, index: int, error: str, sample: Sample | None = None
) -> dict[str, Any]:
    """Return the record of a sample that gave no score, and why."""
    return {
        "point": point.key,
        "sample": index,
        "score": None,
        "prediction": "",
        "reference": " | ".join(sample.answers) if sample else "",
        "attended": 0.0,
        "planned": 0.0,
        "read": 0.0,
        "context_tokens": len(sample.context) if sample else 0,
        "tail_tokens": len(sample.tail) if sample else 0,
        "new_tokens": 0,
        "truncated": bool(sample and sample.truncated),
        "seconds": 0.0,
        "prefill_seconds": 0.0,
        "finished_at": time.time(),
        "error": error,
        "metric": metric,
        "metrics": {},
        "details": {},
    }


def describe(error: BaseException) -> str:
    """Return an exception as one line: its class and message, without secrets."""
    text = " ".join(redact.text(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
