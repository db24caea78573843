"""DejaVu (Liu et al., ICML 2023, arXiv 2310.17157), its head half: query heads that matter little
are skipped.

A step computes attention in n of the H query heads, over all L tokens; the others output zero. The
budget is the mean over heads of the tokens that are attended to, as everywhere: n is the largest
number of heads with n L / H <= budget, and 1 at least (so that at more than H budget tokens the one
head exceeds the budget, which the measured tokens show). Nothing is evicted: a head that is skipped
now may be wanted by the next step, so its keys and values are still made and held.

`heads=oracle` keeps the heads of largest output norm, which takes the attention that it then drops:
an upper bound without training, not a fast method. The norm is that of the head's own output; what
the output projection makes of it is not looked at. `heads=predicted` ranks heads by a small network
a layer (quest_dist.calibrators.dejavu), from the layer's queries turned back to position 0. DejaVu
itself predicts from the hidden state of an earlier layer, while that layer still computes, and
skips the projections of these heads as well, and neurons of MLPs: here the queries of the layer are
there before heads are chosen, and what is saved is the reading of keys and values alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import ops
from quest_dist.methods.method import (
    EVERYTHING,
    Method,
    Selection,
    View,
    as_int32,
    check_choice,
)
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended

HEADS = ("oracle", "predicted")


def features(q: Tensor) -> Tensor:
    """What a predictor sees of queries at position 0, q [n, H, D]: fp32 [n, H * D]."""
    return q.flatten(1).float()


def predicted_norms(x: Tensor, weights: Mapping[str, Tensor], layer: int) -> Tensor:
    """Logarithms of the heads' output norms, fp32 [n, H], from features [n, F].

    `weights` holds, a layer each, mean [F] and scale [F] of features, w1 [F, hidden], b1, w2
    [hidden, H], b2, and the heads' mean [H] and one spread [1] of the logarithms.
    """
    (mean, scale, w1, b1, w2, b2, norm_mean, norm_scale) = (
        weights[name][layer].to(x.device)
        for name in ("mean", "scale", "w1", "b1", "w2", "b2", "norm_mean", "norm_scale")
    )
    hidden = ((x - mean) / scale @ w1 + b1).relu()
    return norm_mean + norm_scale * (hidden @ w2 + b2)


@dataclass
class DejaVu(Method):
    """Settings: `heads` oracle | predicted (which needs an artefact)."""

    attends: ClassVar[bool] = True
    skips_heads: ClassVar[bool] = True

    heads: str = "oracle"
    _whole: Attended | None = field(default=None, init=False, repr=False)
    _weights: Mapping[str, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        check_choice("heads", self.heads, HEADS)

    @property
    def calibration(self) -> str | None:  # type: ignore[override]
        """Predictors are made from the model."""
        return "dejavu" if self.heads == "predicted" else None

    def heads_to_keep(self, length: int, budget: int, heads: int) -> int:
        """How many heads compute; -1: all."""
        return -1 if budget >= length else max(1, heads * budget // length)

    def select(self, view: View, q: Tensor) -> Selection:
        """All tokens for the heads that are kept, none for the others."""
        rows = zip(view.lengths_list, self.budgets, strict=True)
        keep = [self.heads_to_keep(length, budget, view.heads) for length, budget in rows]
        if all(heads < 0 for heads in keep):
            return EVERYTHING
        if self.heads == "oracle":
            self._whole = view.attend(q, EVERYTHING, probabilities=False)
            ranks = self._whole.out.float().norm(dim=-1)
        else:
            back = view.rotate(q, 1 - view.lengths)
            ranks = predicted_norms(features(back), self._predictors(), view.layer)
        most = as_int32(keep, q.device)
        every = torch.full_like(most, view.heads)
        index, count = ops.select_top(ranks[:, None].contiguous(), every, most, force_last=False)
        return _of_heads(index, count, view.heads)

    def _predictors(self) -> Mapping[str, Tensor]:
        if self._weights is None:
            if self.artefact is None:
                raise ValueError(
                    "artefact=null: heads=predicted needs its predictors; python -m"
                    " quest_dist.calibrate dejavu heads=predicted makes them"
                )
            from safetensors.torch import load_file

            self._weights = load_file(self.artefact)
        return self._weights

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention of the heads that are kept, zero of the others."""
        if selection.index is None or selection.count is None:
            return view.attend(q, EVERYTHING, probabilities=False)
        kept = selection.count < 0
        whole = self._whole
        if self.heads != "oracle" or whole is None:
            # A head that is skipped reads one token, for a list may not be empty.
            least = torch.where(kept, -1, 1).int()
            short = Selection(selection.index, least, "tokens")
            whole = view.attend(q, short, probabilities=False)
        tokens = view.lengths[:, None]
        by_group = kept.view(kept.shape[0], view.kv_heads, -1).any(2)
        return Attended(
            out=whole.out.masked_fill(~kept[..., None], 0.0),
            attended=(tokens * kept).int(),
            read=(tokens * by_group).int(),
            probabilities=None,
            lse=whole.lse.masked_fill(~kept, -torch.inf),
        )

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The kept heads' tokens, as a mean over heads, rounded down and up."""
        keep = self.heads_to_keep(length, budget, self.query_heads)
        if keep < 0:
            return length, length
        tokens = keep * length
        return tokens // self.query_heads, -(-tokens // self.query_heads)

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """Everything, for the oracle; what kept heads read, where they are predicted."""
        tokens = length if self.heads == "oracle" else read
        return tokens * shape.token_bytes


def _of_heads(index: Tensor, count: Tensor, heads: int) -> Selection:
    """The heads that index [R, 1, K] lists, as a selection: all tokens of these, none of others."""
    listed = torch.where(index[:, 0] < 0, heads, index[:, 0]).long()
    kept = torch.zeros(index.shape[0], heads + 1, dtype=torch.int32, device=index.device)
    kept.scatter_(1, listed, -1)
    kept = torch.where(count < 0, -1, kept[:, :heads]).int().contiguous()
    return Selection(torch.zeros_like(kept)[..., None], kept, "tokens")
