"""Drafts: what guesses the tokens of a tree before the target reads them.

    early_exit  the target's own first layers, its final norm and its output head (as SPEED guesses;
                Hooper et al., arXiv 2310.12072). Its keys and values are the target's, so it goes
                on from the target's own pages, under the target's method, and holds none.
    model       another model of the same vocabulary, dense, with a cache of its own.
    lookup      the text itself: what followed the longest equal ending, the latest place first.

A draft is asked for guesses level by level, the nodes of a level being rows of one decode step. It
decides how much a pass gives, never what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from quest_dist import models
from quest_dist.attention import PagedCache, Patch, patch
from quest_dist.batch import Batch, Group, new_batch
from quest_dist.engine import read
from quest_dist.methods.full import Full
from quest_dist.pool import Rows

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel

#: Rows -> a group of so many, with a method of its own.
Fresh = Callable[[int], Group]
#: Longest ending that a lookup compares, in tokens.
LONGEST = 3


class Draft(Protocol):
    """What `speculation` asks."""

    def begin(self, rows: Rows, text: Sequence[int], asked: int, most: int) -> list[list[int]]:
        """Read the context `text`. Gives the `most` likeliest next tokens after each of its last
        `asked`, best first; the target's `rows` hold what is before these."""
        ...

    def again(self, fresh: Fresh) -> None:
        """Go back to the context: a point begins, whose rows are grouped so."""
        ...

    def start(self, rows: Rows, text: Sequence[int]) -> None:
        """Guess what follows `text`; the target's row holds all of it but the last token."""
        ...

    def guess(
        self, parents: Sequence[int], tokens: Sequence[int], most: int
    ) -> Sequence[Sequence[int]]:
        """As token_tree.Guess."""
        ...

    def stop(self) -> None:
        """Let go of what the guesses took."""
        ...


def dense(rows: int) -> Group:
    """Rows that attend to everything."""
    return Group(Full(), [0] * rows, 0)


class ByModel:
    """Guesses of a model that decodes from rows of the target's pool, or of its own."""

    def __init__(self, loaded: LoadedModel, patched: Patch) -> None:
        self.loaded, self._patched = loaded, patched
        self._fresh: Fresh = dense
        self._level: Rows | None = None
        self._position = 0

    def _read(
        self, batch: Batch, tokens: Sequence[Sequence[int]], position: int, keep: int
    ) -> Tensor:
        return read(self.loaded, PagedCache(batch), tokens, [position] * len(tokens), keep)

    def again(self, fresh: Fresh) -> None:
        """Guess under the point's method from now on."""
        self._fresh = fresh

    def start(self, rows: Rows, text: Sequence[int]) -> None:
        """The first level goes on from row 0 of `rows`."""
        self._level, self._position = rows.fork(0, 1), len(text) - 1

    def guess(
        self, parents: Sequence[int], tokens: Sequence[int], most: int
    ) -> Sequence[Sequence[int]]:
        """The likeliest tokens by the draft's logits."""
        assert self._level is not None
        rows = self._level.copies(parents)
        self.stop()
        self._level = rows
        batch = Batch(rows, [self._fresh(len(rows))], self._patched.rotate)
        logits = self._read(batch, [[token] for token in tokens], self._position, 1)
        self._position += 1
        return ranked(logits[:, -1], most)

    def stop(self) -> None:
        """Let go of the last level's rows."""
        if self._level is not None:
            self._level.keep([])
        self._level = None


def ranked(logits: Tensor, most: int) -> list[list[int]]:
    """The `most` likeliest tokens of logits [n, vocabulary], best first."""
    found: list[list[int]] = logits.topk(min(most, logits.shape[-1]), dim=-1).indices.tolist()
    return found


class EarlyExit(ByModel):
    """The first layers of the target; all of them make the target itself."""

    def __init__(self, loaded: LoadedModel, patched: Patch, layers: int) -> None:
        super().__init__(loaded, patched)
        count = patched.geometry.layers
        if not 1 <= layers <= count:
            raise ValueError(f"exit_layers={layers}: the model has layers 1 to {count}")
        self.layers = layers

    def _read(
        self, batch: Batch, tokens: Sequence[Sequence[int]], position: int, keep: int
    ) -> Tensor:
        with first_layers(self.loaded.model, self.layers):
            return super()._read(batch, tokens, position, keep)

    def begin(self, rows: Rows, text: Sequence[int], asked: int, most: int) -> list[list[int]]:
        """What the first layers say of the context's end; the target prefills for both."""
        batch = Batch(rows.fork(0, 1), [], self._patched.rotate)
        logits = self._read(batch, [text[-asked:]], len(text) - asked, asked)
        batch.rows.keep([])
        return ranked(logits[0], most)


