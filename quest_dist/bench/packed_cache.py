"""Attention over a packed KV cache against our own dense attention over bf16."""

from __future__ import annotations

import argparse

from quest_dist import attention_sides as sides
from quest_dist import timing
from quest_dist.bench.packed_part import Part, table
from quest_dist.places import Place
from quest_dist.shapes import DTYPES, SHAPES, Point, parsed_sizes
from quest_dist.timing import READ, REUSE


def measured(options: argparse.Namespace, place: Place) -> Part:
    """One decode step's attention of one row; ValueError for options that cannot be."""
    dtype = DTYPES["bfloat16"]
    [context] = parsed_sizes("--context", [options.context], ())
    point = Point(SHAPES[options.shape], context)
    calls = [(point.dense_bytes(dtype), True)]
    cache = sides.filled(point, timing.buffers_needed(calls, REUSE * place.cache), dtype)
    sides.check_dense(cache)
    rotation = timing.Rotation(cache.layers)
    chosen = [sides.read(READ * place.cache), sides.dense(cache, rotation)]
    times = timing.measure(chosen, options.seconds)
    return Part(table(f"cache, {point}", times, "dense"), {}, {"layers": cache.layers})
