"""The paper's own numbers, when they may be compared with ours, and the verdict.

Invariants: a paper's value is drawn only beside a point of the paper's model, real data, protocol,
page size and dense layers; everything else is `not comparable`, with the reason. Verdicts never
round in our favour:
    reproduced      the paper's value lies in our 95 % interval and within TOLERANCE of our score
    within interval it lies in our interval, which is too wide to say more
    differs         it lies outside
    not comparable  another model, data, protocol or setting; or one sample, which has no interval
    not run         there is no result
Numbers come from paper.json, which states their source and how they were read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from quest_dist.table import Row

TOLERANCE = {"f1": 2.0, "rouge_l": 2.0, "accuracy": 2.0, "perplexity": 0.05}
PAGE_SIZE, DENSE_LAYERS = 16, 2
PROTOCOLS = ("quest_paper", "quest_released")
ORDER = ("differs", "within interval", "reproduced", "not comparable", "not run")


@dataclass(frozen=True)
class Verdict:
    """How one point, or one whole figure, stands to the paper."""

    verdict: str
    reason: str
    paper: float | None = None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}" if self.reason else self.verdict


@cache
def reference() -> dict[str, Any]:
    """All of paper.json."""
    text = resources.files("quest_dist.figures").joinpath("paper.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def judge(figure: str, row: Row) -> Verdict:
    """The verdict of one point against the same dot of the paper's figure."""
    settings = reference().get(figure)
    if not settings:
        return Verdict("not comparable", "the paper has no such figure")
    if not row.n:
        return Verdict("not run", row.error or row.status)
    setting, reason = beside(figure, row)
    if setting is None:
        return Verdict("not comparable", reason)
    value = _value(setting, row)
    if value is None:
        what = f"{row.label} at {row.budget}" if row.budget else row.label
        return Verdict("not comparable", f"the paper has no {row.task} for {what}")
    distance = row.score - value
    if math.isnan(row.low):
        return Verdict("not comparable", "one sample has no interval", value)
    said = f"ours {row.score:.2f} [{row.low:.2f}, {row.high:.2f}], the paper {value:g}"
    if not row.low <= value <= row.high:
        return Verdict("differs", said, value)
    near = abs(distance) <= TOLERANCE.get(row.metric, 0.0)
    return Verdict("reproduced" if near else "within interval", said, value)


def beside(figure: str, row: Row) -> tuple[dict[str, Any] | None, str]:
    """The paper's setting that a row may be compared with, or None and why there is none."""
    reasons = []
    for setting in reference()[figure]:
        reason = _why_not(row, setting)
        if not reason:
            return setting, ""
        reasons.append(reason)
    return None, sorted(reasons)[0]


def bracket(
    figure: str, row: Row, above: int, upto: float, resolved: bool, delta: float
) -> Verdict:
    """The verdict of a budget known to lie in (above, upto]; `resolved`: at no other of ours.

    `row` says what was measured; the paper's value is its task's and method's.
    """
    setting, reason = beside(figure, row)
    if setting is None:
        return Verdict("not comparable", reason)
    value = setting["values"].get(row.task, {}).get(row.method)
    if value is None:
        return Verdict("not comparable", f"the paper has no {row.task} for {row.label}")
    ours = f"ours above {above}" + (f", from {upto:g} on" if math.isfinite(upto) else "")
    said = f"{ours} (delta {delta:g}); the paper {value}, without a delta"
    if not above < value <= upto:
        return Verdict("differs", said, value)
    return Verdict("reproduced" if resolved else "within interval", said, value)


def worst(verdicts: Sequence[Verdict], what: str) -> Verdict:
    """The worst of the verdicts that compare with the paper, and how many of `what` they are."""
    compared = [v for v in verdicts if v.paper is not None and v.verdict in ORDER[:3]]
    if not compared:
        return next((v for v in verdicts), Verdict("not run", f"no {what}"))
    found = min(compared, key=lambda v: ORDER.index(v.verdict))
    differ, wide, same = (sum(v.verdict == word for v in compared) for word in ORDER[:3])
    said = f"{differ} differ, {wide} within interval, {same} reproduced"
    return Verdict(found.verdict, f"of {len(compared)} {what} {said}")


def overall(figure: str, rows: Sequence[Row]) -> Verdict:
    """The verdict of a whole figure: the worst of its comparable points, and how many they are."""
    each = [judge(figure, row) for row in rows]
    if any(v.paper is not None and v.verdict in ORDER[:3] for v in each):
        return worst(each, "values")
    for word in ORDER[3:]:
        found = next((v for v in each if v.verdict == word), None)
        if found:
            return found
    return Verdict("not run", "no points")


def _why_not(row: Row, setting: dict[str, Any]) -> str:
    """Why a row may not be compared with a setting of the paper; empty if it may."""
    if setting["model"].lower() not in row.model_label.lower():
        return f"other model ({row.model_label}; the paper: {setting['model']})"
    if row.data == "generated" and row.metric != "accuracy":
        return "generated data"
    if row.protocol not in PROTOCOLS:
        return f"other protocol ({row.protocol})"
    if row.budget is not None and (row.page_size, row.dense_layers) != (PAGE_SIZE, DENSE_LAYERS):
        return f"page size {row.page_size} and {row.dense_layers} dense layers; the paper: 16 and 2"
    context = setting["context_tokens"]
    if context and not 0.75 < row.context_tokens / context < 1.25:
        return f"context of {row.context_tokens:.0f} tokens; the paper: {context}"
    return ""


def _value(setting: dict[str, Any], row: Row) -> float | None:
    found = setting["values"].get(row.task, {}).get(row.method)
    if isinstance(found, dict):
        found = found.get(str(row.budget))
    return None if found is None else float(found)
