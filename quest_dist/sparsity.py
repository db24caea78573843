"""Evaluate a sample with one sparse layer at a time: rows are points x layers over one prefill.

In each row a method is active in one layer and all others are dense. Every batch carries a dense
row too, and a row is compared with that of its own batch, so that nothing but the method differs:
a budget that holds everything gives exactly 0. A batch has at most MOST_ROWS rows, which bounds its
memory, as each holds a tail of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from quest_dist import artefacts
from quest_dist.attention import patch
from quest_dist.batch import Group, Measured
from quest_dist.cost import MOST_ROWS
from quest_dist.engine import Evaluated, built, check_sample, decode, now, prefill
from quest_dist.methods.full import Full
from quest_dist.tasks.task import Outcome, Sample

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point


@dataclass
class _Sparse:
    """Rows of one method in one layer, and the points that they belong to."""

    layer: int
    points: list[int]
    group: Group


@torch.inference_mode()
def evaluate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[Evaluated]:
    """Run `sample` for `points` (same model, task and page size); results in their order.

    An outcome's curve is (layer, mean nats a token above the dense row); its fact `dense_nll` is
    the dense row's mean. Layers below a point's `dense_layers` are left out; a point without a
    budget is dense in every layer, and its curve 0. Attended and planned tokens are means over the
    sparse layers. Raises ValueError for a sample that cannot be decoded, for layers that the model
    lacks, and where none are left.
    """
    check_sample(sample, loaded.language.max_length)
    page_size = points[0].page_size
    for point in points:
        artefacts.ready(loaded, point.method)  # made from the model as it is, not patched
    with patch(loaded.model, lambda rows: [], page_size) as patched:
        layers = _layers(points, patched.geometry.layers)
        sparse = list(_one_layer_each(loaded, points, layers))
        started = now(loaded.device)
        rows = min(MOST_ROWS, 1 + sum(len(each.points) for each in sparse))
        prefix = prefill(loaded, patched, sample, [each.group for each in sparse], rows)
        prefilled = now(loaded.device)
        curves: list[dict[int, float]] = [{} for _ in points]
        measured: list[list[Measured]] = [[] for _ in points]
        dense: list[float] = []
        for part in _batches(sparse):
            owners = [number for each in part for number in each.points]
            where = [each.layer for each in part for _ in each.points]
            batch = prefix.fork([Group(Full(), [0], 0), *(each.group for each in part)])
            decoded, counted = decode(loaded, sample, batch, [-1, *owners])
            batch.rows.keep(())
            base, *increased = (sum(row.nll) / len(row.nll) for row in decoded)
            dense.append(base)
            for owner, layer, nll, seen in zip(owners, where, increased, counted[1:], strict=True):
                curves[owner][layer] = nll - base
                measured[owner].append(seen)
            for owner, known in enumerate(points):
                if known.budget is None:
                    curves[owner] = dict.fromkeys(layers[owner], 0.0)
                    measured[owner] = counted[:1]
        finished = now(loaded.device)
    return [
        _evaluated(curve, seen, dense, prefilled - started, (finished - prefilled) / len(points))
        for curve, seen in zip(curves, measured, strict=True)
    ]


def _layers(points: Sequence[Point], count: int) -> list[list[int]]:
    """The layers that each point is measured in."""
    asked = points[0].task.settings.get("layers")
    if asked is not None and max(asked) >= count:
        raise ValueError(f"task.layers={list(asked)}: the model has layers 0..{count - 1}")
    found = []
    for point in points:
        mine = [n for n in (asked or range(count)) if n >= point.dense_layers]
        if not mine:
            raise ValueError(f"dense_layers={point.dense_layers} leaves no layer to measure")
        found.append(mine)
    return found


def _one_layer_each(
    loaded: LoadedModel, points: Sequence[Point], layers: Sequence[list[int]]
) -> Iterator[_Sparse]:
    """Rows of one method and layer after another, ordered by layer: those before and after a
    batch's sparse rows are dense, and attend in few calls."""
    methods: dict[str, list[int]] = {}
    for number, point in enumerate(points):
        if point.budget is not None:
            methods.setdefault(point.method.canonical(), []).append(number)
    for layer in sorted({layer for mine in layers for layer in mine}):
        for members in methods.values():
            here = [number for number in members if layer in layers[number]]
            for first in range(0, len(here), MOST_ROWS - 1):
                part = here[first : first + MOST_ROWS - 1]
                budgets = [points[number].budget or 0 for number in part]
                group = Group(built(loaded, points[part[0]].method), budgets, layer, layer + 1)
                yield _Sparse(layer, part, group)


def _batches(sparse: Sequence[_Sparse]) -> Iterator[list[_Sparse]]:
    """Groups of rows, at most MOST_ROWS with the dense one; one empty batch where there are
    none."""
    batch: list[_Sparse] = []
    rows = 1
    for each in sparse:
        if rows + len(each.points) > MOST_ROWS:
            yield batch
            batch, rows = [], 1
        batch.append(each)
        rows += len(each.points)
    yield batch


def _evaluated(
    curve: dict[int, float],
    measured: Sequence[Measured],
    dense: Sequence[float],
    prefill_seconds: float,
    seconds: float,
) -> Evaluated:
    steps = sum(seen.steps for seen in measured)
    return Evaluated(
        outcome=Outcome(
            text="",
            curve=tuple((float(layer), curve[layer]) for layer in sorted(curve)),
            facts={"dense_nll": sum(dense) / len(dense)},
        ),
        attended=sum(seen.attended for seen in measured) / steps,
        read=sum(seen.read for seen in measured) / steps,
        planned_low=sum(seen.planned_low for seen in measured) / steps,
        planned_high=sum(seen.planned_high for seen in measured) / steps,
        seconds=seconds,
        prefill_seconds=prefill_seconds,
    )