@contextmanager
def first_layers(model: Any, count: int) -> Iterator[None]:
    """Let a model end after its first `count` layers, its final norm and head being the same."""
    base = model.base_model
    whole = base.layers
    base.layers = whole[:count]
    try:
        yield
    finally:
        base.layers = whole


class OtherModel(ByModel):
    """A smaller model, dense, with pages of its own."""

    def __init__(self, loaded: LoadedModel, patched: Patch) -> None:
        super().__init__(loaded, patched)
        self._context: Rows | None = None
        self._trunk: Rows | None = None

    def begin(self, rows: Rows, text: Sequence[int], asked: int, most: int) -> list[list[int]]:
        """Prefill the context."""
        patched, before = self._patched, len(text) - asked
        sizes = (patched.geometry, patched.page_size)
        device = self.loaded.device
        batch = new_batch(*sizes, (), 1, patched.rotate, reserve=2 * len(text), device=device)
        if before:
            self._read(batch, [text[:before]], 0, 1)
        logits = self._read(batch, [text[before:]], before, asked)
        self._context = batch.rows
        return ranked(logits[0], most)

    def again(self, fresh: Fresh) -> None:
        """Back to the context; the draft stays dense, whatever the point's method."""
        assert self._context is not None
        if self._trunk is not None:
            self._trunk.keep([])
        self._trunk = self._context.fork(0, 1)

    def start(self, rows: Rows, text: Sequence[int]) -> None:
        """Read what the target has accepted since."""
        assert self._trunk is not None
        [held] = self._trunk.lengths_list
        if held < len(text) - 1:
            batch = Batch(self._trunk, [], self._patched.rotate)
            self._read(batch, [text[held:-1]], held, 1)
        super().start(self._trunk, text)


class Lookup:
    """Copies of the text; it computes nothing."""

    def __init__(self) -> None:
        self._context: list[int] = []
        self._text: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._level: list[list[int]] = []

    def begin(self, rows: Rows, text: Sequence[int], asked: int, most: int) -> list[list[int]]:
        """What a lookup in the text before would have said."""
        self._context, found = list(text), []
        self._forget()
        for number, token in enumerate(text):
            self._add(token)
            if number >= len(text) - asked:
                found.append(self._after(self._text[-LONGEST:], most))
        return found

    def _forget(self) -> None:
        self._text, self._places = [], {}

    def _add(self, token: int) -> None:
        """One more token of the text: it is what followed the endings before it."""
        for size in range(1, min(LONGEST, len(self._text)) + 1):
            self._places.setdefault(tuple(self._text[-size:]), []).append(len(self._text))
        self._text.append(token)

    def _after(self, ending: Sequence[int], most: int) -> list[int]:
        found: dict[int, None] = {}
        for size in range(len(ending), 0, -1):
            for place in reversed(self._places.get(tuple(ending[-size:]), ())):
                found[self._text[place]] = None
                if len(found) == most:
                    return list(found)
        return list(found)

    def again(self, fresh: Fresh) -> None:
        """Back to the context."""
        self._forget()
        for token in self._context:
            self._add(token)

    def start(self, rows: Rows, text: Sequence[int]) -> None:
        """Note what was accepted since."""
        for token in text[len(self._text) :]:
            self._add(token)
        self._level = [list(text[-LONGEST:-1])]

    def guess(
        self, parents: Sequence[int], tokens: Sequence[int], most: int
    ) -> Sequence[Sequence[int]]:
        """What followed the longest ending of each node's path."""
        level = [
            [*self._level[parent], token][-LONGEST:]
            for parent, token in zip(parents, tokens, strict=True)
        ]
        self._level = level
        return [self._after(ending, most) for ending in level]

    def stop(self) -> None:
        """Nothing was taken."""
        self._level = []


_others: dict[str, LoadedModel] = {}


@contextmanager
def opened(
    loaded: LoadedModel,
    patched: Patch,
    kind: str,
    exit_layers: int,
    model: Mapping[str, Any] | None,
) -> Iterator[Draft]:
    """A draft for a patched target, as the task `speculation` sets it.

    Raises ValueError for layers that the target has not and a model of another vocabulary.
    """
    if kind == "early_exit":
        yield EarlyExit(loaded, patched, exit_layers)
    elif kind == "lookup":
        yield Lookup()
    else:
        assert model is not None
        other = _other(model, loaded)
        with patch(other.model, lambda rows: [], patched.page_size) as on_other:
            yield OtherModel(other, on_other)


def _other(settings: Mapping[str, Any], target: LoadedModel) -> LoadedModel:
    """The draft's model, loaded once in this process."""
    key = repr((sorted(settings.items()), target.device))
    if key not in _others:
        _others.clear()
        _others[key] = models.load(settings, target.device.type)
    other = _others[key]
    if other.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise ValueError(
            f"draft_model={settings.get('repo') or settings.get('path')}: its vocabulary differs"
            " from the target's; choose a smaller model of the same family"
        )
    return other
