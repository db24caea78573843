"""Ordering: does the order of methods that the paper argues for hold, budget by budget?

    oracle_page >= tightbound >= quest >= {h2o, tova} >= streaming

Each method is compared with those of the next tier that was run, at equal budget and setting. A
step *holds* where the better method's estimate is no worse, is *within interval* where it is worse
but the 95 % interval of the difference reaches zero, and *fails* where it does not. Differences are
paired over samples where records are given, else those of independent means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quest_dist import stats
from quest_dist.stats import Estimate
from quest_dist.table import Records, Row

TIERS = (("oracle_page",), ("tightbound",), ("quest",), ("h2o", "tova"), ("streaming",))
HOLDS, WITHIN, FAILS = "holds", "within interval", "fails"


@dataclass(frozen=True)
class Step:
    """Two rows of neighbouring tiers at one budget; `lead` is how much better the first one is.

    `bound` is the page oracle at that budget: where it is hardly ahead of `worse` itself, whole
    pages are too coarse, and no estimate of them could do better.
    """

    better: Row
    worse: Row
    lead: Estimate
    bound: Row | None = None

    @property
    def verdict(self) -> str:
        """Return holds, within interval or fails; one sample can only hold or be within."""
        if self.lead.value >= 0:
            return HOLDS
        return FAILS if self.lead.high < 0 else WITHIN

    def __str__(self) -> str:
        low, high = self.lead.low, self.lead.high
        span = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
        names = f"{self.better.label} - {self.worse.label} at {self.better.budget}"
        bound = f", {self.bound.label} {self.bound.score:.1f}" if self.bound else ""
        return f"{names}: {self.lead.value:+.1f}{span}{bound}"


def steps(rows: Sequence[Row], records: Records | None = None) -> list[Step]:
    """All comparisons that a table allows, by setting, budget and tier."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.budget is not None and row.n:
            where = (*row.setting, row.task, row.page_size, row.dense_layers)
            groups.setdefault((*where, row.budget), []).append(row)
    found = []
    for members in groups.values():
        oracle = next((row for row in members if row.method == "oracle_page"), None)
        for better, worse in _neighbours(members):
            bound = None if oracle in (better, worse) else oracle
            found.append(Step(better, worse, _lead(better, worse, records), bound))
    return found


def statements(rows: Sequence[Row], records: Records | None = None) -> list[str]:
    """One sentence for each task and model of a table: how often the order holds, and where not."""
    found: dict[tuple[str, str], list[Step]] = {}
    for step in steps(rows, records):
        found.setdefault((step.better.task_label, step.better.model_label), []).append(step)
    return [_sentence(*place, members) for place, members in found.items()]


def _sentence(task: str, model: str, members: Sequence[Step]) -> str:
    by = {word: [s for s in members if s.verdict == word] for word in (HOLDS, WITHIN, FAILS)}
    text = f"{task} on {model}: {_order(members)} "
    if len(by[HOLDS]) == len(members):
        return f"{text}holds in all {len(members)} comparisons at equal budget"
    text += f"holds in {len(by[HOLDS])} of {len(members)} comparisons at equal budget"
    for word in (FAILS, WITHIN):
        if by[word]:
            said = "fails" if word == FAILS else "is reversed within intervals"
            text += f"; {said} in {len(by[word])} ({', '.join(map(str, by[word]))})"
    return text


def _order(members: Sequence[Step]) -> str:
    labels = {row.method: row.label for step in members for row in (step.better, step.worse)}
    tiers = [[labels[name] for name in tier if name in labels] for tier in TIERS]
    named = [tier[0] if len(tier) == 1 else f"{{{', '.join(tier)}}}" for tier in tiers if tier]
    return " \u2265 ".join(named)


def _neighbours(members: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Pairs of rows of one budget whose methods stand in neighbouring tiers."""
    present = [[row for row in members if row.method in tier] for tier in TIERS]
    for upper, lower in pairwise([tier for tier in present if tier]):
        yield from ((better, worse) for better in upper for worse in lower)


def _lead(better: Row, worse: Row, records: Records | None) -> Estimate:
    """How much better one row is, in the unit of the score, whichever direction is good."""
    difference = _paired(better, worse, records) if records else _independent(better, worse)
    if better.metric in stats.LOWER_IS_BETTER:
        value, low, high = -difference.value, -difference.high, -difference.low
        return Estimate(value, low, high, difference.n)
    return difference


def _paired(better: Row, worse: Row, records: Records) -> Estimate:
    scores = [
        {r["sample"]: float(r["score"]) for r in records.records(row.point) if r["error"] is None}
        for row in (better, worse)
    ]
    shared = sorted(scores[0].keys() & scores[1].keys())
    return stats.paired(
        [scores[0][s] for s in shared], [scores[1][s] for s in shared], better.metric
    )


def _independent(better: Row, worse: Row) -> Estimate:
    value = better.score - worse.score
    down = math.hypot(better.score - better.low, worse.high - worse.score)
    up = math.hypot(better.high - better.score, worse.score - worse.low)
    return Estimate(value, value - down, value + up, min(better.n, worse.n))
