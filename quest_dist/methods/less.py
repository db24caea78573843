"""LESS (Dong et al., ICML 2024, arXiv 2402.09398): evicted tokens live on in a low-rank state.

A sparse policy says which tokens are held; a step attends to them exactly and to the state, which
learned feature maps read (quest_dist.methods.low_rank). What the policy evicts after a step is
added to the state, and so is all of the context that it does not hold after the prefill. The policy
is H2O, or a window of the first `sinks` and the last tokens.

The feature maps are trained for each model and policy (quest_dist.calibrators.less), for budgets of
all sizes at once; their weights, like a model's, are no part of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quest_dist import artefacts, ops
from quest_dist.methods.evicting import Evicting
from quest_dist.methods.h2o import H2O
from quest_dist.methods.low_rank import Maps, State
from quest_dist.methods.method import Method, Selection, View, check_choice
from quest_dist.methods.slots import Slots
from quest_dist.methods.traffic import CacheShape
from quest_dist.reference import Attended

POLICIES = ("h2o", "window")
STATE_BYTES = 4  # a state is fp32


@dataclass
class Less(H2O):
    """Settings: `policy` h2o | window, `sinks` of the window, `rank` of the state, `hidden` width
    of the feature maps, `sequences` and `epochs` of their training, and those of H2O; its scores
    start with the prompt, as LESS's own do.
    """

    attends: ClassVar[bool] = True
    calibration: ClassVar[str | None] = "less"

    score_init: str = "prompt"
    policy: str = "h2o"
    sinks: int = 4
    rank: int = 8
    hidden: int = 64
    sequences: int = 12
    epochs: int = 24
    _maps: dict[int, Maps] = field(default_factory=dict, init=False, repr=False)
    _states: dict[int, list[State | None]] = field(default_factory=dict, init=False, repr=False)
    _view: View | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        super().__post_init__()
        check_choice("policy", self.policy, POLICIES)
        for key in ("sinks", "rank", "hidden", "sequences", "epochs"):
            least = 0 if key == "sinks" else 1
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{key}={value!r}: choose a whole number of at least {least}")

    @property
    def _windowed(self) -> bool:
        return self.policy == "window"

    @property
    def needs_probabilities(self) -> bool:  # type: ignore[override]
        """A window holds what it holds, whatever is attended to."""
        return not self._windowed

    @property
    def needs_prefill(self) -> bool:  # type: ignore[override]
        """As H2O's scores do."""
        return not self._windowed and self.score_init == "prompt"

    def check_budget(self, budget: int, page_size: int) -> None:
        """A window's sinks and the new token must fit."""
        super().check_budget(budget, page_size)
        if self._windowed and budget < self.sinks + 1:
            raise ValueError(
                f"budget={budget}: less with sinks={self.sinks} needs at least"
                f" {self.sinks + 1} tokens"
            )

    def reserved(self, page_size: int) -> int:
        """As H2O, or a window's sinks and the new token."""
        least = super().reserved(page_size)
        return max(least, self.sinks + 1) if self._windowed else least

    def select(self, view: View, q: Tensor) -> Selection:
        """What the policy holds, and the new token."""
        self._view = view
        self._states.setdefault(view.layer, [None] * len(view.lengths_list))
        return super().select(view, q)

    def _first_slots(self, view: View) -> Slots:
        slots = super()._first_slots(view)
        if self._windowed:
            self.evict(slots, [length - 1 for length in self._lengths])
        return slots

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Exact attention over the held tokens, joined with that over the state."""
        held = super().attend(view, q, selection)
        out = held.out.clone()
        for row, state in enumerate(self._states[view.layer]):
            if state is not None:
                features = self._maps_of(view).phi(q[row][:, None])[:, 0]
                out[row] = state.joined(features, held.out[row], held.lse[row]).to(out.dtype)
        if self._windowed:
            self.evict(self._slots[view.layer], [length - 1 for length in view.lengths_list])
        return held._replace(out=out)

    def evict(self, slots: Slots, newest: Sequence[int]) -> None:
        """Evict by the policy; what went is added to the state."""
        before, used = slots.position, list(slots.used)
        if self._windowed:
            slots.score.masked_fill_(slots.position < self.sinks, 1.0)  # ties go to the newer
            never = max(newest) + 1
            slots.evict([budget - 1 for budget in self.budgets], [never] * len(newest))
        else:
            super().evict(slots, newest)
        assert self._view is not None
        for row, (had, has) in enumerate(zip(used, slots.used, strict=True)):
            if has < had:
                gone = missing(before[row, :, :had], slots.position[row, :, :has])
                self._fold(self._view, row, gone)

    def _fold(self, view: View, row: int, gone: Tensor) -> None:
        """Add the tokens at positions [G, n] to a row's state."""
        k, v = tokens_at(view, row, gone)
        state, states = State.of(self._maps_of(view), k, v), self._states[view.layer]
        before = states[row]
        states[row] = state if before is None else before.plus(state)

    def _maps_of(self, view: View) -> Maps:
        if view.layer not in self._maps:
            if self.artefact is None:
                raise ValueError("artefact=null: less needs its feature maps; name a file")
            weights = artefacts.read(self.artefact)
            made = {name: weights[name] for name in Maps._fields}
            heads = made["q1"].shape[1], made["k1"].shape[1], made["k1"].shape[2]
            layers, dim = made["q1"].shape[0], view.kv.shape[-1]
            if heads != (view.heads, view.kv_heads, dim) or view.layer >= layers:
                raise ValueError(
                    f"artefact={self.artefact!r}: made for {layers} layers of {heads[0]} query and"
                    f" {heads[1]} kv heads of {heads[2]}, not for layer {view.layer} of"
                    f" {view.heads} and {view.kv_heads} of {dim}"
                )
            place = view.lengths.device
            mine = {name: weight[view.layer].to(place) for name, weight in made.items()}
            self._maps[view.layer] = Maps(**mine)
        return self._maps[view.layer]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        for layer, states in self._states.items():
            self._states[layer] = [states[row] for row in rows]

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """The policy's tokens; the state is none."""
        if self._windowed:
            return Evicting.planned(self, length, budget, page_size, step)
        return super().planned(length, budget, page_size, step)

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """The policy's, and the state."""
        policy = Method if self._windowed else Evicting
        moved = policy.bytes_moved(self, shape, length, budget, read)
        return moved + self._state_bytes(shape, length, budget)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """The policy's, and the state."""
        held = Evicting.bytes_held(self, shape, length, budget)
        if self._windowed:
            held = min(length, budget) * shape.token_bytes
        return held + self._state_bytes(shape, length, budget)

    def _state_bytes(self, shape: CacheShape, length: int, budget: int) -> float:
        """(r D + r) numbers a kv head, once something was evicted."""
        numbers = shape.kv_heads * self.rank * (shape.head_dim + 1)
        return numbers * STATE_BYTES if length > budget else 0


