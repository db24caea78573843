"""Sides: a filled cache, and what the attention benchmark times on it.

Every layer of a cache is a buffer of the rotation: the same keys and values, other queries, hence
other lists of pages. A row's pages lie one after another, as a pool hands them out, or shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quest_dist import ops
from quest_dist.methods.quest import pages_to_keep
from quest_dist.prepared import PreparedDecode
from quest_dist.shapes import Point
from quest_dist.timing import Rotation, Side

#: Tokens of the random block that fills a cache; every repetition has its channels turned by one.
BLOCK = 2048
#: Largest difference of two attentions, in units of the largest output.
TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2**-14}


@dataclass(frozen=True)
class Cache:
    """Pools, page tables and queries of a point: kv[layer], meta[layer], q[layer]."""

    point: Point
    kv: Tensor
    meta: Tensor
    table: Tensor  # int32 [R, P]
    lengths: Tensor  # int32 [R]
    q: Tensor  # [layers, R, H, D]

    @property
    def layers(self) -> int:
        """Buffers of the rotation."""
        return self.q.shape[0]


def filled(
    point: Point,
    layers: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Cache:
    """A cache of normally distributed keys, values and queries, the same on every device."""
    random = torch.Generator().manual_seed(seed)
    shape, rows, context = point.shape, point.rows, point.context
    kv, meta = ops.allocate_pages(
        layers, point.pages, shape.kv_heads, point.page_size, shape.head_dim, dtype, device
    )
    order = torch.arange(point.pages)
    if point.shuffled:
        order = torch.randperm(point.pages, generator=random)
    order = order.int().to(device)
    if point.shared:
        prefix, own = order[:-rows], order[-rows:, None]
        table = torch.cat((prefix.expand(rows, -1), own), dim=1).contiguous()
    else:
        table = order.view(rows, -1).contiguous()
    size = (1, shape.kv_heads, min(BLOCK, context), shape.head_dim)
    keys, values = (torch.randn(size, generator=random).to(device, dtype) for _ in range(2))
    filling = table[:1] if point.shared else table
    for turn, start in enumerate(range(0, context, BLOCK)):
        tokens = slice(0, min(BLOCK, context - start))
        k = keys.roll(turn, dims=-1)[:, :, tokens].expand(len(filling), -1, -1, -1)
        v = values[:, :, tokens].expand(len(filling), -1, -1, -1)
        ops.append(kv[0], meta[0], filling, k, v, _int32([start] * len(filling), device))
    if point.shared and rows > 1:
        last = keys[:, :, : point.page_size].expand(rows - 1, -1, -1, -1)
        starts = _int32([context - point.page_size] * (rows - 1), device)
        ops.append(kv[0], meta[0], table[1:], last, last, starts)
    for layer in range(1, layers):
        kv[layer].copy_(kv[0])
        meta[layer].copy_(meta[0])
    q = torch.randn(layers, rows, shape.heads, shape.head_dim, generator=random).to(device, dtype)
    return Cache(point, kv, meta, table, _int32([context] * rows, device), q)


def _int32(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _words(size: int, device: torch.device | str) -> Tensor:
    """At least so many bytes, from where the pools are from: alike in the system's pages."""
    pages = -(-size // (2 * 1024 * 4))
    pool, _ = ops.allocate_pages(1, pages, 1, 16, 64, torch.float32, device)
    return pool.fill_(1.0).view(torch.int32).view(-1)


def read(size: int, device: torch.device | str = "cpu") -> Side:
    """The memory's read bandwidth: the maximum of a buffer of at least so many bytes."""
    buffer = _words(size, device)
    return Side("read", {"read": lambda _: buffer.amax()}, (buffer.nbytes,))


def copy(size: int, device: torch.device | str) -> Side:
    """The memory's copy bandwidth: `size` bytes read and as many written."""
    source, target = (_words(size // 2, device) for _ in range(2))
    return Side("copy", {"copy": lambda _: target.copy_(source)}, (2 * source.nbytes,))


def dense(cache: Cache, rotation: Rotation) -> Side:
    """Our attention over every token."""

    steps = [
        PreparedDecode(cache.kv[layer], cache.meta[layer], cache.table, cache.lengths)
        for layer in range(cache.layers)
    ]

    def attend(layer: int) -> None:
        steps[layer](cache.q[layer])

    return Side("dense", {"attend": attend}, (cache.point.dense_bytes(cache.q.dtype),), rotation)


def apart(cache: Cache, rotation: Rotation) -> Side:
    """As many calls of one row as the cache has rows, each on a layer (a prefix) of its own.

    They begin at the layer that has waited longest.
    """
    lengths = cache.lengths[:1]
    rows = [
        (
            PreparedDecode(
                cache.kv[row], cache.meta[row], cache.table[row, None].contiguous(), lengths
            ),
            cache.q[row, row, None].contiguous(),
        )
        for row in range(cache.point.rows)
    ]
    one = Point(cache.point.shape, cache.point.context)
    moved = cache.point.rows * one.dense_bytes(cache.q.dtype)

    def attend(first: int) -> None:
        for step, q in (*rows[first:], *rows[:first]):
            step(q)

    return Side("calls", {"attend": attend}, (moved,), rotation, uncounted=0, counted=1)


class QuestStep:
    """One step of Quest: whole, and as score, select and attend, each leaving what the next needs.

    `pages` is the length of its lists.
    """

    def __init__(
        self, cache: Cache, budget: int, lists: ops.Reduce, radius_scale: float = 1.0
    ) -> None:
        """The cache must hold more tokens than the budget."""
        point, device = cache.point, cache.q.device
        self.cache, self.lists, self.budget = cache, lists, budget
        self.radius_scale = radius_scale
        self.pages = pages_to_keep(point.context, budget, point.page_size)
        self.items = _int32([point.context // point.page_size] * point.rows, device)
        self.keep = _int32([self.pages] * point.rows, device)
        self._steps = [
            PreparedDecode(
                cache.kv[layer],
                cache.meta[layer],
                cache.table,
                cache.lengths,
                self.keep,
                radius_scale=radius_scale,
                reduce=lists,
            )
            for layer in range(cache.layers)
        ]

    def score(self, layer: int) -> None:
        """Every closed page."""
        cache = self.cache
        self.scores = ops.page_scores(
            cache.q[layer],
            cache.kv[layer],
            cache.meta[layer],
            cache.table,
            cache.lengths,
            radius_scale=self.radius_scale,
            reduce=self.lists,
        )

    def select(self, layer: int) -> None:
        """The best pages and the current one."""
        self.index, self.count = ops.select_top(self.scores, self.items, self.keep, force_last=True)

    def attend(self, layer: int) -> None:
        """To the pages selected."""
        cache = self.cache
        self.attended = ops.attend(
            cache.q[layer], cache.kv[layer], cache.table, cache.lengths, self.index, self.count
        )

    def whole(self, layer: int) -> ops.Attended:
        """All of it in one call, without a rotation or a new token, until the layer's next one."""
        return self._steps[layer](self.cache.q[layer])

    def sides(self, rotation: Rotation) -> list[Side]:
        """The whole, and the three as one sequence with the times of its parts."""
        self.score(0)
        self.select(0)
        self.attend(0)
        self._check()
        same(f"{self.cache.point}, quest whole", self.whole(0).out, self.attended.out)
        point, dtype = self.cache.point, self.cache.q.dtype
        steps = {"score": self.score, "select": self.select, "attend": self.attend}
        moved = (point.score_bytes(dtype), 0, self._listed_bytes())
        named = f"{self.budget} {self.lists}"
        return [
            Side(f"quest {named}", {"quest": self.whole}, (sum(moved),), rotation),
            Side(f"pieces {named}", steps, moved, rotation),
        ]

    def listed(self) -> Tensor:
        """The lists, int32 [R, Hs, pages], of a view."""
        return self.index[:, :, : self.pages]

    def _listed_bytes(self) -> int:
        """Bytes of the distinct (page, kv head) pairs that the lists of all rows name."""
        shape = self.cache.point.shape
        lists = self.listed().reshape(self.cache.point.rows, shape.kv_heads, -1).long()
        pairs = 0
        for head in range(shape.kv_heads):
            pages = self.cache.table.gather(1, lists[:, head])
            pairs += int(pages.flatten().bincount().count_nonzero())
        return (
            pairs
            * self.cache.point.page_size
            * shape.token_bytes(self.cache.q.dtype)
            // shape.kv_heads
        )

    def _check(self) -> None:
        """The attention of the first and last query is that over the tokens of their lists."""
        cache, shape = self.cache, self.cache.point.shape
        if not bool((self.attended.attended == self.budget).all()):
            raise RuntimeError(f"{cache.point}: quest attended to other than {self.budget} tokens")
        for row, head in ((0, 0), (cache.point.rows - 1, shape.heads - 1)):
            pages = self.listed()[row, head * self.index.shape[1] // shape.heads].long()
            k, v = ops.gather(cache.kv[0], cache.table[row, pages][None].contiguous(), self.budget)
            group = head * shape.kv_heads // shape.heads
            expected = scaled_dot_product_attention(
                cache.q[0, row, head].view(1, 1, -1), k[:, group], v[:, group]
            )
            same(f"{cache.point}, quest", self.attended.out[row, head], expected.view(-1))


def check_dense(cache: Cache) -> None:
    """Our dense attention of the first and last row is torch's."""
    last = cache.layers - 1
    ours = ops.attend(cache.q[last], cache.kv[last], cache.table, cache.lengths).out
    for row in {0, cache.point.rows - 1}:
        k, v = ops.gather(cache.kv[last], cache.table[row, None].contiguous(), cache.point.context)
        q = cache.q[last, row, None]
        theirs = scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)
        same(f"{cache.point}, dense", ours[row], theirs[0, :, 0])


def same(what: str, ours: Tensor, theirs: Tensor) -> None:
    """RuntimeError unless two attentions agree, so that no wrong result is timed."""
    difference = float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())
    if not difference <= TOLERANCE[ours.dtype]:
        raise RuntimeError(f"{what}: differs from torch SDPA by {difference:.2g} of the largest")


def sdpa(cache: Cache, buffers: int) -> list[Side]:
    """torch SDPA of one query a row, in the two ways in which Hugging Face's `sdpa` calls it.

    gqa: enable_gqa=True, when there is no mask; folded: the query heads of a kv head as its
    queries, when there is one (here too without the mask). They are one where heads are as many.
    """
    point, shape = cache.point, cache.point.shape
    pairs = [
        ops.gather(cache.kv[number % cache.layers], cache.table, point.context)
        for number in range(buffers)
    ]
    grouped = shape.heads > shape.kv_heads
    queries = [cache.q[number % cache.layers] for number in range(buffers)]

    def gqa(number: int) -> None:
        q = queries[number][:, :, None]
        scaled_dot_product_attention(q, *pairs[number], enable_gqa=grouped)

    def folded(number: int) -> None:
        q = queries[number].view(point.rows, shape.kv_heads, -1, shape.head_dim)
        scaled_dot_product_attention(q, *pairs[number])

    rotation, moved = Rotation(buffers), (point.dense_bytes(cache.q.dtype),)
    kinds = [("sdpa gqa", gqa), *([("sdpa folded", folded)] if grouped else [])]
    return [Side(name, {"sdpa": f}, moved, rotation, 0, 1) for name, f in kinds]
