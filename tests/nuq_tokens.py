"""Keys and values that KVQuant's blocks stand for, before any rotation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from quest_dist import reference_packed
from quest_dist.methods.kvquant_blocks import Blocks, Encoded, Rules, encoded
from quest_dist.packing import TILE, Nuq, Packed


def blocks_of(k: Tensor, v: Tensor, rules: Rules) -> Encoded:
    """Tokens [n, G, D], quantised."""
    n = len(k)
    room = (0, 0, 0, 0, 0, -n % TILE)
    there = (torch.arange(n + room[-1]) < n).view(-1, TILE)
    return encoded(*(pad(x, room).view(-1, TILE, *x.shape[1:]) for x in (k, v)), there, rules)


def back_and_forth(k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """What is left of keys and values [n, G, D]."""
    made = blocks_of(k, v, rules)
    n, heads, dim = k.shape
    held = Blocks(rules, torch.empty(0, heads, 2, TILE, dim))
    count = made.codes.shape[0]
    held.grow(count)
    held.put(list(range(count)), made, full=True)
    return stood_for(held, list(range(count)), n, dim)


def stood_for(held: Blocks, ids: list[int], tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """The first tokens of a row whose blocks are named, fp32 [tokens, G, D] each."""
    still = torch.ones(tokens, dim // 2), torch.zeros(tokens, dim // 2)
    nuq = Nuq(held.key_norms, held.norms, held.starts, held.outliers, *still, 0)
    end = torch.tensor([tokens], dtype=torch.int32)
    table = torch.tensor([ids], dtype=torch.int32)
    packed = Packed(held.codes, table, end, end, held.levels, TILE, nuq)
    heads = held.codes.shape[1]
    own = torch.zeros(len(ids), heads, 2, TILE, dim)
    pages = torch.arange(len(ids), dtype=torch.int32)[None]
    found, _ = reference_packed.dense(packed, own, pages, end)
    k, v = found.permute(2, 0, 3, 1, 4).reshape(2, -1, heads, dim)[:, :tokens].float()
    return k, v
