"""Attention over a cache that KIVI or KVQuant packs, against our own dense attention over bf16.

One row, one decode step. KIVI's keys and values are read from packed blocks but for the youngest
RESIDUAL, these from the pool; KVQuant's all but the sink. Layers rotate, of the pool and of each
packing; every result is checked against the reference, on one kv head or a shorter context, before
it is timed. A side's bytes are those that it must read.
"""

from __future__ import annotations

import argparse

import torch

from quest_dist import attention_sides as sides
from quest_dist import nuq, on_cpu, ops, reference_packed, timing
from quest_dist.attention_sides import Cache
from quest_dist.bench import packed_nuq
from quest_dist.bench.packed_part import Part, table
from quest_dist.packing import Layout, Packed, uniform
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, PAGE_SIZE, SHAPES, Point, parsed_sizes
from quest_dist.timing import READ, REUSE, Rotation, Side

GROUP, RESIDUAL = 32, 128
#: Bits of KIVI's codes -> its figure's target.
TARGETS = {4: "<= 0.45", 2: "<= 0.35"}
NAME = "{}_vs_dense"


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
    kivi = {f"kivi-{bits}": _packed(cache, bits) for bits in TARGETS}
    kvquant = {f"kvquant-{bits}": packed_nuq.packed(cache, bits) for bits in reversed(nuq.BITS)}
    for name, packed in kivi.items():
        _check(cache, packed)
        chosen.append(_side(cache, name, packed, _bytes(cache, packed), distance))
    token = point.shape.token_bytes(dtype)
    for name, packed in kvquant.items():
        packed_nuq.check(cache, packed)
        moved = packed_nuq.bytes_read(packed, token)
        chosen.append(_side(cache, name, packed, moved, distance))
    times = timing.measure(chosen, options.seconds)
    summary = {
        NAME.format(name.replace("-", "")): timing.paired(times.us(name), times.us("dense"))
        for name in (*kivi, *kvquant)
    }
    targets = {NAME.format(f"kivi{bits}"): target for bits, target in TARGETS.items()}
    setting = {
        "kivi": {"group": GROUP, "residual": RESIDUAL},
        "kvquant": {"outliers": packed_nuq.OUTLIERS, "sinks": packed_nuq.SINKS},
        "page_size": PAGE_SIZE,
        "layers": buffers,
    }
    return Part(table(f"cache, {point}", times, "dense"), summary, setting, targets)


def _bytes(cache: Cache, packed: Packed) -> int:
    """What KIVI must read: blocks of keys and values, and the rest from the pool."""
    shape, ends = cache.point.shape, int(packed.keys[0] + packed.values[0])
    blocks = ends // (2 * GROUP) * shape.kv_heads * packed.blocks.shape[2]
    return blocks + (2 * cache.point.context - ends) * shape.token_bytes(cache.q.dtype) // 2


def _side(cache: Cache, name: str, first: Packed, moved: int, distance: int) -> Side:
    count = timing.buffers_needed([(moved, True)], distance)
    layers = [first, *(_copied(first) for _ in range(count - 1))]

    def attend(layer: int) -> None:
        number = layer % cache.layers
        place = (cache.kv[number], layers[layer], cache.table, cache.lengths)
        ops.attend_packed(cache.q[number], *place)

    return Side(name, {"attend": attend}, (moved,), Rotation(count))


def _copied(packed: Packed) -> Packed:
    """Another layer of the same content, with a place of its own for all that grows with it."""
    blocks = torch.empty_like(packed.blocks)
    on_cpu.prefer_huge_pages(blocks)
    copy = packed._replace(blocks=blocks.copy_(packed.blocks))
    if packed.nuq is None:
        return copy
    parts = {name: getattr(packed.nuq, name).clone() for name in ("values", "starts", "outliers")}
    return copy._replace(nuq=packed.nuq._replace(**parts))


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
