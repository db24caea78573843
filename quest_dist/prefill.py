"""Prefill: the ops over a whole prompt, whose keys and values are dense tensors.

Shape letters: R rows, H query heads, G kv heads, D head dimension, L tokens, of which the queries
are the last n. q, k and v may be strided as projections are, but contiguous in D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_dist import reference_prefill as reference
from quest_dist.arguments import Arguments, strided
from quest_dist.backend import by_reference, compiled, threads


def _take_prompt(a: Arguments, q: Tensor, k: Tensor) -> None:
    a.floats("q", q, "R H n D", contiguous=False)
    a.floats("k", k, "R G L D", contiguous=False)
    a.multiple("H", "G", "query heads share kv heads evenly")
    if a["n"] > a["L"]:
        raise a.refuse("q", f"of {a['n']} queries", f"at most L={a['L']}: they are the last of L")


def prefill_attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Dense causal attention of the last n of L positions: q [R, H, n, D], k, v [R, G, L, D] ->

    [R, n, H, D]. bf16 with D of 64 or 128 is compiled where the CPU multiplies bf16 (probabilities
    are then rounded to bf16 before they weigh values, as in flash attention); else torch's SDPA.
    """
    a = Arguments("prefill_attend", any_float=True)
    _take_prompt(a, q, k)
    a.floats("v", v, "R G L D", contiguous=False)
    scale = a["D"] ** -0.5 if scale is None else scale
    if by_reference():
        return reference.prefill_attend(q, k, v, scale)
    rows, heads, queries, length, dim = (a[letter] for letter in "RHnLD")
    here = q.device.type == "cpu" and q.dtype == torch.bfloat16 and dim in (64, 128)
    if here and compiled().has_prefill():
        native = compiled()
        out = torch.empty(rows, queries, heads, dim, dtype=q.dtype)
        size = native.prefill_workspace(rows, a["G"], length, dim)
        workspace = torch.empty(size, dtype=torch.uint8)
        native.prefill_attend(
            strided(native, q),
            strided(native, k),
            strided(native, v),
            rows,
            heads,
            a["G"],
            queries,
            length,
            dim,
            scale,
            out.data_ptr(),
            workspace.data_ptr(),
            threads(),
        )
        return out
    seen = None
    if 1 < queries < length:
        seen = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(length - queries)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=seen,
        is_causal=queries > 1 and queries == length,
        scale=scale,
        enable_gqa=heads != a["G"],
    )
    return dense.transpose(1, 2).contiguous()


def column_sums(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention mass that each key gets from the last n queries: fp32 [R, H, L]."""
    a = Arguments("column_sums", any_float=True)
    _take_prompt(a, q, k)
    return reference.column_sums(q, k, a["D"] ** -0.5 if scale is None else scale)
