"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750): keys and values in 2 or 4 bits, all attended to.

Keys, rotated, are quantised per channel over groups of `group` tokens, values per token over groups
of `group` channels, asymmetrically, with scale and minimum in fp16; the youngest tokens (up to
`residual` keys, `residual` values) and the new one keep their full precision. Prefill attends in
full precision. Attention reads the packed codes themselves (`ops.attend_packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import EVERYTHING, Method, Selection, View
from quest_dist.methods.packed_rows import PackedRows, Packing
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended


@dataclass
class Kivi(Method):
    """Settings: `bits` of a code (2, 3, 4, 8), `group` (a multiple of 16), and `residual` (a
    multiple of the group)."""

    budgeted: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    waits: ClassVar[bool] = True  # which rows share pages

    bits: int = 4
    group: int = 32
    residual: int = 128
    _packing: Packing = field(init=False, repr=False)
    _packed: PackedRows = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        self._packing = Packing(self.bits, self.group, self.residual)

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows."""
        super().begin(budgets, lengths)
        self._packed = PackedRows(self._packing, lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._packed.keep(rows)

    def check_backend(
        self, device: str, dtype: str | None = None, head_dim: int | None = None
    ) -> None:
        """Raise ValueError for heads that cannot be packed, and as all methods do."""
        super().check_backend(device, dtype, head_dim)
        self._packing.check_head(head_dim)

    def select(self, view: View, q: Tensor) -> Selection:
        """Everything."""
        return EVERYTHING

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention over the packed tokens and the residual."""
        packed = self._packed.packed(view)
        place = (view.kv, packed, view.page_table, view.lengths)
        return ops.attend_packed(q, *place, scale=view.scale)

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """All tokens."""
        return length, length

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """The whole cache, as it is before the new token's step packs anything."""
        return self._packing.bytes(shape, length, length - 1)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The packed tokens and the residual."""
        return self._packing.bytes(shape, length, length)
