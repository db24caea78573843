"""Quest on quantised pages: pages are chosen by exact metadata, and attended to as KIVI packs them.

Quest's paper holds that page selection composes with quantisation of the cache; here a step reads
the metadata of all pages, and of those chosen the packed tokens (see quest_dist.methods.kivi), or
the pool's own where they are still in the residual. Eight bits are int8 pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import PageRule, Selection, View
from quest_dist.methods.packed_rows import PackedRows, Packing
from quest_dist.methods.quest import Quest
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended


@dataclass
class QuestPacked(Quest):
    """Settings: Quest's, and KIVI's `bits`, `group` and `residual`."""

    selects_pages: ClassVar[bool] = False  # packed tokens are attended to by our kernels alone
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
        super().__post_init__()
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
        """Raise ValueError for heads that cannot be packed, and as Quest does."""
        super().check_backend(device, dtype, head_dim)
        self._packing.check_head(head_dim)

    def page_rule(self) -> PageRule | None:
        """None: ops.decode reads no packed tokens."""
        return None

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention over the selected pages, packed tokens from their codes."""
        return ops.attend_packed(
            q,
            view.kv,
            self._packed.packed(view),
            view.page_table,
            view.lengths,
            selection.index,
            selection.count,
            selection.unit,
            view.scale,
        )

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """The metadata where pages are chosen; of the tokens read the current page's in full, the
        others at the mean of the cache."""
        metadata = super().bytes_moved(shape, length, budget, 0.0)
        current = min((length - 1) % shape.page_size + 1, read)
        whole = self._packing.bytes(shape, length, length - 1)
        rest = whole - current * shape.token_bytes
        others = (read - current) * rest / max(1, length - current)
        return metadata + current * shape.token_bytes + others

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The packed tokens, the residual and the pages' metadata."""
        metadata = super().bytes_held(shape, length, budget) - length * shape.token_bytes
        return metadata + self._packing.bytes(shape, length, length)
