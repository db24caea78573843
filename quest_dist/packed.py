"""Packed keys and values: the ops that write them and attend to them; arguments are checked here.

`packing` says what a block holds, `reference_packed` what the ops compute. Packed tokens are read
from their blocks alone, the others of a row from the pool's pages.

Invariants, beside those of `ops`: codes are the reference's bits; a row of which nothing is packed
gets the bits of `ops.attend`. In bf16, a CPU that multiplies bf16 in pairs rounds query * scale and
probability * scale to bf16, and levels that are not whole numbers; minima and outliers meet fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist import on_cpu, on_cuda, reference_packed
from quest_dist.arguments import Arguments
from quest_dist.backend import by_reference
from quest_dist.packing import TILE, Layout, Nuq, Packed
from quest_dist.reference import Attended

#: Channels of a head that KVQuant's keys on a GPU are multiples of: eight of either half at once.
GPU_STEP = 16


def allocate_blocks(
    blocks: int,
    kv_heads: int,
    layout: Layout,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Zeroed blocks uint8 [blocks, G, bytes] for `Packed.blocks`."""
    made = torch.empty(blocks, kv_heads, layout.bytes, dtype=torch.uint8, device=device)
    if not by_reference() and made.device.type == "cpu":
        on_cpu.prefer_huge_pages(made)
    return made.zero_()


def pack(packed: Packed, kv: Tensor, page_table: Tensor, keys: Tensor, values: Tensor) -> None:
    """Pack the keys of tokens keys[r] to packed.keys[r], and alike values, of each row of a layer.

    keys, values int32 [R]: what is packed already, or another row packs: rows may share blocks, but
    only one may write into a block in a call. Levels must be 0, 1, ... (`packing.uniform`), and no
    `nuq` said.
    """
    a = Arguments("pack")
    if packed.nuq is not None:
        raise a.refuse("packed.nuq", "given", "None: KVQuant's blocks are written by its method")
    a.take_pool(kv, page_table, None)
    _check(a, packed)
    a.of_dtype("keys", keys, "R")
    a.of_dtype("values", values, "R")
    if by_reference():
        return reference_packed.pack(packed, kv, page_table, keys, values)
    run = on_cuda.pack if kv.is_cuda else on_cpu.pack
    run(a, packed, kv, page_table, keys, values)


def attend_packed(
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
    """`ops.attend` of q [R, H, D] where the first tokens of each row are packed; lists as there."""
    a = Arguments("attend_packed")
    a.take_pool(kv, page_table, lengths)
    q = a.floats("q", q, "R H D", contiguous=False).contiguous()
    _check(a, packed)
    a.multiple("H", "G", "query heads share kv heads evenly")
    kind = a.choice("unit", unit, ("pages", "tokens"))
    a.lists(index, count)
    scale = a["D"] ** -0.5 if scale is None else scale
    if by_reference():
        place = (kv, packed, page_table, lengths)
        return reference_packed.attend(q, *place, index, count, unit, scale)
    run = on_cuda.attend_packed if kv.is_cuda else on_cpu.attend_packed
    return run(a, q, kv, packed, page_table, lengths, index, count, kind, scale)


def _check(a: Arguments, packed: Packed) -> None:
    a.of_dtype("packed.levels", packed.levels, "2 N_levels", torch.float32)
    if packed.levels.shape[1] != 2**packed.bits:
        raise a.refuse(
            "packed.levels", f"of {packed.levels.shape[1]} levels", "2 to the bits of a code"
        )
    try:
        layout = packed.layout(a["D"])
    except ValueError as error:
        raise a.refuse("packed", str(error), "a layout that exists") from None
    a.of_dtype("packed.blocks", packed.blocks, "B G bytes", torch.uint8)
    if a["bytes"] != layout.bytes:
        raise a.refuse("packed.blocks", f"of {a['bytes']} bytes a block", f"{layout.bytes}")
    a.of_dtype("packed.table", packed.table, "R W")
    a.of_dtype("packed.keys", packed.keys, "R")
    a.of_dtype("packed.values", packed.values, "R")
    if packed.nuq is not None:
        _check_nuq(a, packed.nuq)


def _check_nuq(a: Arguments, nuq: Nuq) -> None:
    if nuq.keys.is_cuda and a["D"] % GPU_STEP:
        expected = f"a multiple of {GPU_STEP} on a GPU"
        raise a.refuse("packed.nuq", f"for head dimension {a['D']}", expected)
    if nuq.sinks < 0:
        raise a.refuse("packed.nuq.sinks", nuq.sinks, "0 or more tokens")
    a.of_dtype("packed.nuq.keys", nuq.keys, "G 2 D", torch.float32)
    a.of_dtype("packed.nuq.values", nuq.values, f"B 2 {TILE}", torch.float16)
    a.of_dtype("packed.nuq.starts", nuq.starts, "B N_starts")
    if a["N_starts"] != 2 * a["G"] + 1:
        raise a.refuse("packed.nuq.starts", f"of {a['N_starts']} a block", f"{2 * a['G'] + 1}")
    a.of_dtype("packed.nuq.outliers", nuq.outliers, "E 2", torch.int16)
    for name in ("cos", "sin"):
        a.of_dtype(f"packed.nuq.{name}", getattr(nuq, name), "N_positions D_half", torch.float32)
    if 2 * a["D_half"] != a["D"]:
        raise a.refuse("packed.nuq.cos", f"of {a['D_half']} channels", f"{a['D'] // 2}")
