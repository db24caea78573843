"""Speculative decoding with token trees, under any method that keeps no state (see `token_tree`).

A pass of the target reads all nodes of a tree at once. Every node is a *row* of its own: it shares
the text's pages, and its own pages hold the keys and values of its path, from the root to itself.
So a node attends, in each layer, exactly as the decode step of its path would, with a selection of
its own: there is no union over nodes and nothing is dense that is not dense in plain decoding. The
row of the last accepted node is the text's from then on; the others are let go.

What a pass saves is the reading of the weights, once for all tokens that it gives; what it costs is
the cache, which every node reads for itself, and the draft's time.

Invariants: in float32 the tokens are those of plain greedy decoding under the same method (the task
fails a record where they are not); methods are made fresh for every pass. End tokens do not stop a
row, so every sample gives as many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_dist import drafts, engine, token_tree
from quest_dist.attention import PagedCache, Patch, patch
from quest_dist.batch import Batch, Group, Measured, Rotate, new_batch
from quest_dist.drafts import Draft, Fresh
from quest_dist.engine import Evaluated, built, check_sample, now
from quest_dist.pool import Rows
from quest_dist.tasks.task import Outcome, Sample
from quest_dist.token_tree import Tree

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point


class Branches(Batch):
    """The nodes of a tree as rows that go on from row 0 of `trunk`, for one forward pass."""

    def __init__(self, trunk: Rows, tree: Tree, fresh: Fresh, rotate: Rotate) -> None:
        super().__init__(trunk.fork(0, len(tree)), [fresh(len(tree))], rotate)
        self._depths = tree.depths
        self._paths: list[tuple[slice, Tensor]] = []
        first = 0
        while first < len(tree):  # nodes come level by level
            last = first + tree.depths.count(tree.depths[first])
            paths = torch.tensor([tree.path(node) for node in range(first, last)])
            self._paths.append((slice(first, last), paths.to(trunk.pool.device)))
            first = last

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Append to every row the keys and values of its path, of k, v [nodes, G, 1, D]."""
        if layer == 0:
            self.rows.extend(self._depths)
        for rows, paths in self._paths:
            new = (x[paths, :, 0].transpose(1, 2) for x in (k, v))  # [nodes, G, depth, D]
            self.rows.append_rows(layer, rows, *new)


@dataclass
class Spoken:
    """What speculative decoding gave: `tokens`, and of its passes the tokens that each `given`, the
    nodes that were `hits` and could have been (`chances`), by rank."""

    tokens: list[int]
    given: list[int] = field(default_factory=list)
    nodes: int = 0
    hits: list[int] = field(default_factory=list)
    chances: list[int] = field(default_factory=list)
    measured: Measured = field(default_factory=Measured)
    draft_seconds: float = 0.0

    def took(self, tree: Tree, path: Sequence[int], batch: Batch) -> None:
        """Count a pass that accepted the nodes of `path`."""
        self.given.append(len(path))
        self.nodes += len(tree)
        children = tree.children()
        for node in path:
            for child in children[node]:
                self.chances[tree.ranks[child]] += 1
                self.hits[tree.ranks[child]] += child in path
        for row in batch.measured:
            for part in fields(Measured):
                total = getattr(self.measured, part.name) + getattr(row, part.name)
                setattr(self.measured, part.name, total)


def speculate(
    loaded: LoadedModel,
    rotate: Rotate,
    context: Rows,
    sample: Sample,
    fresh: Fresh,
    draft: Draft,
    shape: Tree,
) -> Spoken:
    """Feed the sample's tail to a row that continues `context`, then decode tree by tree."""
    branches = max(shape.ranks) + 1
    start = Batch(context.fork(0, 1), [fresh(1)], rotate)
    text = list(sample.context)
    logits = torch.empty(0)
    for token in sample.tail:
        logits = engine.read(loaded, PagedCache(start), [[token]], [len(text)])
        text.append(token)
    text.append(int(logits[0, -1].argmax()))
    spoken = Spoken(text[-1:], hits=[0] * branches, chances=[0] * branches)
    trunk = start.rows
    draft.again(fresh)
    while len(spoken.tokens) < sample.max_new_tokens:
        began = now(loaded.device)
        draft.start(trunk, text)
        tree = token_tree.grow(shape, text[-1], draft.guess)
        draft.stop()
        spoken.draft_seconds += now(loaded.device) - began
        batch = Branches(trunk, tree, fresh, rotate)
        positions = [len(text) - 2 + depth for depth in tree.depths]
        read = [[token] for token in tree.tokens]
        logits = engine.read(loaded, PagedCache(batch), read, positions)
        choices = logits[:, -1].argmax(-1).tolist()
        path = tree.accepted(choices)
        spoken.took(tree, path, batch)
        trunk.keep([])
        trunk = batch.rows
        trunk.keep(path[-1:])
        new = [choices[node] for node in path]
        text += new
        spoken.tokens += new
    trunk.keep([])
    del spoken.tokens[sample.max_new_tokens :]
    return spoken


