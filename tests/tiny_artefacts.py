"""Artefacts of tiny models, made by the real calibrators from a few tokens, once a process."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES, tiny_loaded

from quest_dist import artefacts
from quest_dist.methods.method import Method
from quest_dist.pool import Geometry

#: The shape of tiny_models.tiny.
TINY = Geometry(4, 4, 2, 16, torch.float32)
_FOLDER = tempfile.TemporaryDirectory()


def artefact_for(method: Method, geometry: Geometry = TINY) -> str | None:
    """The file that a method needs for a model of this shape; None where it needs none."""
    if method.calibration is None:
        return None
    settings = artefacts.recipe(method.calibration, vars(method), {}, "")["settings"]
    shape = (geometry.layers, geometry.heads, geometry.kv_heads, geometry.head_dim)
    return str(_made(method.calibration, json.dumps(settings), shape))


def is_tiny(artefact: str | None) -> bool:
    """Whether the file is one that `artefact_for` made."""
    return artefact is not None and Path(artefact).parent == Path(_FOLDER.name)


@functools.cache
def _made(kind: str, settings: str, shape: tuple[int, int, int, int]) -> Path:
    layers, heads, kv_heads, head_dim = shape
    loaded = tiny_loaded(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(1, SIZES["vocab_size"], (2, 48), generator=draw)
    chosen: dict[str, Any] = json.loads(settings)
    tensors = artefacts.calibrator(kind).make(loaded, tokens, chosen)
    place = Path(_FOLDER.name) / f"{kind}-{abs(hash((settings, shape)))}.safetensors"
    artefacts.write(tensors, artefacts.recipe(kind, chosen, {}, ""), place)
    return place
