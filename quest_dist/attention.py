"""The one Hugging Face patch: attention function and cache, as a context manager that restores
everything.

It works on any decoder that goes through transformers' attention interface (Llama, Mistral, Qwen2,
Qwen3, ...): the model's own code projects, rotates and calls the attention function with this
step's q, k, v; ours writes k, v to the paged cache and attends. Nothing of the model is copied or
changed; on exit its own attention is back, also after an exception.

    with patched(model, method="quest", budget=1024):
        model.generate(**inputs)

A multi-token forward is a prefill (dense, exact); a one-token forward is a decode step under the
method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
import yaml
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quest_dist import artefacts
from quest_dist.arguments import check_device
from quest_dist.attention_inputs import turned
from quest_dist.batch import Group, new_batch
from quest_dist.folders import find
from quest_dist.methods.method import Method
from quest_dist.plan import Spec
from quest_dist.pool import Geometry
from quest_dist.suggest import did_you_mean

ATTENTION = "quest_dist"


class Attends(Protocol):
    """Rows whose attention is patched in; `batch.Batch` says what its methods do."""

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Take the new keys and values of a layer."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the tokens just written."""

    def count(self) -> None:
        """A forward pass is over."""


class PagedCache(Cache):
    """transformers' view of rows: what the model writes to and asks the length of."""

    def __init__(self, batch: Attends | None = None) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.padding: list[int] | None = None
        self.seen = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values [R, G, n, D]; returns them unchanged."""
        assert self.batch is not None
        self.batch.write(layer_idx, key_states, value_states, self.padding)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen by earlier forward passes, padding included, as the caller counts them."""
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask; ours needs none."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def get_max_length(self, layer_idx: int | None = 0) -> int:
        """No limit of its own."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """The patched attention runs eagerly."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a forward pass has given it rows."""
        return self.batch is not None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search is refused: raises ValueError."""
        raise ValueError(
            "num_beams: beam search is not supported by the patched attention; use num_beams=1"
        )

    def crop(self, *args: Any) -> None:
        """Rolling back is refused: raises ValueError."""
        raise ValueError("assisted generation is not supported by the patched attention")


class Patch:
    """A model whose attention goes through `cache` while the patch is on."""

    def __init__(self, model: PreTrainedModel, fresh_groups: Any, page_size: int) -> None:
        self.model = model
        self.geometry = geometry_of(model)
        self.page_size = page_size
        self._fresh_groups = fresh_groups
        self._cache: PagedCache | None = None
        self._new = 0

    def before_forward(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Put our cache in the place of an absent or empty one."""
        cache = kwargs.get("past_key_values")
        if kwargs.get("use_cache") is False:
            raise ValueError("use_cache=False: the patched attention works on its cache")
        if not isinstance(cache, PagedCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError(
                    "past_key_values was filled before the patch; start from an empty cache"
                )
            cache = kwargs["past_key_values"] = PagedCache()
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ValueError("input_ids: pass the tokens to the patched model")
        if cache.batch is None:
            groups = self._fresh_groups(tokens.shape[0])
            cache.batch = new_batch(
                self.geometry,
                self.page_size,
                groups,
                rows=tokens.shape[0],
                rotate=self.rotate,
                reserve=tokens.shape[1],
                device=self.model.device,
            )
        cache.padding = left_padding(kwargs.get("attention_mask"), tokens.shape[1])
        self._cache, self._new = cache, tokens.shape[1]
        return args, kwargs

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        """Count what the step attended to."""
        assert self._cache is not None
        assert self._cache.batch is not None
        self._cache.batch.count()
        self._cache.seen += self._new
        self._cache = None

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one layer: q [R, H, n, D] -> [R, n, H, D]."""
        assert self._cache is not None, "the patched model is called through its forward"
        assert self._cache.batch is not None
        layer: int = module.layer_idx  # type: ignore[assignment]
        return self._cache.batch.attend(layer, q, k, v, scale)

    def rotate(self, q: Tensor, distance: Tensor) -> Tensor:
        """Turn rotary-embedded q [R, H, D] by `distance` [R] positions, in fp32."""
        return turned(self.model, q, distance)


_PATCHES: WeakKeyDictionary[nn.Module, Patch] = WeakKeyDictionary()


def _attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for feature in ("softcap", "s_aux"):
        if kwargs.get(feature) is not None:
            raise ValueError(
                f"{type(module).__name__} uses {feature}: not supported by the patched attention"
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _PATCHES[module].attend(module, query, key, value, scale), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention_function)


def geometry_of(model: PreTrainedModel) -> Geometry:
    """The attention shape of a model; ValueError when it does not go through the attention
    interface."""
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model {name}: it does not use transformers' attention interface, so it cannot be "
            "patched; Llama, Mistral, Qwen2 and Qwen3 style decoders can"
        )
    check_placed(model)
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    sliding = getattr(config, "sliding_window", None)
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        sliding = None
    if not getattr(config, "use_sliding_window", True):
        sliding = None
    return Geometry(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        window=sliding,
    )


def check_placed(model: PreTrainedModel) -> None:
    """Raise where the ops cannot work on a model: ValueError for a model spread over devices or of
    a dtype or on a device without kernels, ImportError where these are not built."""
    name = type(model).__name__
    places = {parameter.device for parameter in model.parameters()}
    if len(places) > 1:
        listed = ", ".join(sorted(map(str, places)))
        raise ValueError(f"model {name} is spread over {listed}: put it on one device")
    check_device(f"model {name}", model.device, model.dtype)


def left_padding(mask: Tensor | None, new: int) -> list[int] | None:
    """Leading tokens of each row that are padding, from a 2-D attention mask; None without any.

    Raises ValueError for padding elsewhere: rows must end with their newest token.
    """
    if mask is None or mask.ndim != 2 or new == 1 or bool(mask.all()):
        return None
    recent = mask[:, -new:].bool()
    padding = (~recent).sum(1)
    expected = torch.arange(new, device=mask.device)[None] >= padding[:, None]
    if not torch.equal(recent, expected) or bool((padding == new).any()):
        raise ValueError("attention_mask: pad on the left (tokenizer.padding_side='left')")
    if not bool(mask[:, :-new].all()) and bool(padding.any()):
        raise ValueError("attention_mask: padding is allowed in the first forward only")
    return [int(pad) for pad in padding]


@contextmanager
def patch(model: PreTrainedModel, fresh_groups: Any, page_size: int) -> Iterator[Patch]:
    """Route the attention of `model` through paged caches; `fresh_groups(rows)` gives the groups of
    a new cache."""
    applied = Patch(model, fresh_groups, page_size)
    modules = [module for module in model.modules() if hasattr(module, "layer_idx")]
    if any(module in _PATCHES for module in modules):
        raise ValueError(f"model {type(model).__name__} is patched already; leave that patch first")
    before = model.config._attn_implementation
    hooks = [
        model.register_forward_pre_hook(applied.before_forward, with_kwargs=True),
        model.register_forward_hook(applied.after_forward),
    ]
    try:
        _PATCHES.update(dict.fromkeys(modules, applied))
        model.set_attn_implementation(ATTENTION)
        yield applied
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            _PATCHES.pop(module, None)
        for hook in hooks:
            hook.remove()


def method_named(name: str, **settings: Any) -> Spec:
    """The method of `conf/method/<name>.yaml` with other settings; ValueError names the nearest for
    a wrong name."""
    folder = find("conf") / "method"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"method={name!r}: no such method; {did_you_mean(name, names)}")
    defaults = yaml.safe_load((folder / f"{name}.yaml").read_text())[name]
    return Spec(name, {**defaults, **settings})


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")


@contextmanager
def patched(
    model: PreTrainedModel,
    method: str = "full",
    budget: int | None = None,
    page_size: int = 16,
    dense_layers: int = 2,
    **settings: Any,
) -> Iterator[PreTrainedModel]:
    """Run `model` under a KV-cache method: every cache that a forward pass or `generate` starts is
    a paged one.

    `budget` is in tokens a query attends to (all methods but `full` need it); the first
    `dense_layers` layers stay dense; `settings` are the method's own. Raises ValueError for what
    the method or the model cannot do.
    """
    spec = method_named(method, **settings)
    if budget is not None:
        _check_whole("budget", budget, 1)
    _check_whole("page_size", page_size, 1)
    _check_whole("dense_layers", dense_layers, 0)
    geometry = geometry_of(model)
    if dense_layers > geometry.layers:
        raise ValueError(f"dense_layers={dense_layers}: the model has {geometry.layers} layers")
    probe: Method = spec.build()
    if probe.budgeted:
        if budget is None:
            raise ValueError(f"method={method!r} needs a budget in tokens, such as budget=1024")
    elif budget is not None:
        raise ValueError(f"budget={budget}: method {method!r} has no budget")
    artefacts.check_named(spec)
    probe.check_layers(budget, page_size)
    probe.check_backend(model.device.type, str(model.dtype), geometry.head_dim)

    def fresh_groups(rows: int) -> list[Group]:
        return [Group(spec.build(), [budget or 0] * rows, dense_layers)]

    with patch(model, fresh_groups, page_size):
        yield model
