"""What one layer's cache weighs: bytes that a decode step moves, and bytes that stay held.

A method says how many of each it causes in one layer of one row (`Method.bytes_moved`,
`bytes_held`), from the formulas of its paper and the tokens that were really read; the whole
model's are sums over layers, dense ones included. A byte is counted each time that the kernels have
to fetch it once a kv head: query heads of a group share what they fetch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheShape:
    """The cache of one layer: kv heads, their dimension, bytes an element, tokens a page."""

    kv_heads: int
    head_dim: int
    element_bytes: int
    page_size: int

    @property
    def vector_bytes(self) -> int:
        """One key, or one value, of all kv heads."""
        return self.kv_heads * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Key and value of one token."""
        return 2 * self.vector_bytes

    def pages_bytes(self, pages: int) -> int:
        """The metadata of `pages` pages: two vectors each."""
        return 2 * pages * self.vector_bytes
