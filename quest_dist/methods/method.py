"""What a method is: it *selects* what its rows attend to, and may look at the resulting
probabilities.

One instance serves the rows of one method in one batch (same settings, different budgets) and is
made fresh for every sample, so nothing leaks between samples. It sees the cache only through a
`View`. Eviction is "never selected again". A budget is tokens attended by a query in one decode
step, the new token included.

Shape letters: R rows, H query heads, G kv heads, g = H/G, D head dim, S page size, L tokens of a
row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from quest_dist import on_flashinfer, ops
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended

Gqa = Literal["per_query", "max", "mean"]
GQA_CHOICES: tuple[Gqa, ...] = ("per_query", "max", "mean")


@dataclass(frozen=True)
class Selection:
    """What each row attends to in one layer of one step.

    `index` int32 [R, Hs, K] lists logical pages or token positions, `count` int32 [R, Hs] how many
    entries hold (-1: all tokens of the row); Hs is 1 (one list a row), G (one a kv head) or H (one
    a query head). `index is None`: all rows attend to everything. `rolled_query` [R, H, D] replaces
    the query for the first `rolled` listed tokens (StreamingLLM's rolling positions).
    """

    index: Tensor | None = None
    count: Tensor | None = None
    unit: Literal["pages", "tokens"] = "pages"
    rolled_query: Tensor | None = None
    rolled: int = 0


EVERYTHING = Selection()


@dataclass(frozen=True)
class View:
    """The rows of one group in one layer of one decode step: all that a method may ask of the
    cache."""

    layer: int
    step: int
    kv: Tensor
    meta: Tensor
    page_table: Tensor
    lengths: Tensor
    lengths_list: tuple[int, ...]
    page_size: int
    heads: int
    kv_heads: int
    scale: float
    rotate: Callable[[Tensor, Tensor], Tensor]
    through: ops.Through = "compiled"

    def page_scores(
        self, q: Tensor, radius_scale: float, reduce: Gqa, *, score_open: bool = False
    ) -> Tensor:
        """Scores of pages for q [R, H, D]: fp32 [R, H or G, P] (ops.page_scores)."""
        return ops.page_scores(
            q,
            self.kv,
            self.meta,
            self.page_table,
            self.lengths,
            radius_scale=radius_scale,
            reduce=reduce,
            score_open=score_open,
        )

    def token_scores(self, q: Tensor) -> Tensor:
        """Scaled q.k of every token: fp32 [R, H, longest], -inf beyond a row's length."""
        return ops.token_scores(q, self.kv, self.page_table, self.lengths, scale=self.scale)

    def attend(self, q: Tensor, selection: Selection, *, probabilities: bool) -> Attended:
        """Exact attention over the selected tokens."""
        return ops.attend(
            q,
            self.kv,
            self.page_table,
            self.lengths,
            index=selection.index,
            count=selection.count,
            unit=selection.unit,
            scale=self.scale,
            probabilities=probabilities,
            rolled_query=selection.rolled_query,
            rolled=selection.rolled,
            through=self.through,
        )


@dataclass(frozen=True)
class PageRule:
    """A method that one `ops.decode` a layer carries out with nothing but lengths and budgets.

    `keep(lengths, budgets, page_size)` says how many pages each row attends to, int32 [R], all of
    them where negative: the last one and the best by `ops.page_scores`. It computes where the
    lengths are and reads nothing back. None: everything is attended to.
    """

    keep: Callable[[Tensor, Tensor, int], Tensor] | None = None
    radius_scale: float = 1.0
    reduce: Gqa = "max"


@dataclass
class Method(ABC):
    """A method with its settings; `begin` gives it the rows that it serves.

    `backend` compiled | flashinfer says whose kernels attend for it and for its dense layers; it is
    no part of the selection. Only a method that `selects_pages`, or everything, may leave compiled.

    A method that holds the cache in a form of its own sets `attends` and overrides `attend`; where
    that form rounds keys or values, it is not `exact`. One that reads back what a GPU has computed
    `waits`. One that needs something made from the model beforehand names in `calibration` who
    makes it (quest_dist.calibrators.MODULE) and is given its file as `artefact`.
    """

    selects_pages: ClassVar[bool] = False
    budgeted: ClassVar[bool] = True
    needs_probabilities: ClassVar[bool] = False
    needs_prefill: ClassVar[bool] = False
    attends: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    waits: ClassVar[bool] = False
    calibration: ClassVar[str | None] = None

    backend: ops.Through = field(default="compiled", kw_only=True)
    artefact: str | None = field(default=None, kw_only=True)
    budgets: tuple[int, ...] = field(default=(), init=False, repr=False)

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve rows with these budgets, whose contexts have just been prefilled to `lengths`
        tokens."""
        self.budgets = tuple(budgets)

    def observe_prefill(  # noqa: B027 - looking is optional
        self, layer: int, row: int, q: Tensor, k: Tensor, scale: float
    ) -> None:
        """Look at one prefill (chunk): q [1, H, n, D] are the last n of the L queries, k [1, G, L,
        D]."""

    @abstractmethod
    def select(self, view: View, q: Tensor) -> Selection:
        """Choose what each row attends to, for q [R, H, D]. The new token is in the cache
        already."""

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention of q [R, H, D] over the selection: exact, over the pool's pages, unless a
        method `attends` by itself."""
        return view.attend(q, selection, probabilities=self.needs_probabilities)

    def observe(  # noqa: B027 - looking is optional
        self, view: View, selection: Selection, probabilities: Tensor
    ) -> None:
        """Look at the probabilities fp32 [R, H, M] in the order of the selection, zero beyond a
        list (if `needs_probabilities`). M is at least the longest list; a GPU's is the slots of a
        row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named; the others have finished."""
        self.budgets = tuple(self.budgets[row] for row in rows)

    def page_rule(self) -> PageRule | None:
        """What `select` does, as a page rule; None where it is not one."""
        return None

    def rule_alone(self) -> PageRule:
        """The page rule of a method that decodes on the device alone; ValueError for a method that
        has none, and for a backend that plans on the host."""
        rule = self.page_rule()
        if self.backend != "compiled":
            raise ValueError(
                f"backend={self.backend} plans each call on the host, so it cannot decode on the"
                " device alone; choose compiled"
            )
        if rule is None:
            raise ValueError(
                "as it is set it is no page rule, so it cannot decode on the device alone; full"
                " can, and quest and tightbound with variant=normative metadata=exact"
            )
        return rule

    @abstractmethod
    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """Fewest and most tokens that a query head attends to at this length and decode step (0 =
        the first)."""

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """Bytes that one layer of a row fetches in a decode step at `length`, when each kv head
        read `read` tokens (their mean)."""
        return read * shape.token_bytes

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """Bytes that one layer of a row must hold to go on from `length` tokens, as this method is
        meant to be deployed (what is never selected again is not held)."""
        return length * shape.token_bytes

    def check_budget(self, budget: int, page_size: int) -> None:
        """Raise ValueError for a budget that this method cannot honour."""
        if budget < 1:
            raise ValueError(f"budget={budget}: a query attends to at least 1 token")

    def check_backend(
        self, device: str, dtype: str | None = None, head_dim: int | None = None
    ) -> None:
        """Raise ValueError for a backend that this method or a model (None: not known) rules
        out."""
        check_choice("backend", self.backend, ops.THROUGH)
        if self.backend == "compiled":
            return
        if not self.selects_pages:
            raise ValueError(
                f"backend={self.backend} attends to pages, but {type(self).__name__} lists tokens; "
                "choose compiled"
            )
        on_flashinfer.check(device, dtype, head_dim)


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{key}={value!r}: choose one of {', '.join(choices)}")


def as_int32(values: Sequence[int], device: torch.device) -> Tensor:
    """A small int32 tensor where the rows are, as `view.lengths.device` says."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)
