"""Reference of packed keys and values: what `ops.pack` and `ops.attend_packed` compute.

Written for reading, as `reference`; shape letters are its own and those of `packing.Packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist import reference
from quest_dist.packing import TILE, Layout, Packed, get_codes, put_codes, quantised, scales
from quest_dist.reference import Attended


def pack(packed: Packed, kv: Tensor, page_table: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write the codes of tokens keys[r].. of row r to packed.keys[r], and alike of its values."""
    layout = Layout(packed.bits, packed.group, kv.shape[4])
    for r in range(page_table.shape[0]):
        ends = int(packed.keys[r]), int(packed.values[r])
        k, v = reference.gather(kv, page_table[r : r + 1], max(ends))
        for start in range(int(keys[r]), ends[0], packed.group):
            for head in range(kv.shape[1]):
                block = packed.blocks[int(packed.table[r, start // packed.group]), head]
                _pack_keys(block, layout, k[0, head, start : start + packed.group])
        for at in range(int(values[r]), ends[1]):
            for head in range(kv.shape[1]):
                block = packed.blocks[int(packed.table[r, at // packed.group]), head]
                _pack_value(block, layout, at % packed.group, v[0, head, at])


def _pack_keys(block: Tensor, layout: Layout, k: Tensor) -> None:
    """Keys [T, D] of a whole block: a group is a channel."""
    codes, scale, minimum = quantised(k, layout.bits, 0)
    for to, one in zip(scales(block, layout)[:2], (scale, minimum), strict=True):
        to.copy_(one[0])
    for tile in range(layout.group // TILE):
        put_codes(block, layout, tile, codes[tile * TILE : (tile + 1) * TILE], values=False)


def _pack_value(block: Tensor, layout: Layout, token: int, v: Tensor) -> None:
    """The value [D] of one token of a block: a group is some of its channels."""
    codes, scale, minimum = quantised(v.view(-1, layout.width), layout.bits, 1)
    for to, one in zip(scales(block, layout)[2:], (scale, minimum), strict=True):
        to[:, token] = one[:, 0]
    tile, place = divmod(token, TILE)
    whole = get_codes(block, layout, tile, values=True)
    whole[place] = codes.view(-1)
    put_codes(block, layout, tile, whole, values=True)


def unpacked(block: Tensor, layout: Layout, levels: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes of a block (one kv head) stand for: keys and values [T, D] in fp64."""
    codes = [
        torch.cat([get_codes(block, layout, tile, values=of) for tile in range(layout.group // 16)])
        for of in (False, True)
    ]
    steps = [level.double()[code] for level, code in zip(levels, codes, strict=True)]
    key_scale, key_minimum, scale, minimum = (one.double() for one in scales(block, layout))
    grouped = steps[1].view(layout.group, -1, layout.width)
    values = grouped * scale.mT[..., None] + minimum.mT[..., None]
    return steps[0] * key_scale + key_minimum, values.view(layout.group, layout.dim)


def unpacked_nuq(
    packed: Packed, number: int, head: int, position: int, layout: Layout
) -> tuple[Tensor, Tensor]:
    """What a block of nuq codes stands for, whose first token has `position`: as `unpacked`, keys
    turned to their positions (as far as there are some)."""
    nuq, half = packed.nuq, layout.dim // 2
    assert nuq is not None
    heads, block = nuq.keys.shape[0], packed.blocks[number, head]
    found = []
    for of in range(2):
        codes = get_codes(block, layout, 0, values=of == 1)
        steps = packed.levels[of].double()[codes]
        if of == 0:
            steps = torch.cat([steps[:, 0::2], steps[:, 1::2]], 1)
            scale, added = nuq.keys[head].double()
        else:
            added, scale = nuq.values[number].double()[..., None]
        x = steps * scale + added
        start, end = nuq.starts[number, of * heads + head :][:2].tolist()
        places, bits = nuq.outliers[start:end].unbind(1)
        x.view(-1).index_add_(0, places.long() & 0xFFFF, bits.view(torch.float16).double())
        found.append(x)
    keys, values = found
    cos, sin = (one[position : position + TILE].double() for one in (nuq.cos, nuq.sin))
    first, second = keys[: len(cos), :half].clone(), keys[: len(cos), half:].clone()
    keys[: len(cos), :half] = first * cos - second * sin
    keys[: len(cos), half:] = second * cos + first * sin
    return keys, values


def dense(packed: Packed, kv: Tensor, page_table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A pool of the rows' own pages in which packed tokens are what their codes stand for, in the
    accumulator's dtype, and its page table."""
    exact = reference.accumulator(kv.dtype)
    layout = packed.layout(kv.shape[4])
    sinks = 0 if packed.nuq is None else packed.nuq.sinks
    rows, pages = page_table.shape
    own = kv[page_table.long().clamp(0, kv.shape[0] - 1).flatten()].to(exact)
    tokens = own.view(rows, pages, *kv.shape[1:]).permute(0, 2, 3, 1, 4, 5)
    tokens = tokens.reshape(rows, kv.shape[1], 2, -1, kv.shape[4])  # [R, G, 2, P * S, D]
    for r in range(rows):
        ends = int(packed.keys[r]), int(packed.values[r])
        for start in range(0, max(ends), packed.group):
            for head in range(kv.shape[1]):
                number = int(packed.table[r, start // packed.group])
                if packed.nuq is None:
                    both = unpacked(packed.blocks[number, head], layout, packed.levels)
                else:
                    both = unpacked_nuq(packed, number, head, start, layout)
                for of, found in enumerate(both):
                    some = slice(max(0, sinks - start), max(0, min(ends[of] - start, packed.group)))
                    tokens[r, head, of, start:][some] = found[some].to(exact)
    paged = tokens.view(rows, kv.shape[1], 2, pages, kv.shape[3], kv.shape[4])
    table = torch.arange(rows * pages, dtype=torch.int32).view(rows, pages)
    return paged.permute(0, 3, 1, 2, 4, 5).reshape(-1, *kv.shape[1:]), table


def attend(
    q: Tensor,
    kv: Tensor,
    packed: Packed,
    page_table: Tensor,
    lengths: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    unit: str = "pages",
    scale: float | None = None,
) -> Attended:
    """`reference.attend` over a row's tokens, packed ones as what their codes stand for."""
    own, table = dense(packed, kv, page_table, lengths)
    return reference.attend(q, own, table, lengths, index, count, unit, scale)
