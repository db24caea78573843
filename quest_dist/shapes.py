"""Shapes: the models whose attention is timed, and the sizes in bytes that this follows from.

Shape letters: R rows, H query heads, G kv heads, S page size, D head dimension, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quest_dist.ops import Reduce

PAGE_SIZE = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """One attention layer of a model."""

    name: str
    model: str
    heads: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's key and value, which are also those of one page's metadata."""
        return 2 * self.kv_heads * self.head_dim * dtype.itemsize


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("7b", "Llama-2-7B", 32, 32, 128),
        Shape("8b", "Llama-3-8B", 32, 8, 128),
        Shape("1b", "Llama-3.2-1B", 32, 8, 64),
    )
}


@dataclass(frozen=True)
class Point:
    """Rows that decode one token each at one context length, in pages of `page_size`.

    `shared`: the rows have one prefix, all but the last page. `quests` are the (budget, lists) to
    time beside dense; lists as in `ops.page_scores`: `max` and `mean` give one list a kv head,
    `per_query` one a query head. `shuffled`: pages lie in random order in the pool, not in that in
    which it hands them out.
    """

    shape: Shape
    context: int
    rows: int = 1
    shared: bool = False
    quests: tuple[tuple[int, Reduce], ...] = ()
    shuffled: bool = False
    page_size: int = PAGE_SIZE

    def __str__(self) -> str:
        """For people."""
        prefix = "" if self.rows == 1 else f", {self.rows} rows, {self.prefix} prefix"
        order = ", shuffled" if self.shuffled else ""
        return f"{self.shape.name} at {self.context} tokens{prefix}{order}"

    @property
    def prefix(self) -> str:
        """The word in the table."""
        return "shared" if self.shared else "separate"

    @property
    def order(self) -> str:
        """Of the pages in the pool: the word in the table."""
        return "shuffled" if self.shuffled else "as handed out"

    @property
    def pages(self) -> int:
        """Distinct pages of all rows."""
        each = self.context // self.page_size
        return each - 1 + self.rows if self.shared else each * self.rows

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """What dense attention must read: every distinct key and value once."""
        return self.pages * self.page_size * self.shape.token_bytes(dtype)

    def score_bytes(self, dtype: torch.dtype) -> int:
        """What scoring must read: the metadata of every distinct closed page once."""
        return (self.pages - self.rows) * self.shape.token_bytes(dtype)

    def least_quest_bytes(self, budget: int, dtype: torch.dtype) -> int:
        """What one Quest step reads at least (rows and heads that share may agree on all pages)."""
        lists = 1 if self.shared else self.rows
        return self.score_bytes(dtype) + lists * budget * self.shape.token_bytes(dtype)

    def layer_bytes(self, dtype: torch.dtype) -> int:
        """Memory of one layer's pool: keys, values and metadata."""
        return self.dense_bytes(dtype) + self.pages * self.shape.token_bytes(dtype)


def parsed_size(text: str) -> int:
    """48K -> 49152; 0 for what is no such number."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip(), flags=re.IGNORECASE)
    if found is None:
        return 0
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2].upper()]


def parsed_sizes(option: str, texts: Sequence[str] | None, default: Sequence[int]) -> list[int]:
    """The numbers that an option gives (8192, 8K, ...); ValueError naming it and the wrong one."""
    numbers = list(default) if texts is None else [parsed_size(text) for text in texts]
    if texts is not None and 0 in numbers:
        wrong = texts[numbers.index(0)]
        raise ValueError(f"{option}={wrong}: expected positive numbers such as 8192 or 8K")
    return list(dict.fromkeys(numbers))
