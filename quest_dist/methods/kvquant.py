"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): the whole cache in 2 to 4 bits.

Nothing is discarded: every token is attended to, from codes. Keys are quantised before their
rotation, per channel, by statistics of a calibration; values per token. Codes name the 2^b
centroids of their layer, fitted by k-means that weighs each number by the squared gradient of the
loss; of `outliers` of the numbers what the codes miss stays beside them in fp16, and the first
`sinks` tokens stay as they are. Attention reads the codes themselves and turns keys to their
positions as it does (`ops.attend_packed`).

The prefill is exact. What it left in the cache is quantised at the first step, once for all rows
that share it, and each later token as it comes, the newest one of a step included. The cache holds
rotated keys, so they are turned back first: in bf16 that gives the keys before rotation up to bf16
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from quest_dist import artefacts, ops
from quest_dist.methods.block_rows import BlockRows
from quest_dist.methods.kvquant_blocks import AT_ONCE, Blocks, Rules, cache_bytes, encoded
from quest_dist.methods.method import EVERYTHING, Method, Selection, View
from quest_dist.methods.rotation import Rotation
from quest_dist.methods.traffic import CacheShape
from quest_dist.nuq import BITS, Codebook
from quest_dist.packed import GPU_STEP
from quest_dist.packing import TILE, Layout, Nuq, Packed
from quest_dist.reference import Attended


