"""KVQuant (Hooper et al., NeurIPS 2024, arXiv 2401.18079): the whole cache in 2 to 4 bits.

Nothing is discarded: every token is attended to, from codes. Keys are quantised before their
rotation, per channel, by statistics of a calibration; values per token. Codes name the 2^b
centroids of their layer, fitted by k-means that weighs each number by the squared gradient of the
loss; `outliers` of the numbers stay in fp16 beside the codes, and the first `sinks` tokens stay as
they are. A step turns what it reads of the keys to their positions, in fp32.

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

from quest_dist import artefacts, nuq, ops
from quest_dist.methods.kvquant_tokens import Rules, Tokens, rules_bytes, token_bytes
from quest_dist.methods.method import EVERYTHING, Method, Selection, View
from quest_dist.methods.rotation import Rotation
from quest_dist.methods.traffic import CacheShape
from quest_dist.nuq import Codebook
from quest_dist.reference import Attended

#: Channels of a layer that 16 bits can number.
MOST_CHANNELS = 1 << 15


@dataclass
class _Row:
    """One row's tokens in one layer, in order: the sinks, exact [sinks, G, D] each, tokens that
    rows may share, and the row's own."""

    sinks: tuple[Tensor, Tensor]
    shared: Tokens | None
    own: Tokens | None


