"""Decoders to time: models of random weights, a cache of random tokens, and what goes on from it.

The sizes are those of real models; nothing is downloaded and no prompt is prefilled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from quest_dist.attention import Patch
from quest_dist.batch import Group
from quest_dist.latency import Decoder
from quest_dist.pool import Geometry, Pool, Rows
from quest_dist.shapes import PAGE_SIZE, SHAPES, Point, Shape
from quest_dist.tasks.textgen import PACKED_BYTES, check_shape

BLOCK = 2048  # tokens of the random block that fills a cache


@dataclass(frozen=True)
class Model:
    """A decoder's sizes; `shape` is its attention's. `tied`: embeddings are the output's weights
    too."""

    shape: Shape
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    theta: float = 10000.0
    tied: bool = False
    weight_bits: int = 16

    @classmethod
    def of(cls, label: str, shape: Mapping[str, Any], weight_bits: int = 16) -> Model:
        """The sizes that a model's `shape` states; ValueError naming what it lacks."""
        check_shape(shape)
        heads, kv_heads, head_dim = (int(shape[n]) for n in ("heads", "kv_heads", "head_dim"))
        return cls(
            Shape(label, label, heads, kv_heads, head_dim),
            layers=int(shape["layers"]),
            hidden=int(shape["hidden"]),
            intermediate=int(shape["intermediate"]),
            vocabulary=int(shape["vocab"]),
            theta=float(shape["rope_theta"]),
            tied=bool(shape["tied"]),
            weight_bits=weight_bits,
        )

    def sizes(self, tokens: int) -> dict[str, Any]:
        """Fields of transformers' LlamaConfig, for sequences of so many tokens."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "max_position_embeddings": tokens,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": self.tied,
        }

    @property
    def projected(self) -> int:
        """Weights of the projections of all layers, which may have 4 bits."""
        heads = 2 * (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate)

    @property
    def read_parameters(self) -> int:
        """Weights that a step reads: all but the embeddings, of which it looks one row up."""
        norms = self.hidden * (2 * self.layers + 1)
        return self.projected + norms + self.hidden * self.vocabulary

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Of the weights that a step reads."""
        if self.weight_bits == 16:
            return self.read_parameters * dtype.itemsize
        full = (self.read_parameters - self.projected) * dtype.itemsize
        return full + round(self.projected * PACKED_BYTES)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.read_parameters + (0 if self.tied else self.vocabulary * self.hidden)

    def cache_bytes(self, context: int, dtype: torch.dtype, decoders: int, steps: int) -> int:
        """Memory of the pages: the context's, and those of so many decoders' steps."""
        pages = pages_needed(context, decoders, steps)
        return self.layers * Point(self.shape, pages * PAGE_SIZE).layer_bytes(dtype)

    def dense_bytes(self, context: int, dtype: torch.dtype) -> int:
        """What a dense step must read."""
        everything = Point(self.shape, context).dense_bytes(dtype)
        return self.weight_bytes(dtype) + self.layers * everything

    def quest_bytes(
        self,
        context: int,
        budget: int,
        dense_layers: int,
        dtype: torch.dtype,
        page_size: int = PAGE_SIZE,
    ) -> int:
        """What a step under Quest must read."""
        point = Point(self.shape, context, page_size=page_size)
        if budget >= context:
            return self.dense_bytes(context, dtype)
        saved = point.dense_bytes(dtype) - point.least_quest_bytes(budget, dtype)
        return self.dense_bytes(context, dtype) - (self.layers - dense_layers) * saved


MODELS = {
    "7b": Model(SHAPES["7b"], 32, 4096, 11008, 32000),
    "8b": Model(SHAPES["8b"], 32, 4096, 14336, 128256, theta=500000.0),
    "1b": Model(SHAPES["1b"], 16, 2048, 8192, 128256, theta=500000.0, tied=True),
    "tiny": Model(Shape("tiny", "none, for a trial", 4, 2, 16), 4, 64, 128, 256),
}


def pages_needed(context: int, decoders: int, steps: int, page_size: int = PAGE_SIZE) -> int:
    """Pages of a context and of the steps of so many decoders that go on from it."""
    return -(-context // page_size) + decoders * (-(-steps // page_size) + 1)


def filled(
    geometry: Geometry,
    context: int,
    device: torch.device,
    pages: int,
    page_size: int = PAGE_SIZE,
    seed: int = 0,
) -> Rows:
    """One row of normally distributed keys and values, in a pool of `pages` pages."""
    rows = Rows(Pool(geometry, page_size, pages, device), 1)
    random = torch.Generator(device).manual_seed(seed)
    size = (1, geometry.kv_heads, min(BLOCK, context), geometry.head_dim)
    keys, values = (
        torch.randn(size, generator=random, device=device).to(geometry.dtype) for _ in range(2)
    )
    for start in range(0, context, BLOCK):
        tokens = slice(0, min(BLOCK, context - start))
        rows.extend([tokens.stop])
        for layer in range(geometry.layers):
            turned = keys.roll(layer + start // BLOCK, dims=-1)
            rows.append(layer, turned[:, :, tokens], values[:, :, tokens])
    return rows


def continued(
    patched: Patch, prefix: Rows, groups: Mapping[str, Group], steps: int
) -> dict[str, Decoder]:
    """A decoder of so many steps a group, all going on from `prefix`, each recorded where there is
    a GPU."""
    # All have their pages before the first is recorded.
    made = {
        name: Decoder(patched, prefix.fork(0, 1), group, steps) for name, group in groups.items()
    }
    for decoder in made.values():
        if decoder.pool.device.type == "cuda":
            decoder.capture()
    return made


def check_step(decoder: Decoder, group: Group, length: int) -> tuple[float, float, float]:
    """What the last step attended to at this length, mean over layers under the method, and the
    fewest and most that it promises; RuntimeError unless each layer kept that promise."""
    page_size = decoder.pool.page_size
    planned = group.method.planned(length, group.budgets[0], page_size, 0)
    ruled = [float(length)] if group.dense_layers >= len(decoder.attended) else []
    for layer, attended in decoder.attended.items():
        low, high = planned if layer >= group.dense_layers else (length, length)
        least, most = int(attended.min()), int(attended.max())
        if not low <= least <= most <= high:
            raise RuntimeError(
                f"layer {layer} attended to {least} to {most} tokens, {low} to {high} are planned"
            )
        if layer >= group.dense_layers:
            ruled.append(float(attended.float().mean()))
    if not bool(decoder.logits.isfinite().all()):
        raise RuntimeError("the step's logits are not finite")
    return sum(ruled) / len(ruled), float(planned[0]), float(planned[1])
