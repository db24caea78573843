"""Groups: the rows of one method in a batch, and what is measured of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from quest_dist.methods.method import Method
from quest_dist.pool import Geometry


@dataclass
class Group:
    """Rows of one method: an instance, a budget a row, and the layers in which it is active.

    The first `dense_layers` stay dense, and where `dense_from` is a layer, all from that one on.
    The layers in which the method is active share each row's budget out as it says.
    """

    method: Method
    budgets: list[int]
    dense_layers: int
    dense_from: int | None = None
    _by_layer: dict[int, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)
    _shares: list[dict[int, list[int]]] = field(default_factory=list, init=False, repr=False)

    def active(self, layer: int) -> bool:
        """Whether the method selects in this layer."""
        return self.dense_layers <= layer and (self.dense_from is None or layer < self.dense_from)

    def begin(
        self, lengths: Sequence[int], geometry: Geometry, page_size: int, *, one_prefix: bool
    ) -> None:
        """Serve the rows, prefilled to `lengths` tokens; one context for all where `one_prefix`."""
        method = self.method
        active = list(filter(self.active, range(geometry.layers)))
        rows = [
            method.budgets_of_layers(budget, length, len(active), page_size)
            for budget, length in zip(self.budgets, lengths, strict=True)
        ]
        self._by_layer = dict(zip(active, zip(*rows, strict=True), strict=True))
        self._shares = [_places(row) for row in rows]
        method.query_heads, method.one_prefix = geometry.heads, one_prefix
        method.begin(self.budgets, lengths)

    def enter(self, layer: int) -> None:
        """Let the method serve an active layer."""
        self.method.budgets = self._by_layer[layer]

    def layers_of(self, row: int) -> dict[int, list[int]]:
        """A row's budgets, and which of the active layers (0 = the first of them) have each."""
        return self._shares[row]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self.method.keep(rows)
        self.budgets = [self.budgets[row] for row in rows]
        self._shares = [self._shares[row] for row in rows]
        self._by_layer = {
            layer: tuple(budgets[row] for row in rows) for layer, budgets in self._by_layer.items()
        }


def _places(budgets: Sequence[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, budget in enumerate(budgets):
        found.setdefault(budget, []).append(place)
    return found


@dataclass
class Measured:
    """What one row's decode steps attended to, summed over steps; means over layers and heads.

    `attended`: tokens per query head; `read`: tokens per kv head (the union over its group);
    `planned_low`, `planned_high`: what the method promised. Layers in which the row's group is not
    active do not count. `bytes_moved`, `bytes_held`: of the whole cache, all layers together.
    """

    steps: int = 0
    attended: float = 0.0
    read: float = 0.0
    planned_low: float = 0.0
    planned_high: float = 0.0
    bytes_moved: float = 0.0
    bytes_held: float = 0.0
