"""Decoders to time: models of random weights, a cache of random tokens, and what goes on from it.

The sizes are those of real models; nothing is downloaded and no prompt is prefilled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from quest_dist import timing
from quest_dist.attention import Patch
from quest_dist.batch import Group
from quest_dist.latency import Decoder
from quest_dist.pool import Geometry, Pool, Rows
from quest_dist.shapes import PAGE_SIZE, SHAPES, Point, Shape

#: Steps that a decoder may be asked for: one to check it, and those of all visits.
STEPS = 1 + (timing.MOST_CYCLES + 1) * (timing.UNCOUNTED + timing.COUNTED)
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

    def sizes(self, context: int) -> dict[str, Any]:
        """Fields of transformers' LlamaConfig, for sequences of `context` tokens and all steps."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.kv_heads,
            "head_dim": self.shape.head_dim,
            "max_position_embeddings": context + STEPS,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.theta},
            "tie_word_embeddings": self.tied,
        }

    @property
    def read_parameters(self) -> int:
        """Weights that a step reads: all but the embeddings, of which it looks one row up."""
        heads = 2 * (self.shape.heads + self.shape.kv_heads) * self.shape.head_dim
        layer = self.hidden * (heads + 3 * self.intermediate + 2)
        return self.layers * layer + self.hidden * (self.vocabulary + 1)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.read_parameters + (0 if self.tied else self.vocabulary * self.hidden)

    def cache_bytes(self, context: int, dtype: torch.dtype) -> int:
        """Memory of the pages: the context's, and those of two decoders' steps."""
        pages = pages_needed(context)
        return self.layers * Point(self.shape, pages * PAGE_SIZE).layer_bytes(dtype)

    def dense_bytes(self, context: int, dtype: torch.dtype) -> int:
        """What a dense step must read."""
        everything = Point(self.shape, context).dense_bytes(dtype)
        return self.read_parameters * dtype.itemsize + self.layers * everything

    def quest_bytes(self, context: int, budget: int, dense_layers: int, dtype: torch.dtype) -> int:
        """What a step under Quest must read."""
        point = Point(self.shape, context)
        saved = point.dense_bytes(dtype) - point.least_quest_bytes(budget, dtype)
        return self.dense_bytes(context, dtype) - (self.layers - dense_layers) * saved


MODELS = {
    "7b": Model(SHAPES["7b"], 32, 4096, 11008, 32000),
    "8b": Model(SHAPES["8b"], 32, 4096, 14336, 128256, theta=500000.0),
    "1b": Model(SHAPES["1b"], 16, 2048, 8192, 128256, theta=500000.0, tied=True),
    "tiny": Model(Shape("tiny", "none, for a trial", 4, 2, 16), 4, 64, 128, 256),
}


def pages_needed(context: int) -> int:
    """Pages of a context and of all steps of two decoders that go on from it."""
    return -(-context // PAGE_SIZE) + 2 * (-(-STEPS // PAGE_SIZE) + 1)


def filled(geometry: Geometry, context: int, device: torch.device) -> Rows:
    """One row of normally distributed keys and values, in a pool with room for two decoders."""
    rows = Rows(Pool(geometry, PAGE_SIZE, pages_needed(context), device), 1)
    random = torch.Generator(device).manual_seed(0)
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


def continued(patched: Patch, prefix: Rows, groups: dict[str, Group]) -> dict[str, Decoder]:
    """A decoder a group, all going on from `prefix`, each recorded where there is a GPU, and one
    step further; that step was what its method promises."""
    length = prefix.lengths_list[0] + 1
    # All have their pages before the first is recorded.
    made = {
        name: Decoder(patched, prefix.fork(0, 1), group, STEPS) for name, group in groups.items()
    }
    for name, decoder in made.items():
        if decoder.pool.device.type == "cuda":
            decoder.capture()
        decoder.step()
        check_step(decoder, groups[name], length)
    return made


def check_step(decoder: Decoder, group: Group, length: int) -> None:
    """RuntimeError unless the last step attended to what its method promises at this length."""
    for layer, attended in decoder.attended.items():
        low = high = length
        if layer >= group.dense_layers:
            low, high = group.method.planned(length, group.budgets[0], PAGE_SIZE, 0)
        least, most = int(attended.min()), int(attended.max())
        if not low <= least <= most <= high:
            raise RuntimeError(
                f"layer {layer} attended to {least} to {most} tokens, {low} to {high} are planned"
            )
    if not bool(decoder.logits.isfinite().all()):
        raise RuntimeError("the step's logits are not finite")
