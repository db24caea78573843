"""Attention over a cache that KIVI packs, against our own dense attention over bf16.

One row, one decode step: all keys and values but the youngest RESIDUAL are read from packed blocks,
these from the pool. Layers rotate, of the pool and of each packing; every result is checked against
the reference on one kv head before it is timed. A side's bytes are those that it must read.
"""

from __future__ import annotations

import argparse

import torch

from quest_dist import attention_sides as sides
from quest_dist import ops, reference_packed, timing
from quest_dist.attention_sides import Cache
from quest_dist.bench.packed_part import Part, table
from quest_dist.packing import Layout, Packed, uniform
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, PAGE_SIZE, SHAPES, Point, parsed_sizes
from quest_dist.timing import READ, REUSE, Rotation, Side

GROUP, RESIDUAL = 32, 128
#: Bits of a code -> its figure's target.
TARGETS = {4: "<= 0.45", 2: "<= 0.35"}
NAME = "kivi{}_vs_dense"


def measured(options: argparse.Namespace, place: Place) -> Part:
    """ValueError for options that cannot be."""
    dtype = DTYPES["bfloat16"]
    [context] = parsed_sizes("--context", [options.context], ())
    if context % RESIDUAL or context < 2 * RESIDUAL:
        raise ValueError(f"--context={context}: expected a multiple of {RESIDUAL} above it")
    point = Point(SHAPES[options.shape], context)
    distance = REUSE * place.cache
    buffers = timing.buffers_needed([(point.dense_bytes(dtype), True)], distance)
    cache = sides.filled(point, buffers, dtype)
    sides.check_dense(cache)
    chosen = [sides.read(READ * place.cache), sides.dense(cache, Rotation(cache.layers))]
    chosen += [_side(cache, bits, distance) for bits in TARGETS]
    times = timing.measure(chosen, options.seconds)
    summary = {
        NAME.format(bits): timing.paired(times.us(f"kivi-{bits}"), times.us("dense"))
        for bits in TARGETS
    }
    targets = {NAME.format(bits): target for bits, target in TARGETS.items()}
    setting = {"group": GROUP, "residual": RESIDUAL, "page_size": PAGE_SIZE, "layers": buffers}
    return Part(table(f"cache, {point}", times, "dense"), summary, setting, targets)


def _side(cache: Cache, bits: int, distance: int) -> Side:
    first = _packed(cache, bits)
    _check(cache, first)
    shape = cache.point.shape
    packed = int(first.keys[0] + first.values[0])
    rest = 2 * cache.point.context - packed
    blocks = packed // (2 * GROUP) * shape.kv_heads * first.blocks.shape[2]
    moved = blocks + rest * shape.token_bytes(cache.q.dtype) // 2
    count = timing.buffers_needed([(moved, True)], distance)
    layout = Layout(bits, GROUP, shape.head_dim)
    layers = [first]
    for _ in range(count - 1):
        copy = ops.allocate_blocks(first.blocks.shape[0], shape.kv_heads, layout)
        layers.append(first._replace(blocks=copy.copy_(first.blocks)))

    def attend(layer: int) -> None:
        number = layer % cache.layers
        place = (cache.kv[number], layers[layer], cache.table, cache.lengths)
        ops.attend_packed(cache.q[number], *place)

    return Side(f"kivi-{bits}", {"attend": attend}, (moved,), Rotation(count))


def _packed(cache: Cache, bits: int) -> Packed:
    """The cache's tokens as they lie packed while its last one is new."""
    context, shape = cache.point.context, cache.point.shape
    keys, values = (context - 1) // RESIDUAL * RESIDUAL, context - 1 - RESIDUAL
    count = -(-keys // GROUP)
    blocks = ops.allocate_blocks(count, shape.kv_heads, Layout(bits, GROUP, shape.head_dim))
    ends = torch.tensor([[keys], [values]], dtype=torch.int32)
    order = torch.arange(count, dtype=torch.int32)[None]
    packed = Packed(blocks, order, ends[0], ends[1], uniform(bits), GROUP)
    start = torch.zeros(1, dtype=torch.int32)
    ops.pack(packed, cache.kv[0], cache.table, start, start)
    return packed


def _check(cache: Cache, packed: Packed) -> None:
    """RuntimeError unless the first kv head's attention is the reference's."""
    group = cache.point.shape.heads // cache.point.shape.kv_heads
    place = (packed, cache.table, cache.lengths)
    ours = ops.attend_packed(cache.q[0], cache.kv[0], *place).out[:, :group]
    one = packed._replace(blocks=packed.blocks[:, :1])
    q, kv = cache.q[0, :, :group].float(), cache.kv[0][:, :1].float()
    theirs = reference_packed.attend(q, kv, one, cache.table, cache.lengths).out
    sides.same(f"{cache.point}, kivi-{packed.bits}", ours, theirs)
