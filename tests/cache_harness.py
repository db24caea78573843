"""Random keys, values and queries through a `Batch`, one layer after another, as a model would send
them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_artefacts import artefact_for, is_tiny
from torch import Tensor

from quest_dist import ops
from quest_dist.batch import Batch, Group, new_batch
from quest_dist.methods.method import Method, Selection, View
from quest_dist.plan import Spec
from quest_dist.pool import Geometry

CONF = Path(__file__).parent.parent / "conf" / "method"
METHODS = sorted(file.stem for file in CONF.glob("*.yaml"))
# Sizes that fit streams of a few dozen tokens.
SMALL: dict[str, dict[str, object]] = {
    "snapkv": {"window": 4, "kernel": 3},
    "pyramidkv": {"window": 4, "kernel": 3},
}


def method_spec(name: str, **settings: object) -> Spec:
    """The method of one YAML file, or a variant, with other settings where given.

    An artefact that it needs and does not name is that of tiny models, and tokens wait for packing
    as briefly as they may.
    """
    if name in VARIANTS:
        name, settings = VARIANTS[name][0], {**VARIANTS[name][1], **settings}
    written = settings_of(name)
    short = {"group": 16, "residual": 16} if "residual" in written else {}
    spec = Spec(name, {**written, **short, **SMALL.get(name, {}), **settings})
    made = artefact_for(spec.build()) if spec.settings.get("artefact") is None else None
    return spec if made is None else Spec(name, {**spec.settings, "artefact": made})


def settings_of(name: str) -> dict[str, Any]:
    """What a method's YAML file says."""
    settings: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())[name]
    return settings


def asked_for(name: str, budget: int) -> dict[str, Any]:
    """What `quest_dist.patched` is told for a tiny model: the budget where the method has one."""
    spec, written = method_spec(name), settings_of(name)
    told = {"method": name, "budget": budget if spec.budgeted else None}
    changed = {key: value for key, value in spec.settings.items() if value != written.get(key)}
    return told | changed


def is_exact(name: str) -> bool:
    """Whether a method attends to keys and values as they are."""
    method: Method = Spec(name, settings_of(name)).build()
    return method.exact


# Settings that are held to the universal properties too, as methods of their own.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {}
VARIANTS["quest with int8"] = ("quest", {"metadata": "int8"})
VARIANTS["squeezed in two levels"] = ("squeezed", {"clusters": 0.2, "coarse_clusters": 0.1})


def can_be_a_pyramid(name: str) -> bool:
    """Whether a schedule may give its layers budgets of their own, and none does."""
    method: Method = Spec(name, settings_of(name)).build()
    free = method.budgeted and not method.own_schedule
    return free and method.layer_budgets == "uniform"


for _name in filter(can_be_a_pyramid, METHODS):
    VARIANTS[f"{_name} in a pyramid"] = (_name, {"layer_budgets": "pyramid"})
BUDGETED = [name for name in METHODS if settings_of(name).get("budgeted", True)] + [*VARIANTS]


def stream_for(name: str, tokens: int, **options: object) -> Stream:
    """A random stream, of some layers for methods whose layers differ."""
    pyramid = method_spec(name).build().layer_budgets == "pyramid"
    return Stream.random(tokens, **{"layers": 3 if pyramid else 1, **options})


def no_rotation(q: Tensor, distance: Tensor) -> Tensor:
    """Stand-in for a model's rotary embedding."""
    return q


@dataclass
class Stream:
    """One random sequence: q [layers, H, T, D], k and v [layers, G, T, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def random(
        cls,
        tokens: int,
        *,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> Stream:
        """A seeded stream."""
        draw = torch.Generator().manual_seed(seed)

        def normal(count: int) -> Tensor:
            return torch.randn(layers, count, tokens, head_dim, generator=draw).to(dtype)

        return cls(normal(heads), normal(kv_heads), normal(kv_heads))

    @property
    def geometry(self) -> Geometry:
        """The attention shape."""
        layers, heads, _, head_dim = self.q.shape
        return Geometry(layers, heads, self.k.shape[1], head_dim, self.q.dtype)


@dataclass
class Step:
    """What one group attended to in one layer of one decode step, with which budgets."""

    layer: int
    budgets: tuple[int, ...]
    selection: Selection
    view: View
    attended: ops.Attended
    q: Tensor


@dataclass
class Run:
    """Outputs [steps, R, layers, H, D], every attention call, and the batch itself."""

    outputs: Tensor
    steps: list[Step]
    batch: Batch


def decode(
    stream: Stream,
    make: Callable[[], Method],
    budgets: Sequence[int],
    *,
    prefix: int,
    page_size: int = 4,
    dense_layers: int = 0,
    chunks: Sequence[int] | None = None,
    rotate: Callable[[Tensor, Tensor], Tensor] = no_rotation,
) -> Run:
    """Prefill `prefix` tokens of the stream (in `chunks` if given), fork, and decode the rest one
    by one."""
    method = make()
    if method.artefact is None or is_tiny(method.artefact):
        method.artefact = artefact_for(method, stream.geometry)
    group = Group(method, list(budgets), dense_layers)
    first = new_batch(stream.geometry, page_size, (), 1, rotate, observers=[group])
    scale = stream.q.shape[-1] ** -0.5
    start = 0
    for chunk in [prefix] if chunks is None else chunks:
        _forward(first, stream, start, chunk, scale, 1)
        start += chunk
    batch = first.fork([group])
    steps = record(group.method)
    outputs = []
    for position in range(prefix, stream.q.shape[2]):
        outputs.append(_forward(batch, stream, position, 1, scale, len(budgets)))
        batch.count()
    return Run(torch.stack(outputs), steps, batch)


def _forward(
    batch: Batch, stream: Stream, start: int, count: int, scale: float, rows: int
) -> Tensor:
    out = []
    for layer in range(stream.q.shape[0]):
        q, k, v = (
            part[layer, :, start : start + count].expand(rows, -1, -1, -1)
            for part in (stream.q, stream.k, stream.v)
        )
        batch.write(layer, k, v, None)
        out.append(batch.attend(layer, q, k, v, scale)[:, -1])
    return torch.stack(out, 1)


def record(method: Method) -> list[Step]:
    """Keep what `method` selects from now on, with the attention that it led to."""
    steps: list[Step] = []
    select = method.select

    def recording(view: View, q: Tensor) -> Selection:
        selection = select(view, q)
        if method.skips_heads:  # which no list can say to the op
            attended = method.attend(view, q, selection)
        else:
            attended = view.attend(q, selection, probabilities=True)
        steps.append(Step(view.layer, method.budgets, selection, view, attended, q.clone()))
        return selection

    method.select = recording  # type: ignore[method-assign]
    return steps


def tokens_of(step: Step, row: int, head: int) -> list[int]:
    """Logical positions that a query head attends to in a step."""
    length = step.view.lengths_list[row]
    if step.selection.index is None:
        return list(range(length))
    lists = step.selection.index.shape[1]
    place = head * lists // step.view.heads
    count = int(step.selection.count[row, place])
    if count < 0:
        return list(range(length))
    listed = step.selection.index[row, place, :count].tolist()
    if step.selection.unit == "tokens":
        return listed
    size = step.view.page_size
    return [t for page in listed for t in range(page * size, min(length, (page + 1) * size))]
