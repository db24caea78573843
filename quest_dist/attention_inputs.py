"""What attention is given: queries, rotated keys and values of a model that runs as it always does.

For whatever is made from a model beforehand. The model attends densely and causally through torch's
own kernel, so gradients flow through what is seen; nothing is cached or counted. On exit the
model's own attention is back, also after an exception.

    with seen(model, lambda layer, q, k, v: print(layer, k.shape)):
        model(input_ids, use_cache=False)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEEN = "quest_dist_seen"
#: Called with a layer's number, q [B, H, n, D], and k and v [B, G, n, D].
See = Callable[[int, Tensor, Tensor, Tensor], None]

_WATCHED: WeakKeyDictionary[nn.Module, See] = WeakKeyDictionary()


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx  # type: ignore[assignment]
    _WATCHED[module](layer, query, key, value)
    out = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(SEEN, _attention_function)


@contextmanager
def seen(model: PreTrainedModel, see: See) -> Iterator[None]:
    """Show `see` the inputs of every attention call; sequences are whole, without padding.

    Raises ValueError for a model that is watched already.
    """
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if any(module in _WATCHED for module in modules):
        raise ValueError(f"model {type(model).__name__} is watched already")
    before = model.config._attn_implementation
    try:
        _WATCHED.update(dict.fromkeys(modules, see))
        model.set_attn_implementation(SEEN)
        yield
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            _WATCHED.pop(module, None)


def turned(model: PreTrainedModel, x: Tensor, distance: Tensor) -> Tensor:
    """Rotary-embedded x [R, heads, D] turned by `distance` [R] positions, in fp32; negative
    distances turn back. The dtype of x is kept."""
    rotary = model.base_model.rotary_emb
    cos, sin = cast(nn.Module, rotary)(x.float(), distance[:, None].to(x.device))
    strength = float(getattr(rotary, "attention_scaling", 1.0))
    first, second = x.float().chunk(2, dim=-1)
    halves = torch.cat([-second, first], dim=-1)
    result: Tensor = (x.float() * cos + halves * sin) / strength
    return result.to(x.dtype)
