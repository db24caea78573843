"""A layer's linear layers with weights in 4 bits against torch's with bf16, for few rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from quest_dist import attention_sides as sides
from quest_dist import int4, timing
from quest_dist.bench.packed_part import Part, table
from quest_dist.decoders import MODELS, Model
from quest_dist.int4 import Int4
from quest_dist.places import Place
from quest_dist.timing import READ, REUSE, Rotation, Side, Times, paired, spread

TARGETS = {"w4_vs_bf16": "<= 0.35"}
#: Rows of a call; the summary is of the first.
ROWS = (1, 8)
#: Largest difference from torch with the same weights in bf16, in units of the largest output.
TOLERANCE = 2**-6


def sizes(model: Model) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's linear layers, by name."""
    heads, kv_heads = (n * model.shape.head_dim for n in (model.shape.heads, model.shape.kv_heads))
    hidden, wide = model.hidden, model.intermediate
    return {
        "q_proj": (heads, hidden),
        "k_proj": (kv_heads, hidden),
        "v_proj": (kv_heads, hidden),
        "o_proj": (hidden, heads),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
    }


def measured(options: argparse.Namespace, place: Place) -> Part:
    """One layer of the shape, random weights."""
    shapes, dtype = sizes(MODELS[options.shape]), torch.bfloat16
    random = torch.Generator().manual_seed(0)
    full = {name: torch.randn(*size, generator=random).to(dtype) for name, size in shapes.items()}
    packed = {name: int4.pack(int4.quantise(weight)) for name, weight in full.items()}
    x = {
        (rows, width): torch.randn(rows, width, generator=random).to(dtype)
        for rows in ROWS
        for _, width in shapes.values()
    }
    check(packed, x)
    total = {"bf16": _bytes(full.values()), "w4": _bytes(w.data for w in packed.values())}
    calls = [(size, True) for size in total.values() for _ in ROWS]
    layers = timing.buffers_needed(calls, REUSE * place.cache)
    full_layers = [full, *({n: w.clone() for n, w in full.items()} for _ in range(layers - 1))]
    packed_layers = [packed, *(_copied(packed) for _ in range(layers - 1))]
    rotation = Rotation(layers)
    chosen = [sides.read(READ * place.cache)]
    for rows in ROWS:
        at = {name: x[rows, width] for name, (_, width) in shapes.items()}
        chosen.append(_side(f"bf16, {_said(rows)}", full_layers, at, linear, rotation))
        chosen.append(_side(f"w4, {_said(rows)}", packed_layers, at, int4.linear, rotation))
    times = timing.measure(chosen, options.seconds)
    what = f"weights, {options.shape}"
    found = table(f"{what}, a layer", times, f"bf16, {_said(ROWS[0])}")
    return Part(
        [*found, *_each(what, times, shapes)],
        summary(times),
        {"layers": layers, "bf16": f"torch {torch.__version__}, nn.functional.linear"},
        TARGETS,
    )


def check(packed: dict[str, Int4], x: dict[tuple[int, int], Tensor]) -> None:
    """RuntimeError unless the kernels give what torch gives with the same weights."""
    for name, weight in packed.items():
        whole = int4.widened(weight, torch.bfloat16)
        for rows in ROWS:
            want = linear(x[rows, weight.inputs], whole).float()
            off = (int4.linear(x[rows, weight.inputs], weight).float() - want).abs().max()
            if off > TOLERANCE * want.abs().max():
                raise RuntimeError(f"{name} of {rows} rows: 4-bit weights are off by {off:g}")


def summary(times: Times) -> dict[str, float]:
    """The figures by name: whole layers, one row. `..._at_read_speed` compares with the time that
    the bf16 weights would take at the speed of a plain read of memory."""
    bf16, w4 = (f"{side}, {_said(ROWS[0])}" for side in ("bf16", "w4"))
    read = spread(times.rate("read")).median
    least = sum(times.moved[bf16].values()) / read
    return {
        "w4_vs_bf16": paired(times.us(w4), times.us(bf16)),
        "w4_vs_bf16_at_read_speed": spread(times.us(w4)).median / least,
    }


def _side(
    name: str,
    layers: Sequence[dict[str, Any]],
    x: dict[str, Tensor],
    multiply: Callable[[Tensor, Any], Tensor],
    rotation: Rotation,
) -> Side:
    def step(linear: str) -> timing.Step:
        return lambda layer: multiply(x[linear], layers[layer][linear])

    weights = layers[0].values()
    moved = tuple((w.data if isinstance(w, Int4) else w).nbytes for w in weights)
    return Side(name, {linear: step(linear) for linear in x}, moved, rotation)


def _each(what: str, times: Times, shapes: dict[str, tuple[int, int]]) -> list[tuple[Any, ...]]:
    """Rows of the single linear layers, one row of x."""
    rows: list[tuple[Any, ...]] = []
    baseline = f"bf16, {_said(ROWS[0])}"
    for name, (outputs, inputs) in shapes.items():
        for side in (baseline, f"w4, {_said(ROWS[0])}"):
            us, size = times.us(side, name), times.moved[side][name]
            found = spread(us)
            of_calls = (found.median, found.p10, found.p90, found.low, found.high)
            ratio = paired(us, times.us(baseline, name))
            place = f"{what}, {name} {outputs} x {inputs}"
            rows.append((place, side, *of_calls, size / 1e6, size / found.median / 1000, ratio))
    return rows


def _copied(packed: dict[str, Int4]) -> dict[str, Int4]:
    return {name: Int4(w.data.clone(), w.outputs, w.inputs, w.group) for name, w in packed.items()}


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _said(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"
