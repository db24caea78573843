"""Full: dense attention over the whole cache. The reference that every other method is compared
with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from quest_dist.methods.method import EVERYTHING, Method, PageRule, Selection, View


@dataclass
class Full(Method):
    """softmax(q K^T / sqrt(d)) V over all tokens; it has no budget."""

    selects_pages: ClassVar[bool] = True
    budgeted: ClassVar[bool] = False

    def select(self, view: View, q: Tensor) -> Selection:
        """Everything."""
        return EVERYTHING

    def page_rule(self) -> PageRule:
        """Everything."""
        return PageRule()

    def stateless(self) -> bool:
        """Nothing is kept between steps."""
        return True

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """All tokens."""
        return length, length
