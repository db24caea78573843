"""Evaluate one sample for many points: prefill its context once, then decode all points as the rows
of one batch.

The rows share the prefilled pages and differ in attention only, so embeddings, projections and MLPs
run once for all of them. Decoding is greedy: the sample's tail is fed token by token (teacher
forced, every token a decode step under the method), then up to `max_new_tokens` are generated; a
row leaves the batch at an end-of-sequence token.

Invariant: in float32 a row's tokens equal those of a run of its point alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_dist import artefacts
from quest_dist.attention import PagedCache, Patch, patch
from quest_dist.batch import Batch, Group, Measured, new_batch
from quest_dist.methods.method import Method
from quest_dist.tasks.task import Outcome, Sample

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point, Spec


@dataclass(frozen=True)
class Evaluated:
    """What one point gave on one sample.

    `attended`, `read` and `planned_*`, in tokens, and `bytes_*`, of the whole cache, are means over
    decode steps (see batch.Measured);
    `seconds` is the wall time of the sample's decode over its rows, `prefill_seconds` that of the
    shared prefill.
    """

    outcome: Outcome
    attended: float
    read: float
    planned_low: float
    planned_high: float
    seconds: float
    prefill_seconds: float
    bytes_moved: float = 0.0
    bytes_held: float = 0.0

    @classmethod
    def of(
        cls, outcome: Outcome, counted: Measured, seconds: float, prefill_seconds: float
    ) -> Evaluated:
        """An outcome with what its row has attended to."""
        steps = max(counted.steps, 1)
        return cls(
            outcome=outcome,
            attended=counted.attended / steps,
            read=counted.read / steps,
            planned_low=counted.planned_low / steps,
            planned_high=counted.planned_high / steps,
            bytes_moved=counted.bytes_moved / steps,
            bytes_held=counted.bytes_held / steps,
            seconds=seconds,
            prefill_seconds=prefill_seconds,
        )


@dataclass
class Decoded:
    """A row on its way: which point it is and what it has produced."""

    point: int
    token_ids: list[int]
    nll: list[float]


def built(loaded: LoadedModel, spec: Spec) -> Method:
    """A fresh instance of a method, with the artefact that it needs for this model."""
    method: Method = spec.build()
    method.artefact = artefacts.ready(loaded, spec)
    return method


def groups_of(loaded: LoadedModel, points: Sequence[Point]) -> tuple[list[Group], list[int]]:
    """Points as groups of rows (one method instance for all budgets of a method), and the point of
    each row."""
    members: dict[tuple[str, int], list[int]] = {}
    for number, point in enumerate(points):
        members.setdefault((point.method.canonical(), point.dense_layers), []).append(number)
    groups, order = [], []
    for (_, dense_layers), numbers in members.items():
        budgets = [points[number].budget or 0 for number in numbers]
        groups.append(Group(built(loaded, points[numbers[0]].method), budgets, dense_layers))
        order += numbers
    return groups, order


@torch.inference_mode()
def evaluate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[Evaluated]:
    """Run `sample` for `points` (same model and page size) in one batch; results in the order of
    `points`.

    Raises ValueError for a sample without context or tail, or longer than the model.
    """
    check_sample(sample, loaded.language.max_length)
    groups, order = groups_of(loaded, points)
    page_size = points[0].page_size
    with patch(loaded.model, lambda rows: groups, page_size) as patched:
        started = now(loaded.device)
        prefix = prefill(loaded, patched, sample, groups, len(order))
        prefilled = now(loaded.device)
        rows, measured = decode(loaded, sample, prefix.fork(groups), order)
        finished = now(loaded.device)
    share = (finished - prefilled) / len(order)
    results: dict[int, Evaluated] = {}
    for row, counted in zip(rows, measured, strict=True):
        outcome = Outcome(
            text=loaded.language.decode(row.token_ids),
            token_ids=tuple(row.token_ids),
            nll=tuple(row.nll),
        )
        results[row.point] = Evaluated.of(outcome, counted, share, prefilled - started)
    return [results[number] for number in range(len(points))]


def check_sample(sample: Sample, max_length: int) -> None:
    """Raise ValueError unless the sample can be decoded by a model of `max_length` positions."""
    if not sample.context or not sample.tail:
        raise ValueError(
            f"sample {sample.index}: context of {len(sample.context)} and tail of "
            f"{len(sample.tail)} tokens; each needs at least 1"
        )
    needed = len(sample.context) + len(sample.tail) + sample.max_new_tokens
    if needed > max_length:
        raise ValueError(
            f"sample {sample.index}: {needed} tokens with its answer, the model takes {max_length}"
        )


def now(device: torch.device) -> float:
    """The clock once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prefill(
    loaded: LoadedModel, patched: Patch, sample: Sample, groups: Sequence[Group], rows: int
) -> Batch:
    """The context of a sample as a batch of one row, in a pool with room for the tails of `rows`
    rows; the methods of `groups` look on."""
    length = len(sample.context)
    tails = rows * (len(sample.tail) + sample.max_new_tokens + patched.page_size)
    prefix = new_batch(
        patched.geometry,
        patched.page_size,
        groups=(),
        rows=1,
        rotate=patched.rotate,
        reserve=length + tails,
        observers=groups,
        device=loaded.device,
    )
    forward(loaded, PagedCache(prefix), [sample.context], 0)
    return prefix


