"""Attention maps: what every query of a short text attends to, head by head.

The text is decoded token by token from an empty cache, through the one attention path with
probabilities asked for: row i of a map is what the query of token i pays to the tokens up to it.

Which head is shown: of all layers and heads (or of those asked for) the one with the largest gap
between the last query's attention to the critical token and the mean of the queries before it that
could see that token, its own included; ties go to the lower layer and head. It is chosen on a
second text of the same pattern, never on the one that is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from quest_dist.attention import PagedCache, patch
from quest_dist.batch import Group, Measured, new_batch
from quest_dist.engine import Evaluated, check_sample, forward, now
from quest_dist.methods.full import Full
from quest_dist.methods.method import Selection, View
from quest_dist.tasks.task import Outcome, Sample

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point


@dataclass
class Watched(Full):
    """Full attention that keeps the probabilities it sees: `seen[layer]`, a tensor [H, L] a
    step."""

    needs_probabilities: ClassVar[bool] = True
    seen: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def observe(self, view: View, selection: Selection, probabilities: Tensor) -> None:
        """Keep those of the one row."""
        length = view.lengths_list[0]
        self.seen.setdefault(view.layer, []).append(probabilities[0, :, :length].cpu())


@torch.inference_mode()
def maps(loaded: LoadedModel, tokens: Sequence[int], page_size: int) -> tuple[Tensor, Measured]:
    """Attention of every layer and head, fp32 [layers, H, T, T], zero above the diagonal."""
    watched = Watched()
    group = Group(watched, [0], 0)
    with patch(loaded.model, lambda rows: [group], page_size) as patched:
        batch = new_batch(
            patched.geometry,
            page_size,
            [group],
            rows=1,
            rotate=patched.rotate,
            reserve=len(tokens),
            device=loaded.device,
        )
        cache = PagedCache(batch)
        for position, token in enumerate(tokens):
            forward(loaded, cache, [[token]], position)
        found = torch.zeros(patched.geometry.layers, patched.geometry.heads, *[len(tokens)] * 2)
    for layer, steps in watched.seen.items():
        for query, seen in enumerate(steps):
            found[layer, :, query, : query + 1] = seen
    return found, batch.measured[0]


def before_and_last(found: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Of maps [..., T, T]: the mean attention that earlier queries pay to `token`, and the last
    one's."""
    paid = found[..., token:, token]
    return paid[..., :-1].mean(-1), paid[..., -1]


def chosen(found: Tensor, token: int, asked: tuple[int | None, int | None]) -> tuple[int, int]:
    """The (layer, head) of largest gap; `asked` narrows the choice. ValueError where there is no
    such layer or head."""
    before, last = before_and_last(found, token)
    gap = last - before
    allowed = torch.zeros_like(gap, dtype=torch.bool)
    places: list[Any] = []
    for name, number, count in zip(("layer", "head"), asked, gap.shape, strict=True):
        if number is not None and not 0 <= number < count:
            raise ValueError(f"task.{name}={number}: the model has 0..{count - 1}, or null")
        places.append(slice(None) if number is None else number)
    allowed[tuple(places)] = True
    best = int(gap.masked_fill(~allowed, -torch.inf).argmax())
    return best // gap.shape[1], best % gap.shape[1]


def evaluate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[Evaluated]:
    """The map of one head over `sample`'s text, the same for all `points` (of full attention).

    Facts, in percent: attention to the critical token by the last query (`critical_last`) and by
    those before it (`critical_before` is their mean, `critical_largest` the largest of them), and
    the last query's to the other token (`other_last`). The curve is attention to the critical token
    by query. ValueError where the head asked for is none.
    """
    check_sample(sample, loaded.language.max_length)
    critical, other = int(sample.info["critical"]), int(sample.info["other"])
    tokens, page_size = (*sample.context, *sample.tail), points[0].page_size
    started = now(loaded.device)
    again, at, _ = sample.info["chosen_on"]
    layer, head = chosen(maps(loaded, again, page_size)[0], at, sample.info["asked"])
    prepared = now(loaded.device)
    found, counted = maps(loaded, tokens, page_size)
    finished = now(loaded.device)
    shown = 100 * found[layer, head]
    before, last = before_and_last(shown, critical)
    outcome = Outcome(
        text=loaded.language.decode(tokens),
        facts={
            "critical_last": float(last),
            "critical_before": float(before),
            "critical_largest": float(shown[critical:-1, critical].max()),
            "other_last": float(shown[-1, other]),
        },
        curve=tuple((float(i), float(shown[i, critical])) for i in range(critical, len(tokens))),
        notes={"head": f"layer {layer} head {head}"},
        drawing={
            "tokens": [_word(loaded, token) for token in tokens],
            "matrix": [[round(x, 3) for x in row] for row in shown.tolist()],
            "layer": layer,
            "head": head,
            "critical": critical,
            "other": other,
        },
    )
    share = (finished - prepared) / len(points)
    return [Evaluated.of(outcome, counted, share, prepared - started) for _ in points]


def _word(loaded: LoadedModel, token: int) -> str:
    """A token as people read it; special ones by their own name."""
    word = loaded.language.decode([token]).strip()
    return word or str(loaded.language.tokenizer.convert_ids_to_tokens(token))
