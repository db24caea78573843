"""Overview: the mean over tasks of each method at each budget, as rows like those of the tasks.

Ten samples a task rarely tell two methods apart; sixty over six tasks often do. Tasks count alike.
Only scores in points (0..100) are averaged, and only where every task of a setting has the point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from quest_dist import stats
from quest_dist.table import Row

#: What a row can be, the least finished first.
STATUSES = ("missing", "failed", "partial", "finished")


def average(table: Sequence[Row]) -> list[Row]:
    """Rows of the mean over tasks, a row for each method and budget that all tasks have scored.

    Tasks count alike. Intervals add up as those of independent means, each at its larger half;
    `n` and `pairs` are samples over all tasks. Only scores in points (0..100) are averaged; fewer
    than two such tasks give no rows.
    """
    scored = [row for row in table if row.metric in stats.POINTS & stats.ACCURACIES]
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in scored:
        unit = (row.method, row.budget, row.page_size, row.dense_layers)
        groups.setdefault((*row.setting, *unit), []).append(row)
    tasks: dict[tuple[object, ...], set[str]] = {}
    for row in scored:
        tasks.setdefault(row.setting, set()).add(row.task)
    rows = []
    for members in groups.values():
        count = len(members)
        if count < 2 or count < len(tasks[members[0].setting]) or not all(r.n for r in members):
            continue
        score, low, high = _mean([(r.score, r.low, r.high) for r in members])
        delta, delta_low, delta_high = _mean(
            [(r.delta, r.delta_low, r.delta_high) for r in members]
        )
        rows.append(
            replace(
                members[0],
                point="",
                task=f"mean of {count} tasks",
                task_label=f"Mean of {count} tasks",
                metric="points",
                n=sum(r.n for r in members),
                n_expected=sum(r.n_expected for r in members),
                score=score,
                low=max(low, 0.0),
                high=min(high, 100.0),
                pairs=sum(r.pairs for r in members),
                delta=delta,
                delta_low=delta_low,
                delta_high=delta_high,
                truncated=sum(r.truncated for r in members),
                status=min((r.status for r in members), key=STATUSES.index),
            )
        )
    return rows


def _mean(estimates: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent estimates (value, low, high) with its interval."""
    value = math.fsum(v for v, _, _ in estimates) / len(estimates)
    half = math.sqrt(math.fsum(max(v - low, high - v) ** 2 for v, low, high in estimates))
    return value, value - half / len(estimates), value + half / len(estimates)


def resolved(lines: Sequence[str]) -> list[str]:
    """What a terminal shows of a recommendation: what is resolved, and how much is not."""
    shown = [line for line in lines if " not resolved with " not in line]
    hidden = len(lines) - len(shown)
    if hidden:
        shown.append(
            f"{hidden} of {len(lines)} comparisons with full are not resolved at this number of"
            " samples; more samples narrow the intervals"
        )
    return shown