@torch.inference_mode()
def evaluate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[Evaluated]:
    """Decode `sample` plainly and by speculation for `points` (same model and page size), one after
    the other; results in their order.

    The sample's `info` says how: `draft` and what it takes (see `drafts`), the tree's `size`,
    `depth` and `branches`, and the `calibration`: over so many last tokens of the context, which
    the draft and the target read densely, acceptance by rank is estimated and the tree chosen.
    Facts, which are means over passes and tokens of the sample:
        tokens_per_pass, passes            what a pass of the target gives, and their number
        nodes, levels                      of its tree
        expected                           tokens a pass, by the estimated acceptance
        estimated_R, accepted_R            acceptance of rank R, from 1: estimated before, and found
        lossless                           1 where all tokens are plain decoding's, else 0
        speedup, draft_share               plain time / this, and the draft's part of this
        cache_ratio                        tokens read from the cache for a token, over plain's

    Raises ValueError for a sample that cannot be decoded, and for a draft as drafts.opened does.
    """
    info = sample.info
    depth, branches = int(info["depth"]), int(info["branches"])
    asked = min(int(info["calibration"]), len(sample.context) - 1)
    check_sample(sample, loaded.language.max_length - depth)
    context, how = sample.context, (info["draft"], info["exit_layers"], info["draft_model"])
    with (
        patch(loaded.model, lambda rows: [], points[0].page_size) as patched,
        drafts.opened(loaded, patched, *how) as draft,
    ):
        started = now(loaded.device)
        prefix = _empty(loaded, patched, sample, int(info["size"]), depth)
        engine.read(loaded, PagedCache(prefix), [context[:-asked]], [0])
        guesses = draft.begin(prefix.rows, context, asked, branches)
        ends = engine.read(
            loaded, PagedCache(prefix), [context[-asked:]], [len(context) - asked], asked
        )
        rates = acceptance(guesses, ends[0].argmax(-1).tolist(), branches)
        shape = token_tree.best_shape(rates, int(info["size"]), depth)
        shared = now(loaded.device) - started
        run = _Run(loaded, patched, prefix, sample, draft, shape, rates, shared)
        return [run.evaluated(point) for point in points]


def acceptance(
    guesses: Sequence[Sequence[int]], choices: Sequence[int], branches: int
) -> list[float]:
    """The share of choices that are the guess of each rank, as if each had been one once more, so
    that none is 0."""
    hits = [1] * branches
    for ranked, choice in zip(guesses, choices, strict=True):
        if choice in ranked:
            hits[ranked.index(choice)] += 1
    return [hit / (len(choices) + branches + 1) for hit in hits]


@dataclass(frozen=True)
class _Run:
    """What the points of a sample share."""

    loaded: LoadedModel
    patched: Patch
    prefix: Batch
    sample: Sample
    draft: Draft
    shape: Tree
    rates: Sequence[float]
    prefill_seconds: float

    def evaluated(self, point: Point) -> Evaluated:
        """Decode plainly, then by speculation, and compare."""
        loaded, sample = self.loaded, self.sample

        def fresh(rows: int) -> Group:
            method = built(loaded, point.method)
            return Group(method, [point.budget or 0] * rows, point.dense_layers)

        endless = replace(loaded, language=replace(loaded.language, eos_ids=frozenset()))
        started = now(loaded.device)
        batch = self.prefix.fork([fresh(1)])
        [plain], [counted] = engine.decode(endless, sample, batch, [0])
        batch.rows.keep([])
        decoded = now(loaded.device)
        spoken = speculate(
            loaded, self.patched.rotate, self.prefix.rows, sample, fresh, self.draft, self.shape
        )
        seconds = now(loaded.device) - decoded
        outcome = Outcome(
            text=loaded.language.decode(spoken.tokens),
            token_ids=tuple(spoken.tokens),
            facts={
                **self._found(spoken),
                "lossless": float(spoken.tokens == plain.token_ids),
                "speedup": (decoded - started) / seconds,
                "draft_share": spoken.draft_seconds / seconds,
                "cache_ratio": (spoken.measured.read / max(sum(spoken.given), 1))
                / max(counted.read / counted.steps, 1.0),
            },
            notes={"draft": str(sample.info["draft"])},
        )
        return Evaluated.of(outcome, spoken.measured, seconds, self.prefill_seconds)

    def _found(self, spoken: Spoken) -> dict[str, float]:
        passes = max(len(spoken.given), 1)
        found = {
            "tokens_per_pass": sum(spoken.given) / passes,
            "passes": float(len(spoken.given)),
            "nodes": spoken.nodes / passes,
            "levels": float(max(self.shape.depths)),
            "expected": token_tree.expected(self.shape, self.rates),
        }
        for rank, rate in enumerate(self.rates, start=1):
            found[f"estimated_{rank}"] = rate
        for rank, (hits, chances) in enumerate(zip(spoken.hits, spoken.chances, strict=True), 1):
            if chances:
                found[f"accepted_{rank}"] = hits / chances
        return found


def _empty(loaded: LoadedModel, patched: Patch, sample: Sample, size: int, depth: int) -> Batch:
    """A row with room for the sample, and for the trees of the target and of its draft."""
    new = len(sample.tail) + sample.max_new_tokens + depth
    return new_batch(
        patched.geometry,
        patched.page_size,
        (),
        rows=1,
        rotate=patched.rotate,
        reserve=len(sample.context) + 2 * new + 2 * size * (depth + 2 * patched.page_size),
        device=loaded.device,
    )
