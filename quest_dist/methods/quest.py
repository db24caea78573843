"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): query-aware selection of pages.

Each closed page keeps the channel-wise maximum M and minimum m of its rotated keys. For a query q
the score

    u = sum_i max(q_i m_i, q_i M_i)  =  q . c + |q| . r      with c = (M + m) / 2, r = (M - m) / 2

bounds every q.k of the page from above (section 3, Algorithm 1). A step attends exactly to the
tokens of the current page and of the K - 1 best others, K = max(1, budget // page_size).

Two variants exist in the released code and differ; both are here. `normative` (the kernels' rule):
the current page is always attended, never scored. `eval_compat` (the released accuracy evaluation):
the current page competes like any other, at least three pages are kept, and the page count is
floored, so that a budget above the length still drops one.

M and m are kept in the dtype of the keys (`metadata=exact`), or in eight bits each (`int8`, see
quest_dist.metadata): half of bf16's bytes, rounded outward, so that u stays a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from quest_dist import ops
from quest_dist.methods.int8_pages import Int8Pages
from quest_dist.methods.method import (
    EVERYTHING,
    GQA_CHOICES,
    Gqa,
    Method,
    PageRule,
    Selection,
    View,
    as_int32,
    check_choice,
)
from quest_dist.methods.traffic import CacheShape

VARIANTS = ("normative", "eval_compat")
METADATA = ("exact", "int8")


def pages_of(length: int, page_size: int) -> int:
    """Pages that `length` tokens fill, the last one perhaps in part."""
    return -(-length // page_size)


def pages_to_keep(length: int, budget: int, page_size: int) -> int:
    """Pages to attend to, the current one included; -1: all of them (budget >= length, or too few
    pages)."""
    keep = max(1, budget // page_size)
    return -1 if budget >= length or pages_of(length, page_size) <= keep else keep


def pages_to_keep_there(lengths: Tensor, budgets: Tensor, page_size: int) -> Tensor:
    """`pages_to_keep` of rows, int32 [R], where their lengths and budgets, int32 [R], are."""
    keep = (budgets // page_size).clamp(min=1)
    pages = (lengths + (page_size - 1)) // page_size
    return keep.masked_fill((budgets >= lengths) | (pages <= keep), -1)


def check_holds_a_page(budget: int, page_size: int) -> None:
    """Raise ValueError for a budget that the current page, always attended to, can exceed."""
    if budget < page_size:
        raise ValueError(
            f"budget={budget}: pages of page_size={page_size} are attended to whole, so it needs at"
            f" least {page_size} tokens"
        )


def tokens_in_pages(length: int, budget: int, page_size: int) -> int:
    """Tokens attended when the current page is one of the kept ones."""
    keep = pages_to_keep(length, budget, page_size)
    if keep < 0:
        return length
    last = length - (pages_of(length, page_size) - 1) * page_size
    return (keep - 1) * page_size + last


@dataclass
class Quest(Method):
    """Settings: `gqa` (per_query: each query head its own pages, as in the paper's accuracy runs;
    max | mean: one list a kv head from the group's scores), `radius_scale` (1.0 is Quest's bound),
    `variant`, `metadata` (exact, or int8 on a CPU).
    """

    selects_pages: ClassVar[bool] = True

    gqa: Gqa = "per_query"
    radius_scale: float = 1.0
    variant: str = "normative"
    metadata: str = "exact"
    _int8: Int8Pages | None = field(default=None, init=False, repr=False)
    _kept: tuple[int, tuple[int, ...]] = field(default=(-1, ()), init=False, repr=False)
    _keep: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("gqa", self.gqa, GQA_CHOICES)
        check_choice("variant", self.variant, VARIANTS)
        check_choice("metadata", self.metadata, METADATA)
        if not 0.0 <= self.radius_scale <= 1.0:
            raise ValueError(f"radius_scale={self.radius_scale}: choose a number from 0 to 1")

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows; their metadata in int8, where asked for, follows from the prefill."""
        super().begin(budgets, lengths)
        self._int8 = Int8Pages(lengths) if self.metadata == "int8" else None

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        if self._int8 is not None:
            self._int8.keep(rows)

    def check_backend(
        self, device: str, dtype: str | None = None, head_dim: int | None = None
    ) -> None:
        """Raise ValueError where int8 cannot be scored, and as all methods do."""
        super().check_backend(device, dtype, head_dim)
        if self.metadata == "int8" and device != "cpu":
            raise ValueError(
                f"metadata=int8 is scored on the cpu only, not on {device}; choose exact"
            )

    def check_budget(self, budget: int, page_size: int) -> None:
        """The current page must fit; eval_compat takes three pages whatever the budget, as the
        released code does."""
        super().check_budget(budget, page_size)
        if self.variant == "normative":
            check_holds_a_page(budget, page_size)

    def reserved(self, page_size: int) -> int:
        """The current page, or the three pages of eval_compat."""
        return page_size if self.variant == "normative" else 3 * page_size

    def select(self, view: View, q: Tensor) -> Selection:
        """The current page and the best others (normative), or the best of all (eval_compat)."""
        if self._kept != (view.step, self.budgets):
            self._kept = view.step, self.budgets
            self._keep = self._pages_to_keep(view.lengths_list, view.page_size)
        keep = self._keep
        if all(pages < 0 for pages in keep):
            return EVERYTHING
        forced = self.variant == "normative"
        how = (q, self.radius_scale, self.gqa)
        if self._int8 is None:
            scores = view.page_scores(*how, score_open=not forced)
        else:
            scores = self._int8.page_scores(view, *how, score_open=not forced)
        items = [pages_of(length, view.page_size) for length in view.lengths_list]
        pages, most = as_int32(items, q.device), as_int32(keep, q.device)
        index, count = ops.select_top(scores, pages, most, force_last=forced)
        return Selection(index, count, "pages")

    def stateless(self) -> bool:
        """Exact metadata lies in the pages; int8's is kept here, a row's own."""
        return self.metadata == "exact" and not self.attends

    def page_rule(self) -> PageRule | None:
        """The normative variant with exact metadata is one; eval_compat lets the current page
        compete, and ops.decode reads no int8."""
        if self.variant != "normative" or self.metadata != "exact":
            return None
        return PageRule(pages_to_keep_there, self.radius_scale, self.gqa)

    def _pages_to_keep(self, lengths: tuple[int, ...], page_size: int) -> tuple[int, ...]:
        rows = zip(lengths, self.budgets, strict=True)
        return tuple(self._pages_to_keep_of(length, budget, page_size) for length, budget in rows)

    def _pages_to_keep_of(self, length: int, budget: int, page_size: int) -> int:
        keep = pages_to_keep if self.variant == "normative" else self._compat_pages
        return keep(length, budget, page_size)

    @staticmethod
    def _compat_pages(length: int, budget: int, page_size: int) -> int:
        keep = max(3, min(length, budget) // page_size)
        return -1 if keep >= pages_of(length, page_size) else keep

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """(K - 1) whole pages and the current one; in eval_compat the current page may be among the
        K or not."""
        if self.variant == "normative":
            tokens = tokens_in_pages(length, budget, page_size)
            return tokens, tokens
        keep = self._compat_pages(length, budget, page_size)
        if keep < 0:
            return length, length
        missing = pages_of(length, page_size) * page_size - length
        return keep * page_size - missing, keep * page_size

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """The metadata of the closed pages, where pages are chosen, and what was read."""
        moved = super().bytes_moved(shape, length, budget, read)
        chosen = self._pages_to_keep_of(length, budget, shape.page_size) >= 0
        return moved + (self._metadata_bytes(shape, length) if chosen else 0.0)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """All tokens, and the metadata of their pages."""
        return super().bytes_held(shape, length, budget) + self._metadata_bytes(shape, length)

    def _metadata_bytes(self, shape: CacheShape, length: int) -> float:
        exact = shape.pages_bytes(length // shape.page_size)
        return exact if self.metadata == "exact" else exact / shape.element_bytes
