"""The accepted figures of the attention benchmark: what a CPU and what a GPU is held to.

`a_vs_b` is how many times faster a is than b, as the median of paired ratios. Exceptions, by their
targets: `dense_vs_bandwidth` and `dense_vs_copy` compare rates; `score_select_vs_attend` and
`dense_vs_flashinfer` times, where less is better. A figure whose point or side was not measured is
None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from quest_dist.bench.attention_table import Outcome
from quest_dist.bench.flashinfer_sides import QUEST
from quest_dist.ops import Reduce
from quest_dist.timing import paired, spread

Summary = dict[str, float | None]


@dataclass(frozen=True)
class Figures:
    """Where the figures are taken: some shapes at some contexts, one budget, one kind of lists."""

    lists: Reduce = "max"
    budget: int = 2048
    context: int = 32768

    targets: ClassVar[Mapping[str, str]] = {
        "dense_vs_bandwidth": ">= 0.8",
        "quest_vs_dense_8b": ">= 6",
        "quest_vs_dense_7b": ">= 6",
        "quest_vs_sdpa_8b": ">= 30",
        "score_select_vs_attend": "<= 1",
        "shared_rows_ratio": "<= 0.333",
    }

    @property
    def places(self) -> Sequence[tuple[str, int]]:
        """Shapes and contexts of the figures."""
        return (("7b", self.context), ("8b", self.context))

    def summary(self, outcomes: Sequence[Outcome]) -> Summary:
        """The figures by name.

        `shared_rows_ratio` is one call with 26 rows that share a prefix over 26 calls with one row,
        for the 7B shape: it computes 26 queries a key, the 8B shape (`_8b`) four times as many, so
        its bytes allow more. `dense_vs_best_read` divides dense's median by the best single read of
        the whole run. `_shuffled`: the pages lie in random order in the pool.
        """
        quest, each = f"quest {self.budget} {self.lists}", f"quest {self.budget} per_query"
        pieces = f"pieces {self.budget} {self.lists}"
        best_read = max(rate for o in outcomes for visit in o.times.rate("read") for rate in visit)
        mha, gqa = (point_at(outcomes, *place) for place in self.places)
        shuffled_mha, shuffled_gqa = (point_at(outcomes, *place, True) for place in self.places)
        dense = None if gqa is None else spread(gqa.times.rate("dense")).median
        return {
            "dense_vs_bandwidth": share(gqa, "dense", "read"),
            "quest_vs_dense_8b": faster(gqa, "dense", quest),
            "quest_vs_dense_7b": faster(mha, "dense", quest),
            "quest_vs_sdpa_8b": faster(gqa, "sdpa gqa", quest),
            "score_select_vs_attend": selecting(gqa, pieces),
            "shared_rows_ratio": shared(outcomes, "7b"),
            "dense_vs_best_read": None if dense is None else dense / best_read,
            "dense_vs_bandwidth_7b": share(mha, "dense", "read"),
            "quest_vs_dense_8b_per_query": faster(gqa, "dense", each),
            "score_select_vs_attend_7b": selecting(mha, pieces),
            "shared_rows_ratio_8b": shared(outcomes, "8b"),
            "dense_vs_bandwidth_shuffled": share(shuffled_gqa, "dense", "read"),
            "quest_vs_dense_8b_shuffled": faster(shuffled_gqa, "dense", quest),
            "quest_vs_dense_7b_shuffled": faster(shuffled_mha, "dense", quest),
            "best_read_gbs": best_read / 1000,
        }


@dataclass(frozen=True)
class GpuFigures(Figures):
    """On a GPU: whole operations in microseconds, and against the fastest FlashInfer of the run."""

    long: int = 131072

    targets: ClassVar[Mapping[str, str]] = {
        "quest_us_8b_32k": "<= 16",
        "quest_vs_flashinfer_8b_32k": ">= 3.6",
        "quest_us_8b_128k": "<= 26",
        "quest_vs_flashinfer_8b_128k": ">= 8",
        "quest_vs_flashinfer_7b_32k": ">= 5.8",
        "dense_vs_flashinfer_8b_32k": "<= 1.05",
    }

    @property
    def places(self) -> Sequence[tuple[str, int]]:
        """Shapes and contexts of the figures."""
        return (("8b", self.context), ("8b", self.long), ("7b", self.context))

    def summary(self, outcomes: Sequence[Outcome]) -> Summary:
        """The figures by name, those with a target first.

        `quest_on_flashinfer` selects as ours does and attends with FlashInfer. Names say 32k and
        128k for the two contexts.
        """
        quest, rival = (f"{side} {self.budget} {self.lists}" for side in ("quest", QUEST))
        found: Summary = {}
        for (shape, context), size in zip(self.places, ("32k", "128k", "32k"), strict=True):
            outcome, place = point_at(outcomes, shape, context), f"{shape}_{size}"
            best = outcome.flashinfer if outcome else None
            timed = outcome is not None and outcome.has(quest)
            us = spread(outcome.times.us(quest)).median if outcome and timed else None
            found |= {
                f"quest_us_{place}": us,
                f"quest_vs_flashinfer_{place}": faster(outcome, best, quest),
                f"dense_vs_flashinfer_{place}": faster(outcome, "dense", best),
                f"quest_vs_quest_on_flashinfer_{place}": faster(outcome, rival, quest),
                f"quest_vs_dense_{place}": faster(outcome, "dense", quest),
                f"quest_vs_sdpa_{place}": faster(outcome, "sdpa gqa", quest),
                f"dense_vs_copy_{place}": share(outcome, "dense", "copy"),
            }
        copies = [spread(o.times.rate("copy")).median for o in outcomes if o.has("copy")]
        accepted = {name: found[name] for name in self.targets}
        return accepted | found | {"copy_gbs": median(copies) / 1000 if copies else None}


def point_at(
    outcomes: Sequence[Outcome], shape: str, context: int, shuffled: bool = False
) -> Outcome | None:
    """The shape's point of one row at this context, its pages in this order."""
    for outcome in outcomes:
        point = outcome.point
        found = (point.shape.name, point.context, point.rows, point.shuffled)
        if found == (shape, context, 1, shuffled):
            return outcome
    return None


def faster(outcome: Outcome | None, base: str | None, side: str | None) -> float | None:
    """How many times faster than `base` the side is."""
    return None if outcome is None else outcome.faster(base, side)


def share(outcome: Outcome | None, side: str, of: str) -> float | None:
    """The side's rate as a share of a bandwidth."""
    if outcome is None or not outcome.has(of):
        return None
    return paired(outcome.times.rate(side), outcome.times.rate(of))


def selecting(outcome: Outcome | None, pieces: str) -> float | None:
    """The time to score and to select as a share of that to attend."""
    if outcome is None or not outcome.has(pieces):
        return None
    times = outcome.times
    return paired(times.us(pieces, "score", "select"), times.us(pieces, "attend"))


def shared(outcomes: Sequence[Outcome], shape: str) -> float | None:
    """The time of one call of rows that share a prefix as a share of that of one call a row."""
    for outcome in outcomes:
        if outcome.has("calls") and outcome.point.shape.name == shape:
            return outcome.faster("dense", "calls")
    return None