def missing(before: Tensor, after: Tensor) -> Tensor:
    """Of ascending positions [G, n] those that are not among [G, m], all m of them there: int64
    [G, n - m], ascending."""
    gone = torch.ones_like(before, dtype=torch.int8)
    place = torch.searchsorted(before.contiguous(), after.contiguous())
    gone.scatter_(1, place, torch.zeros_like(place, dtype=torch.int8))
    first = gone.argsort(dim=1, descending=True, stable=True)[:, : before.shape[1] - after.shape[1]]
    return before.gather(1, first).long()


def tokens_at(view: View, row: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a row at positions [G, n], one list a kv head: [G, n, D] each."""
    kv_heads, count = positions.shape
    size, length = view.page_size, view.lengths_list[row]
    table = view.page_table[row : row + 1]
    place = positions
    if positions.numel() * size < length:  # few enough to fetch their pages alone
        table = table[:, (positions // size).flatten()].contiguous()
        length = positions.numel() * size
        order = torch.arange(positions.numel(), device=positions.device)
        place = order.view(kv_heads, count) * size + positions % size
    k, v = ops.gather(view.kv, table, length)
    chosen = place[..., None].expand(-1, -1, k.shape[-1])
    return k[0].gather(1, chosen), v[0].gather(1, chosen)
