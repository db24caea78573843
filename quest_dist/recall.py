"""Recall: how many of the tokens that matter most to dense attention does a method select?

One row is decoded densely, and every point is asked in its *shadow*: in each layer of each step
its method sees that row's queries and cache, selects, attends, and observes the probabilities of
its own selection, but the hidden states go on from the dense output. So all selections are compared
on identical queries, and no method suffers for what it selected before (those that evict still do
not get back what they let go).

Recall of a step, layer and query head is the share of that head's tokens of highest q.k, the new
token among the candidates, that the selected set holds. Means go over query heads, the layers that
are not exempt, and decode steps.

Invariants: the dense row's tokens are those of full attention alone; a shadow writes nothing and
its recall does not depend on the shadows beside it; selecting everything is 100, by definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.attention import patch
from quest_dist.batch import Batch, Group
from quest_dist.engine import Evaluated, check_sample, decode, groups_of, now, prefill
from quest_dist.methods.full import Full
from quest_dist.methods.method import Selection, View, as_int32
from quest_dist.pool import Mirror
from quest_dist.tasks.task import Outcome, Sample

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point

#: Other numbers of top tokens whose recall is kept beside the one that is scored.
ALSO = (1, 100)


class Asked(Batch):
    """Rows that are asked what they would attend to, one group a method; measures what they find.

    `found` holds a tensor a step, [R, len(tops) + 1], in percent and summed over layers: the recall
    of each of `tops`, then the attention mass that the selected tokens have in dense attention.
    """

    def __init__(
        self, rows: Mirror, groups: Sequence[Group], batch: Batch, tops: Sequence[int]
    ) -> None:
        super().__init__(rows, groups, batch.rotate)
        self.shown, self.tops = rows, tuple(tops)
        self.found: list[Tensor] = []
        self._truth_of = (0, 0)
        self._top: list[Tensor] = []
        self._shares = torch.empty(0)

    def watch(self, first: int, view: View, q: Tensor, selection: Selection) -> None:
        """Compare a selection with the true scores."""
        if self._truth_of != (view.step, view.layer):
            self._truth_of = view.step, view.layer
            self._look(view, q)
        if len(self.found) < view.step:
            zeros = torch.zeros(len(self), len(self.tops) + 1, dtype=torch.float64)
            self.found.append(zeros.to(q.device))
        values = [held(selection, view, top).double().mean((1, 2)) for top in self._top]
        values.append(mass(selection, view, self._shares).double().mean(1))
        last = first + len(view.lengths_list)
        self.found[-1][first:last] += 100 * torch.stack(values, 1)

    def _look(self, view: View, q: Tensor) -> None:
        """The true scores of this layer and step: all rows have them in common."""
        length = view.lengths_list[0]
        scores = ops.token_scores(
            q[:1], view.kv, view.page_table[:1], view.lengths[:1], scale=view.scale
        )
        self._shares = scores[0, :, :length].softmax(-1)
        self._top = []
        for top in self.tops:
            tokens = torch.arange(length, device=q.device).expand(view.heads, -1)
            if top < length:
                keep = as_int32([top], q.device)
                index, _ = ops.select_top(scores, view.lengths[:1], keep, force_last=False)
                tokens = index[0, :, :top].long()
            self._top.append(tokens)

    def __len__(self) -> int:
        return len(self.shown)


class Shadow(Batch):
    """One row that attends to everything, with groups that are asked by its queries."""

    def __init__(self, prefix: Batch, groups: Sequence[Group], tops: Sequence[int]) -> None:
        """Continue row 0 of `prefix`, whose prefill the methods of `groups` have seen."""
        super().__init__(prefix.rows.fork(0, 1), [Group(Full(), [0], 0)], prefix.rotate)
        shown = Mirror(self.rows, sum(len(group.budgets) for group in groups))
        for group in groups:
            lengths = shown.lengths_list[: len(group.budgets)]
            group.begin(lengths, self.pool.geometry, self.pool.page_size, one_prefix=True)
        self.asked = Asked(shown, groups, self, tops)

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Append k, v [1, G, 1, D] of one layer to the dense row."""
        assert k.shape[2] == 1, "a shadow is asked in decode steps only"
        super().write(layer, k, v, padding)
        if layer == 0:
            self.asked.shown.follow()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Dense attention of the new token, q [1, H, 1, D] -> [1, 1, H, D], once all are asked."""
        rows = len(self.asked)
        queries, keys, values = (x.expand(rows, -1, -1, -1) for x in (q, k, v))
        self.asked.attend(layer, queries, keys, values, scale)
        return super().attend(layer, q, k, v, scale)

    def count(self) -> None:
        """A step is over."""
        super().count()
        self.asked.count()


def held(selection: Selection, view: View, tokens: Tensor) -> Tensor:
    """Whether the selected sets hold `tokens` [H, n] of each query head: bool [R, H, n]."""
    rows, heads = len(view.lengths_list), tokens.shape[0]
    listed = _listed(selection, view)
    if listed is None:
        return torch.ones(rows, *tokens.shape, dtype=torch.bool, device=tokens.device)
    items = tokens // view.page_size if selection.unit == "pages" else tokens
    by_head = listed.repeat_interleave(heads // listed.shape[1], 1)
    return by_head.gather(2, items.expand(rows, -1, -1))


def mass(selection: Selection, view: View, shares: Tensor) -> Tensor:
    """How much of `shares` [H, L], which add up to 1, the selected sets hold: [R, H]."""
    rows, (heads, length) = len(view.lengths_list), shares.shape
    listed = _listed(selection, view)
    if listed is None:
        return shares.sum(-1).expand(rows, -1)
    items = listed.shape[2]
    if selection.unit == "pages":
        room = items * view.page_size - length
        shares = torch.nn.functional.pad(shares, (0, room)).view(heads, items, -1).sum(2)
    by_list = shares.view(listed.shape[1], -1, items)
    return torch.einsum("rli,lgi->rlg", listed.to(shares.dtype), by_list).reshape(rows, heads)


def _listed(selection: Selection, view: View) -> Tensor | None:
    """Which pages or tokens each list names: bool [R, Hs, items]; None where all name all."""
    if selection.index is None or selection.count is None:
        return None
    index, count = selection.index.long(), selection.count[..., None]
    longest = view.lengths_list[0]
    items = -(-longest // view.page_size) if selection.unit == "pages" else longest
    places = torch.arange(index.shape[2], device=index.device)
    # Unused places go where nothing is read.
    index = torch.where(places < count, index, items)
    listed = torch.zeros(*index.shape[:2], items + 1, dtype=torch.bool, device=index.device)
    listed.scatter_(2, index, torch.ones_like(index, dtype=torch.bool))
    return listed[..., :items] | (count < 0)


@torch.inference_mode()
def evaluate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[Evaluated]:
    """Ask `points` (same model and page size) in the shadow of one dense pass over `sample`, whose
    `info` says how many `top` tokens count; results in the order of `points`.

    The text is that of full attention for all. Facts, in percent: `recall`, `recall_1`,
    `recall_100`, and `mass`, the share of dense attention that falls on the selected tokens; the
    curve is recall by decode step. Raises ValueError for a sample that cannot be decoded, and where
    no layer is left to ask in.
    """
    check_sample(sample, loaded.language.max_length)
    groups, order = groups_of(loaded, points)
    top = int(sample.info["top"])
    tops = sorted({top, *ALSO})
    with patch(loaded.model, lambda rows: groups, points[0].page_size) as patched:
        layers = patched.geometry.layers
        for group in groups:
            if group.dense_layers >= layers:
                raise ValueError(f"dense_layers={group.dense_layers}: of {layers} none is asked")
        started = now(loaded.device)
        prefix = prefill(loaded, patched, sample, groups, 1)
        prefilled = now(loaded.device)
        shadow = Shadow(prefix, groups, tops)
        [row], _ = decode(loaded, sample, shadow, [0])
        finished = now(loaded.device)
    asked = shadow.asked
    exempt = [group.dense_layers for group in groups for _ in group.budgets]
    steps = torch.stack(asked.found, 1).cpu()  # [R, steps, facts]
    text, tokens = loaded.language.decode(row.token_ids), tuple(row.token_ids)
    share = (finished - prefilled) / len(points)
    results: dict[int, Evaluated] = {}
    for number, (point, counted) in enumerate(zip(order, asked.measured, strict=True)):
        values = steps[number] / (layers - exempt[number])
        means = values.mean(0).tolist()
        facts = {f"recall_{n}": mean for n, mean in zip(tops, means, strict=False)}
        facts |= {"recall": facts[f"recall_{top}"], "mass": means[-1]}
        curve = enumerate(values[:, tops.index(top)].tolist(), start=1)
        outcome = Outcome(text, tokens, facts=facts, curve=tuple((float(x), y) for x, y in curve))
        results[point] = Evaluated.of(outcome, counted, share, prefilled - started)
    return [results[number] for number in range(len(points))]