@dataclass
class _Layer:
    rules: Rules
    rows: list[_Row]
    lengths: list[int]


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
    _prefilled: list[int] = field(default_factory=list, init=False, repr=False)
    _layers: dict[int, _Layer] = field(default_factory=dict, init=False, repr=False)
    _rotation: Rotation = field(default_factory=Rotation, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the settings."""
        if self.bits not in nuq.BITS or isinstance(self.bits, bool):
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
        self._prefilled = list(lengths)
        self._layers = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the rows named."""
        super().keep(rows)
        self._prefilled = [self._prefilled[row] for row in rows]
        for layer in self._layers.values():
            layer.rows = [layer.rows[row] for row in rows]
            layer.lengths = [layer.lengths[row] for row in rows]

    def select(self, view: View, q: Tensor) -> Selection:
        """Everything."""
        return EVERYTHING

    def attend(self, view: View, q: Tensor, selection: Selection) -> Attended:
        """Attention in fp32 over what codes, outliers and sinks stand for."""
        layer = self._read_new(view)
        read: dict[int, tuple[Tensor, Tensor]] = {}
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for number, row in enumerate(layer.rows):
            parts = [(row.sinks[0].float(), row.sinks[1].float())]
            start = row.sinks[0].shape[0]
            for tokens in (row.shared, row.own):
                if tokens is None:
                    continue
                if id(tokens) not in read:
                    read[id(tokens)] = self._numbers(tokens, layer.rules, view, start)
                parts.append(read[id(tokens)])
                start += len(tokens)
            result, lse[number] = _attention(q[number], parts, view.scale)
            out[number] = result.to(q.dtype)
        lengths = view.lengths[:, None]
        attended = lengths.expand(-1, view.heads)
        return Attended(out, attended, lengths.expand(-1, view.kv_heads), None, lse)

    def _numbers(
        self, tokens: Tokens, rules: Rules, view: View, start: int
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of tokens whose first has position `start`, fp32 [n, G, D]."""
        head_dim = view.kv.shape[-1]
        keys = tokens.keys(rules, head_dim)
        turned = self._rotation.forth(keys, view.rotate, start)
        return turned, tokens.values(rules, head_dim)

    def _read_new(self, view: View) -> _Layer:
        """Quantise what each row has got since this layer was last asked for."""
        layer = self._layers.get(view.layer)
        if layer is None:
            layer = self._layers[view.layer] = self._begun(view)
        for number, length in enumerate(view.lengths_list):
            start, row = layer.lengths[number], layer.rows[number]
            if start < min(self.sinks, length):  # the context was shorter
                start = min(self.sinks, length)
                row.sinks = self._cached(view, number, 0, start)
                layer.lengths[number] = start
            if length > start:
                tokens = self._quantised(view, number, start, length, layer.rules)
                row.own = tokens if row.own is None else row.own.followed_by(tokens)
                layer.lengths[number] = length
        return layer

    def _begun(self, view: View) -> _Layer:
        """The rows of a layer with their sinks, and the whole pages that were prefilled."""
        layer = _Layer(self._rules(view), [], [])
        known: dict[tuple[int, ...], Tokens] = {}
        for number, prefilled in enumerate(self._prefilled):
            start = min(self.sinks, view.lengths_list[number])
            row = _Row(self._cached(view, number, 0, start), None, None)
            pages = prefilled // view.page_size
            if (end := pages * view.page_size) > start:
                ids = tuple(view.page_table[number, :pages].tolist())
                if ids not in known:
                    known[ids] = self._quantised(view, number, start, end, layer.rules)
                row.shared = known[ids]
            layer.rows.append(row)
            layer.lengths.append(max(start, end))
        return layer

    def _quantised(self, view: View, row: int, start: int, end: int, rules: Rules) -> Tokens:
        k, v = self._cached(view, row, start, end)
        return Tokens.of(self._rotation.back(k.float(), view.rotate, start), v.float(), rules)

    @staticmethod
    def _cached(view: View, row: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        """What the pool holds at positions start to end - 1 of a row: [n, G, D] each."""
        first = start // view.page_size
        skipped = first * view.page_size
        table = view.page_table[row : row + 1, first:].contiguous()
        if end == start:
            return (view.kv.new_empty(0, view.kv_heads, view.kv.shape[-1]),) * 2
        k, v = ops.gather(view.kv, table, end - skipped)
        return k[0, :, start - skipped :].transpose(0, 1), v[0, :, start - skipped :].transpose(
            0, 1
        )

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
        if shape[0] * shape[1] > MOST_CHANNELS:
            raise ValueError(f"kvquant: {shape[0]} kv heads of {shape[1]} are over {MOST_CHANNELS}")

        def of(name: str) -> Tensor:
            return tensors[name][view.layer].to(view.kv.device)

        def codebook(which: str) -> Codebook:
            meanings = f"{which}{self.bits}" + ("_qnorm" if self.qnorm else "")
            return Codebook.of(self.bits, of(f"{which}{self.bits}"), of(meanings))

        bounds = of("lower").flatten(), of("upper").flatten()
        return Rules(*bounds, codebook("k"), codebook("v"), self.outliers)

    def planned(self, length: int, budget: int, page_size: int, step: int) -> tuple[int, int]:
        """All tokens."""
        return length, length

    def bytes_moved(self, shape: CacheShape, length: int, budget: int, read: float) -> float:
        """All that is held."""
        return self.bytes_held(shape, length, budget)

    def bytes_held(self, shape: CacheShape, length: int, budget: int) -> float:
        """Sinks, codes, outliers (as many keys as the calibration meant), norms, and the rules."""
        sinks = min(self.sinks, length)
        each = token_bytes(shape.kv_heads, shape.head_dim, self.bits, self.outliers)
        rules = rules_bytes(shape.kv_heads * shape.head_dim, self.bits)
        return sinks * shape.token_bytes + (length - sinks) * each + rules


def _attention(
    q: Tensor, parts: Sequence[tuple[Tensor, Tensor]], scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [H, D] over keys and values, fp32 [n, G, D] a part: out [H, D], lse [H]."""
    kv_heads = parts[0][0].shape[1]
    grouped = q.float().view(kv_heads, -1, q.shape[-1])
    scores = [torch.einsum("ghd,ngd->ghn", grouped, k) for k, _ in parts]
    joined = torch.cat(scores, -1) * scale
    lse = joined.logsumexp(-1)
    weights = (joined - lse[..., None]).exp().split([len(k) for k, _ in parts], -1)
    out = torch.stack(
        [torch.einsum("ghn,ngd->ghd", w, v) for w, (_, v) in zip(weights, parts, strict=True)]
    ).sum(0)
    return out.view(q.shape), lse.view(-1)
