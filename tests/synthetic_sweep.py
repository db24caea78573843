"""A sweep that never ran: points, records and a ledger shaped like LongBench's results.

Scores follow a saturating curve of the budget with sample noise shared by all methods, so pairing
with full matters as it does in real data. Deterministic by (task, method, budget, sample).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quest_dist import plan, table
from quest_dist.ledger import Ledger

TASKS = {
    "qasper": ("f1", 29.0),
    "hotpotqa": ("f1", 32.0),
    "gov_report": ("rouge_l", 30.0),
    "triviaqa": ("f1", 84.0),
    "narrativeqa": ("f1", 21.0),
    "multifieldqa_en": ("f1", 43.0),
    "passkey": ("accuracy", 100.0),
    "pg19": ("perplexity", 6.8),
    "recall": ("recall", 90.0),
    "attention_map": ("attention", 60.0),
    "sparsity": ("nll_increase", 0.0),
}
LONGBENCH = tuple(TASKS)[:6]
MODELS = {"smollm2": "SmolLM2-135M", "longchat_7b": "LongChat-7B-v1.5-32K"}
TITLES = {
    "qasper": "Qasper",
    "hotpotqa": "HotpotQA",
    "gov_report": "GovReport",
    "triviaqa": "TriviaQA",
    "narrativeqa": "NarrativeQA",
    "multifieldqa_en": "MultifieldQA",
    "passkey": "Passkey",
    "pg19": "PG-19",
    "sparsity": "Sparsity by layer",
}
LABELS = {
    "full": "Full",
    "streaming": "StreamingLLM",
    "h2o": "H2O",
    "tova": "TOVA",
    "quest": "Quest",
    "tightbound": "TightBound (ours)",
    "oracle_page": "Oracle (pages)",
}
# Budget at which a method keeps about two thirds of full's score.
REACH = {
    "streaming": 2600.0,
    "h2o": 1500.0,
    "tova": 1700.0,
    "quest": 230.0,
    "tightbound": 120.0,
    "oracle_page": 60.0,
}
START = 1_790_000_000.0


def point(
    task: str, method: str, budget: int | None, model: str = "smollm2", **changes: Any
) -> plan.Point:
    """One point of the synthetic sweep."""
    settings: dict[str, Any] = {"label": LABELS[method], "budgeted": method != "full"}
    if method in ("quest", "tightbound"):
        settings |= {"radius_scale": 1.0 if method == "quest" else 0.5, "gqa": "per_query"}
    parts: dict[str, Any] = {
        "model": plan.Spec(model, {"dtype": "bfloat16", "label": MODELS.get(model, model)}),
        "task": plan.Spec(task, {"samples": 200, "label": TITLES.get(task, task)}),
        "data": plan.Spec("generated", {}, {"family": task, "digest": "5f1c" * 8}),
        "method": plan.Spec(method, settings),
        "protocol": plan.Spec("quest_paper", {"greedy": True}),
        "budget": None if method == "full" else budget,
        "page_size": 16,
        "dense_layers": 2,
        "seed": 42,
    }
    return plan.Point(**(parts | changes))


def points(
    tasks: Sequence[str] = LONGBENCH,
    methods: Sequence[str] = ("full", "streaming", "h2o", "tova", "quest", "tightbound"),
    budgets: Sequence[int] = (128, 256, 512, 1024, 2048),
    **changes: Any,
) -> list[plan.Point]:
    """The grid of tasks, methods and budgets, full once a task."""
    found = {}
    for task in tasks:
        for method in methods:
            for budget in budgets:
                made = point(task, method, budget, **changes)
                found.setdefault(made.key, made)
    return list(found.values())


def record(of: plan.Point, sample: int, error: str | None = None) -> dict[str, Any]:
    """The record of one sample of a point."""
    score = _score(of, sample)
    context = 3600 + 40 * (sample % 7)
    attended = float(min(of.budget or context, context))
    return {
        "point": of.key,
        "sample": sample,
        "metric": TASKS[of.task.name][0],
        "score": None if error else score,
        "prediction": f"the answer of sample {sample}",
        "reference": f"answer {sample}",
        "attended": attended,
        "planned": float(of.budget or context),
        "read": min(attended * 1.8, float(context)),
        "context_tokens": context,
        "tail_tokens": 24,
        "new_tokens": 16,
        "truncated": False,
        "seconds": 0.4,
        "prefill_seconds": 3.0,
        "finished_at": START + 5.0 * sample,
        "error": error,
        "metrics": {"entropy": 1.5, "dense_nll": math.log(6.8)},
        "details": _details(of, score),
    }


def fill(
    ledger: Ledger, made: Iterable[plan.Point], samples: Iterable[int], error: str | None = None
) -> None:
    """Put the records of `samples` of every point into the ledger."""
    made, samples = list(made), list(samples)
    ledger.add_points(made)
    ledger.add(record(each, sample, error) for each in made for sample in samples)


def sweep(
    path: Path, made: Sequence[plan.Point], n: int, expected: int | None = None
) -> list[table.Row]:
    """Rows of a sweep whose every point has `n` samples of `expected`."""
    with Ledger(path / "ledger.db") as ledger:
        fill(ledger, made, range(n))
        return table.rows(made, ledger, dict.fromkeys(keys(made), expected or n))


def keys(made: Iterable[plan.Point]) -> list[str]:
    """Keys of points."""
    return [each.key for each in made]


def _details(of: plan.Point, score: float) -> dict[str, Any]:
    """A curve for the tasks that have one: by position, level from 256 tokens on; by layer,
    falling to nothing."""
    if of.task.name == "pg19":
        return {"curve": [[64, score + 0.2], [256, score], [1024, score]]}
    if of.task.name == "sparsity":
        return {"curve": [[0, 2 * score], [1, score], [2, 0.0]]}
    return {}


def _score(of: plan.Point, sample: int) -> float:
    metric, best = TASKS[of.task.name]
    kept = 1.0
    if of.budget is not None:
        kept = 1 - math.exp(-((of.budget / REACH[of.method.name]) ** 0.8) - 0.1)
    shared = np.random.default_rng([sample, len(of.task.name)])
    own = np.random.default_rng([int(of.key[:8], 16), sample])
    if metric == "nll_increase":
        return float(0.02 * (1 - kept) + own.normal(0, 1e-4))
    if metric == "perplexity":
        return float(math.log(best) + 0.15 * (1 - kept) + shared.normal(0, 0.1))
    if metric == "accuracy":
        return 100.0 if shared.uniform() < kept else 0.0
    hit = shared.beta(0.6, 0.6 * (100 / best - 1)) * 100
    if own.uniform() < kept:
        return float(hit)
    return float(hit * own.uniform(0.0, 0.5))
