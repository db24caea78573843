"""Block rows: in which blocks the tokens of a method's rows lie, and who writes them.

A method that keeps tokens in a form of its own holds them in blocks of `group` tokens, and says
after how many tokens of a row how many keys and values are there (`ends`).

Invariants: blocks that lie within whole pages of a prefix are written once, by one of the rows that
share it; a row's other blocks are its own; all layers number their blocks alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quest_dist.methods.method import View, as_int32

#: Of a row of so many tokens, how many keys and how many values lie in blocks.
Ends = Callable[[int], tuple[int, int]]


@dataclass
class _Prefix:
    """Blocks that rows share: `blocks` of them at most, `done` of their keys and values written."""

    blocks: int
    ids: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=lambda: [0, 0])


@dataclass
class _Row:
    prefix: _Prefix
    ids: list[int]  # of the blocks behind the prefix's
    done: list[int]


class BlockRows:
    """The blocks of one method instance's rows, whose contexts were prefilled to `lengths` tokens.

    Of the step at hand: `table` int32 [R, W] names each row's blocks, `ids` the same as lists;
    `ends` are the keys and values that are to be there, [2][R], and `starts` those that were, or
    that another row writes. `made` blocks have been numbered.
    """

    table: Tensor
    ids: list[list[int]]
    starts: list[list[int]]
    ends: list[list[int]]

    def __init__(self, group: int, ends: Ends, lengths: Sequence[int]) -> None:
        self.made = 0
        self._group = group
        self._ends = ends
        self._prefilled = list(lengths)
        self._rows: list[_Row] = []
        self._free: list[int] = []
        self._step = -1

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        self._prefilled = [self._prefilled[row] for row in rows]
        if not self._rows:
            return
        for number, row in enumerate(self._rows):
            if number not in rows:
                self._free += row.ids
        self._rows = [self._rows[row] for row in rows]

    def advance(self, view: View) -> bool:
        """Go on to the step that `view` shows; whether that was needed."""
        if self._step == view.step:
            return False
        self._step = view.step
        if not self._rows:
            self._rows = self._first_rows(view)
        ends = [self._ends(length) for length in view.lengths_list]
        starts: list[list[int]] = []
        leading: set[int] = set()
        for row, end in zip(self._rows, ends, strict=True):
            leads = id(row.prefix) not in leading
            leading.add(id(row.prefix))
            starts.append([self._start(row, of, end[of], leads) for of in (0, 1)])
            blocks = -(-max(end) // self._group)
            while len(row.prefix.ids) < min(blocks, row.prefix.blocks):
                row.prefix.ids.append(self._take())
            while len(row.ids) < blocks - row.prefix.blocks:
                row.ids.append(self._take())
        self.ids = [row.prefix.ids + row.ids for row in self._rows]
        width = max(1, *map(len, self.ids))
        table = [ids + [0] * (width - len(ids)) for ids in self.ids]
        self.table = torch.tensor(table, dtype=torch.int32, device=view.lengths.device)
        self.starts, self.ends = (
            [[pair[of] for pair in x] for of in (0, 1)] for x in (starts, ends)
        )
        return True

    def counts(self, lists: Sequence[Sequence[int]]) -> list[Tensor]:
        """`starts` or `ends` where the rows are: int32 [R] each."""
        return [as_int32(list(counts), self.table.device) for counts in lists]

    def _start(self, row: _Row, of: int, end: int, leads: bool) -> int:
        """From where on a row writes keys (0) or values (1): one row writes what its prefix
        holds."""
        shared = row.prefix.blocks * self._group
        start = min(row.done[of], end)
        if leads and row.prefix.done[of] < shared:
            start = row.prefix.done[of]
            row.prefix.done[of] = min(end, shared)
        row.done[of] = max(row.done[of], end)
        return start

    def _first_rows(self, view: View) -> list[_Row]:
        """Rows whose whole pages of the prefill are the same share these."""
        prefixes: dict[tuple[int, ...], _Prefix] = {}
        rows = []
        tables: list[list[int]] = view.page_table.tolist()
        for length, table in zip(self._prefilled, tables, strict=True):
            pages = length // view.page_size
            key = (length, *table[:pages])
            prefix = prefixes.setdefault(key, _Prefix(pages * view.page_size // self._group))
            rows.append(_Row(prefix, [], [prefix.blocks * self._group] * 2))
        return rows

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self.made += 1
        return self.made - 1