def forward(
    loaded: LoadedModel, cache: PagedCache, tokens: Sequence[Sequence[int]], position: int
) -> Tensor:
    """Logits of the last token of each row, fp32 [R, vocabulary]."""
    return read(loaded, cache, tokens, [position] * len(tokens))[:, -1]


def read(
    loaded: LoadedModel,
    cache: PagedCache,
    tokens: Sequence[Sequence[int]],
    positions: Sequence[int],
    keep: int = 1,
) -> Tensor:
    """Logits of the last `keep` tokens of each row, fp32 [R, keep, vocabulary]; `positions` are
    those of the rows' first tokens."""
    ids = torch.tensor(tokens, device=loaded.device)
    starts = torch.tensor(positions, device=loaded.device)
    out = loaded.model(
        input_ids=ids,
        position_ids=starts[:, None] + torch.arange(ids.shape[1], device=loaded.device),
        past_key_values=cache,
        logits_to_keep=keep,
    )
    logits: Tensor = out.logits
    return logits.float()


def decode(
    loaded: LoadedModel, sample: Sample, batch: Batch, order: Sequence[int]
) -> tuple[list[Decoded], list[Measured]]:
    """Feed the tail to all rows, then generate; the rows in batch order with what was measured.

    `order` names the point of each row.
    """
    cache = PagedCache(batch)
    rows = [Decoded(point, [], []) for point in order]
    measured = list(batch.measured)
    position = len(sample.context)
    logits = torch.empty(0)
    for number, token in enumerate(sample.tail):
        logits = forward(loaded, cache, [[token]] * len(rows), position)
        position += 1
        if sample.score_tail and number + 1 < len(sample.tail):
            target = torch.full((len(rows),), sample.tail[number + 1], device=logits.device)
            nlls = torch.nn.functional.cross_entropy(logits, target, reduction="none").tolist()
            for row, nll in zip(rows, nlls, strict=True):
                row.nll.append(nll)
    alive = list(rows)
    for step in range(sample.max_new_tokens):
        tokens = logits.argmax(-1).tolist()
        going = [
            place for place, token in enumerate(tokens) if token not in loaded.language.eos_ids
        ]
        for place in going:
            alive[place].token_ids.append(tokens[place])
        if not going or step + 1 == sample.max_new_tokens:
            break
        if len(going) < len(alive):
            batch.keep(going)
            alive = [alive[place] for place in going]
        logits = forward(loaded, cache, [[tokens[place]] for place in going], position)
        position += 1
    return rows, measured