@dataclass
class KVQuant(Method):
    """Settings: `bits` 2 | 3 | 4, `outliers` (the share that stays in fp16), `sinks` (first tokens
    that stay exact), `qnorm` (centroids moved to keep mean and deviation; the paper's, for 2 bits).
    """

    budgeted: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    waits: ClassVar[bool] = True  # how many keys are outliers, and which rows share pages
    calibration: ClassVar[str | None] = "kvquant"

    bits: int = 4
    outliers: float = 0.01
    sinks: int = 1
    qnorm: bool = False
    _rows: BlockRows = field(init=False, repr=False)
    _layers: dict[int, Blocks] = field(default_factory=dict, init=False, repr=False)
    _rotation: Rotation = field(default_factory=Rotation, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise ValueError(f"bits={self.bits!r}: choose 2, 3 or 4")
        if not 0.0 <= self.outliers <= 1.0:
            raise ValueError(f"outliers={self.outliers}: choose a share from 0 to 1")
        if not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinks={self.sinks!r}: choose 0 or more tokens")
        if not isinstance(self.qnorm, bool):
            raise ValueError(f"qnorm={self.qnorm!r}: choose true or false")

    def begin(self, budgets: Sequence[int], lengths: Sequence[int]) -> None:
        """Serve these rows; what was prefilled is quantised when its layer is first asked for."""
        super().begin(budgets, lengths)
        self._rows = BlockRows(TILE, lambda length: (length, length), lengths)
        self._layers = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._rows.keep(rows)

    def check_backend(
        self, device: str, dtype: str | None = None, head_dim: int | None = None
    ) -> None:
        """Raise ValueError for heads that cannot be packed, and as all methods do."""
        super().check_backend(device, dtype, head_dim)
        if head_dim is not None:
            Layout(self.bits, TILE, head_dim, nuq=True)
            if device.startswith("cuda") and head_dim % GPU_STEP:
                raise ValueError(
                    f"a head of {head_dim} channels: a GPU takes multiples of {GPU_STEP}"
                )

    def select(self, view: View, q: Tensor) -> Selection:
        """Everything."""
        return EVERYTHING

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention over what codes and outliers stand for, and the sinks."""
        if self._rows.advance(view):
            self._ends = self._rows.counts(self._rows.ends)
        blocks = self._layers.get(view.layer)
        if blocks is None:
            blocks = self._layers[view.layer] = Blocks(self._rules(view), view.kv)
        blocks.grow(self._rows.made)
        self._write(view, blocks)
        cos, sin = self._rotation.tables(view.rotate, max(view.lengths_list), view.kv)
        beside = (blocks.key_norms, blocks.norms, blocks.starts, blocks.outliers, cos, sin)
        keys, values = self._ends
        nuq = Nuq(*beside, self.sinks)
        packed = Packed(blocks.codes, self._rows.table, keys, values, blocks.levels, TILE, nuq)
        return ops.attend_packed(
            q, view.kv, packed, view.page_table, view.lengths, scale=view.scale
        )

    def _write(self, view: View, blocks: Blocks) -> None:
        """Quantise what each row has got since this layer was last asked for: whole blocks once,
        the last one of a row as often as it grows."""
        rows = self._rows
        full: list[tuple[int, int]] = []
        growing: list[tuple[int, int]] = []
        for row, (start, end) in enumerate(zip(rows.starts[0], rows.ends[0], strict=True)):
            full += [(row, block) for block in range(start // TILE, end // TILE)]
            growing += [(row, end // TILE)] * (end % TILE > 0)
        lots = [full[first : first + AT_ONCE] for first in range(0, len(full), AT_ONCE)]
        for lot in (*lots, growing):  # those that grow, together: each such put replaces the last
            if lot:
                k, v, there = self._tokens(view, lot)
                ids = [rows.ids[row][block] for row, block in lot]
                blocks.put(ids, encoded(k, v, there, blocks.rules), full=lot is not growing)

    def _tokens(self, view: View, lot: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys before rotation and values of blocks of rows, fp32 [n, TILE, G, D] each, and which
        of their tokens are to be quantised, bool [n, TILE]."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        there = []
        for row, first, last in _runs(lot):
            start, end = first * TILE, min((last + 1) * TILE, view.lengths_list[row])
            k, v = self._cached(view, row, start, end)
            missing = (0, 0, 0, 0, 0, (start - end) % TILE)
            for x, parts in (
                (self._rotation.back(k.float(), view.rotate, start), keys),
                (v.float(), values),
            ):
                parts.append(pad(x, missing).view(-1, TILE, *x.shape[1:]))
            at = torch.arange(start, (last + 1) * TILE, device=k.device).view(-1, TILE)
            there.append((at >= self.sinks) & (at < end))
        return torch.cat(keys), torch.cat(values), torch.cat(there)

    @staticmethod
    def _cached(view: View, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What the pool holds at positions start to end - 1 of a row: [n, G, D] each."""
        first = start // view.page_size
        skipped = first * view.page_size
        table = view.page_table[row : row + 1, first:].contiguous()
        k, v = ops.gather(view.kv, table, end - skipped)
        some = slice(start - skipped, None)
        return k[0, :, some].transpose(0, 1), v[0, :, some].transpose(0, 1)

    def _rules(self, view: View) -> Rules:
        """How the artefact says that this layer is quantised; ValueError for another shape."""
        if self.artefact is None:
            raise ValueError("artefact=None: kvquant needs one; python -m quest_dist.calibrate")
        tensors = artefacts.read(self.artefact)
        layers, *heads = tensors["lower"].shape
        shape = [view.kv_heads, view.kv.shape[-1]]
        if heads != shape or view.layer >= layers:
            raise ValueError(
                f"artefact={self.artefact!r}: made for {layers} layers of {heads[0]} kv heads of"
                f" {heads[1]}, but layer {view.layer} has {shape[0]} of {shape[1]}"
            )

        def of(name: str) -> Tensor:
            return tensors[name][view.layer].to(view.kv.device)

        def codebook(which: str) -> Codebook:
            meanings = f"{which}{self.bits}" + ("_qnorm" if self.qnorm else "")
            return Codebook(of(f"{which}{self.bits}").float(), of(meanings).float())

        bounds = of("lower").float(), of("upper").float()
        return Rules(*bounds, codebook("k"), codebook("v"), self.outliers)

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """All tokens."""
        return length, length

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """All that is held."""
        return self.bytes_held(shape, length, budget)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """Sinks, codes, outliers (as many keys as the calibration meant), norms, and the rules."""
        own = cache_bytes(
            shape.kv_heads, shape.head_dim, self.bits, self.outliers, length, self.sinks
        )
        return min(self.sinks, length) * shape.token_bytes + own


def _runs(lot: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Row, first and last block of each run of neighbouring blocks of a row."""
    runs: list[tuple[int, int, int]] = []
    for row, block in lot:
        if runs and runs[-1][0] == row and runs[-1][2] == block - 1:
            runs[-1] = (row, runs[-1][1], block)
        else:
            runs.append((row, block, block))
    return runs
