"""A cache as KVQuant packs it, for the packed benchmark: one row, all of its tokens but the sink.

Bounds are quantiles of the cache's own keys and codebooks are even steps: what is read, and how
much of it is an outlier, is as with a calibration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist import attention_sides as sides
from quest_dist import ops, reference_packed
from quest_dist.attention_sides import Cache
from quest_dist.methods.kvquant_blocks import AT_ONCE, Blocks, Rules, encoded
from quest_dist.nuq import Codebook
from quest_dist.packing import TILE, Nuq, Packed

OUTLIERS, SINKS = 0.01, 1
#: Of rotary embeddings; tokens that bounds are taken from, and that are checked.
THETA, SEEN, CHECKED = 10000.0, 4096, 1024


def packed(cache: Cache, bits: int) -> Packed:
    """The cache's first layer in `bits` a code."""
    context = cache.point.context
    k, v = ops.gather(cache.kv[0], cache.table, context)
    cos, sin = _turns(context, k.shape[-1])
    first, second = k.float().chunk(2, -1)
    k = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    tokens = [x[0].transpose(0, 1).float() for x in (k, v)]  # [L, G, D]
    steps = torch.linspace(-1, 1, 1 << bits)
    ends = torch.tensor([OUTLIERS / 2, 1 - OUTLIERS / 2])
    lower, upper = torch.quantile(tokens[0][:SEEN].flatten(1), ends, dim=0)
    of_head = tokens[0].shape[1:]
    book = Codebook(steps, steps)
    rules = Rules(lower.view(of_head), upper.view(of_head), book, book, OUTLIERS)
    held, count = Blocks(rules, cache.kv[0]), context // TILE
    held.grow(count)
    there = torch.arange(context).view(-1, TILE) >= SINKS
    for start in range(0, count, AT_ONCE):
        some = slice(start, min(start + AT_ONCE, count))
        keys, values = (x.reshape(count, TILE, *of_head)[some] for x in tokens)
        lot = encoded(keys, values, there[some], rules)
        held.put(list(range(some.start, some.stop)), lot, full=True)
    end = torch.tensor([context], dtype=torch.int32)
    table = torch.arange(count, dtype=torch.int32)[None]
    nuq = Nuq(held.key_norms, held.norms, held.starts, held.outliers, cos, sin, SINKS)
    return Packed(held.codes, table, end, end.clone(), held.levels, TILE, nuq)


def check(cache: Cache, whole: Packed) -> None:
    """RuntimeError unless attention over the first CHECKED tokens is the reference's."""
    end = torch.tensor([min(CHECKED, cache.point.context)], dtype=torch.int32)
    few = whole._replace(keys=end, values=end)
    place = (few, cache.table, end)
    ours = ops.attend_packed(cache.q[0], cache.kv[0], *place).out
    theirs = reference_packed.attend(cache.q[0].float(), cache.kv[0].float(), *place).out
    sides.same(f"{cache.point}, kvquant-{whole.bits}", ours, theirs)


def bytes_read(whole: Packed, token_bytes: int) -> int:
    """What one call must read: blocks, what lies beside them, and the sink."""
    nuq = whole.nuq
    assert nuq is not None
    beside = (whole.blocks, nuq.values, nuq.starts, nuq.keys)
    outliers = int(nuq.starts[-1, -1]) * nuq.outliers.element_size() * 2
    return sum(x.nbytes for x in beside) + outliers + SINKS * token_bytes


def _turns(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings, fp32 [positions, dim / 2]."""
    speed = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(positions)[:, None] * speed
    return angles.cos().float(), angles.sin().float()
