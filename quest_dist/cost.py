"""What a unit costs: seconds and bytes, from the model's shape or from what the ledger measured.

Estimates, for ordering, slicing and for telling a user what to expect; no result depends on them.
A prefill is bound by arithmetic (2 FLOPs a parameter and token, and causal attention), a decode
step by reading the weights once for all rows and each row's tokens, plus a fixed cost a row and
layer. The constants below are for a common machine and may be off by a factor of two or three;
as soon as the ledger has measured a model on a task, its own pace replaces them. A task whose
samples are something else says what they cost (`Task.cost`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quest_dist.plan import Point, Unit
from quest_dist.tasks.task import Cost, Speed
from quest_dist.tasks.textgen import PACKED_BYTES

CPU_FLOPS = 3.2e11  # a core with bf16 matrix units, in long prefills
CPU_BYTES = 1.2e10  # a core, reading weights and pages
CPU_ROW_LAYER = 8e-5  # seconds a row, layer and step: selection and attention calls
GPU_FLOPS = 2e14
GPU_BYTES = 1.5e12
GPU_ROW_LAYER = 1e-5
PROCESS_BYTES = 700 * 2**20  # Python with torch and transformers loaded
ACTIVATION_BYTES = 128  # a token and hidden unit of a prefill, at its peak
MOST_ROWS = 256  # of one batch (quest_dist.sparsity cuts its rows to as many)
DEFAULT_CONTEXT = 4096
TAIL_TOKENS = 40
NEW_TOKENS = 32
#: What a model is taken for that states no shape in its YAML: 7 billion parameters, as Llama 2.
DEFAULT_SHAPE: Mapping[str, int] = {
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "hidden": 4096,
    "vocab": 32000,
    "parameters": 6_738_000_000,
    "max_length": 32768,
}


@dataclass(frozen=True)
class Extent:
    """Tokens of one sample: prefilled context and decode steps (tail and generated)."""

    context: int
    steps: int


def extent(point: Point) -> Extent:
    """Return the size of a point's samples as its task states it, or a usual one."""
    task, data = point.task.settings, point.data.settings
    limit = int(shape(point)["max_length"])
    if "prefill" in task and "tokens" in task:
        return Extent(min(int(task["prefill"]), limit), int(task["tokens"]))
    length = task.get("length") or data.get("length") or data.get("tokens") or DEFAULT_CONTEXT
    new = task.get("max_new_tokens") or NEW_TOKENS
    return Extent(min(int(length), limit), TAIL_TOKENS + int(new))


def batch_rows(points: Sequence[Point]) -> int:
    """Return the rows that points take: one each, or one a layer where a task measures layers."""
    task = points[0].task.settings
    if "layers" not in task:
        return len(points)
    return len(points) * len(task["layers"] or range(int(shape(points[0])["layers"])))


def shape(point: Point) -> dict[str, Any]:
    """Return the planning facts of a point's model."""
    return {**DEFAULT_SHAPE, **(point.model.settings.get("shape") or {})}


def sample_seconds(
    points: tuple[Point, ...],
    threads: int,
    gpu: bool,
    pace: Callable[[str, str], tuple[float, float] | None] = lambda model, task: None,
) -> float:
    """Return the seconds of one sample for these points (of one family) in one batch."""
    first = points[0]
    measured = pace(first.model.name, first.task.name)
    if measured is not None:
        prefill, row = measured
        return prefill + row * len(points)
    said = _said(points, threads, gpu)
    if said is not None:
        return said.seconds
    facts, size = shape(first), extent(first)
    flops = GPU_FLOPS if gpu else CPU_FLOPS * threads
    rate = GPU_BYTES if gpu else CPU_BYTES * threads
    row_layer = GPU_ROW_LAYER if gpu else CPU_ROW_LAYER / threads
    layers, parameters = int(facts["layers"]), int(facts["parameters"])
    mixed = 2 * layers * int(facts["heads"]) * int(facts["head_dim"])
    prefill = (2 * parameters * size.context + mixed * size.context**2) / flops
    rows = batch_rows(points)
    read = sum(min(p.budget or size.context, size.context) for p in points)
    if rows > len(points):  # one layer is sparse, the others read everything
        read = rows * size.context
    step = (weight_bytes(first) + read * token_bytes(first)) / rate
    step += 2 * parameters * rows / flops + row_layer * layers * rows
    return prefill + step * size.steps


def _said(points: tuple[Point, ...], threads: int, gpu: bool) -> Cost | None:
    """What the points' task says itself of a sample's cost."""
    task = points[0].task
    if "_target_" not in task.settings:
        return None
    says = getattr(task.target(), "cost", None)
    speed = Speed(GPU_FLOPS, GPU_BYTES) if gpu else Speed(CPU_FLOPS * threads, CPU_BYTES * threads)
    found: Cost | None = says(points, shape(points[0]), speed) if says else None
    return found


def unit_seconds(
    unit: Unit,
    threads: int,
    gpu: bool,
    pace: Callable[[str, str], tuple[float, float] | None] = lambda model, task: None,
) -> float:
    """Return the seconds of a unit, its model's loading not included."""
    return len(unit.samples) * sample_seconds(unit.points, threads, gpu, pace)


def weight_bytes(point: Point, stored: bool = False) -> float:
    """Return the bytes of a model's weights: those that a decode step reads or, if `stored`, those
    that are in memory at most, which rounding to 4 bits starts from."""
    facts, settings = shape(point), point.model.settings
    size = 4 if settings.get("dtype") == "float32" else 2
    parameters, chosen = int(facts["parameters"]), settings.get("weight_format", "full")
    if chosen == "full" or (stored and chosen != "stored4"):
        return float(size * parameters)
    outside = int(facts["vocab"]) * int(facts["hidden"]) * (1 if facts.get("tied") else 2)
    return size * outside + PACKED_BYTES * (parameters - outside)


def token_bytes(point: Point) -> int:
    """Return the bytes of one token's keys and values over all layers."""
    facts = shape(point)
    size = 4 if point.model.settings.get("dtype") == "float32" else 2
    return 2 * size * int(facts["layers"]) * int(facts["kv_heads"]) * int(facts["head_dim"])


def worker_bytes(points: tuple[Point, ...]) -> int:
    """Return the memory of a worker that runs these points (of one family) as one batch."""
    first, facts = points[0], shape(points[0])
    said = _said(points, 1, False)
    if said is not None:
        return PROCESS_BYTES + int(said.bytes)
    size = extent(first)
    rows = min(batch_rows(points), MOST_ROWS)
    cache = token_bytes(first) * (size.context + rows * (size.steps + first.page_size))
    activations = ACTIVATION_BYTES * size.context * int(facts["hidden"])
    return PROCESS_BYTES + int(weight_bytes(first, stored=True)) + cache + activations


def needs(unit: Unit) -> int:
    """Return the memory of a worker that runs a unit; 0 where its model states no shape, of which
    nothing is known."""
    return worker_bytes(unit.points) if unit.first.model.settings.get("shape") else 0
