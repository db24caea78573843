"""Latency mode: rows decode with all their state on the device, so that a step is one CUDA graph.

A `Decoder` continues rows of a pool under a method that is a page rule (see methods.method). One
`step` embeds a token of every row, runs the model's own layers with `PreparedDecode` as their
attention, and puts the likeliest next tokens in the place of those it read. On a GPU `capture`
records it once, and `step` replays the record; elsewhere the same code runs as it stands.

Invariants:
  - a step reads nothing back from the device and allocates nothing but what its layers return;
  - the pages of all steps are assigned before the first, so the page table never changes; lengths,
    tokens and pages to keep are buffers that a step updates in place;
  - tokens and page sets are those of the accuracy path (`engine`, `batch`), ops and rules being
    the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quest_dist.attention import PagedCache, Patch, patch
from quest_dist.backend import compiled_cuda
from quest_dist.batch import Group
from quest_dist.engine import check_sample, groups_of, prefill
from quest_dist.methods.method import PageRule, as_int32
from quest_dist.pool import Pool, Rows
from quest_dist.prepared import PreparedDecode

if TYPE_CHECKING:
    from quest_dist.models import LoadedModel
    from quest_dist.plan import Point
    from quest_dist.tasks.task import Sample

#: Steps run before one is recorded: libraries choose and load their kernels in the first.
WARM_UP = 2
#: Rotary embeddings whose angles depend on the longest position so far, which the host would read.
MOVING_ROTATIONS = ("dynamic", "longrope")


class Decoder:
    """Rows under one method that decode one token each a step.

    `tokens` [R, 1] are those that the next step reads (set them with `feed`), `lengths` int32 [R]
    the tokens held, `logits` [R, vocabulary] what the last step ended in.
    """

    def __init__(self, patched: Patch, rows: Rows, group: Group, steps: int) -> None:
        """Continue `rows` under `group` for at most `steps` steps, inside the patch.

        Raises ValueError for a method that is no page rule and a model whose rotary embedding
        would have to be asked in every step.
        """
        if steps < 1:
            raise ValueError(f"Decoder: steps={steps}; expected at least 1")
        self._rule = page_rule(group)
        _check_rotation(patched)
        rows.reserve(steps)
        self._patched, self._rows, self._dense_layers = patched, rows, group.dense_layers
        self._left = steps
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: Tensor | None = None
        pool, count = rows.pool, len(rows)
        self.budgets = as_int32(group.budgets, pool.device)
        self.lengths = rows.lengths.clone()
        self.keep = torch.full_like(self.lengths, -1)
        self.tokens = torch.zeros(count, 1, dtype=torch.long, device=pool.device)
        vocabulary = patched.model.config.get_text_config().vocab_size
        self.logits = torch.zeros(count, vocabulary, dtype=pool.geometry.dtype, device=pool.device)
        #: What each layer attended to in the last step, int32 [R, H].
        self.attended: dict[int, Tensor] = {}
        self._layers: dict[int, PreparedDecode] = {}
        self._prepared_for: Tensor | None = None

    @property
    def pool(self) -> Pool:
        """The pages of these rows."""
        return self._rows.pool

    def feed(self, tokens: Sequence[int]) -> None:
        """Let the next step read these tokens, one a row."""
        with torch.inference_mode():
            self.tokens.copy_(torch.tensor(tokens)[:, None])

    def step(self) -> None:
        """Decode `tokens` and put those chosen next in their place.

        Raises ValueError when the steps that pages were assigned for are used up.
        """
        if self._left == 0:
            raise ValueError("Decoder: the steps that it was made for are used up; make it longer")
        self._left -= 1
        if self._graph is not None:
            assert self._recorded is self.pool.kv, "the pool has grown since the step was recorded"
            self._graph.replay()
        else:
            self._decode()

    def capture(self) -> None:
        """Record a step on the GPU for `step` to replay; the rows stay where they are.

        Raises ValueError on the CPU.
        """
        device = self.lengths.device
        if device.type != "cuda":
            raise ValueError(f"Decoder: its rows are on {device}; only a GPU's steps are captured")
        tokens, lengths = self.tokens.clone(), self.lengths.clone()

        def again() -> None:
            self.tokens.copy_(tokens)
            self.lengths.copy_(lengths)

        with torch.cuda.device(device), torch.inference_mode():
            compiled_cuda().warm_up(device.index)
            stream: Any = torch.cuda.Stream  # which torch leaves untyped
            aside = stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    # What these steps append is overwritten by the first step that counts.
                    self._decode()
                    again()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # torch's own stream for captures is on the device that captured first.
            with torch.cuda.graph(graph, stream=aside):
                self._decode()
            again()
        self._graph, self._recorded = graph, self.pool.kv

    @torch.inference_mode()
    def _decode(self) -> None:
        self.lengths += 1  # the new token counts
        if self._rule.keep is not None:
            self.keep.copy_(self._rule.keep(self.lengths, self.budgets, self.pool.page_size))
        out = self._patched.model(
            input_ids=self.tokens,
            position_ids=(self.lengths - 1).long()[:, None],
            past_key_values=PagedCache(self),  # kept, it would keep these pages alive
            logits_to_keep=1,
        )
        self.logits.copy_(out.logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))

    def write(self, layer: int, k: Tensor, v: Tensor, padding: Sequence[int] | None) -> None:
        """Nothing: `attend` appends."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append k, v [R, G, 1, D] and attend with q [R, H, 1, D] -> [R, 1, H, D]."""
        if self._prepared_for is not self.pool.kv:  # it may have grown for other rows
            self._prepared_for = self.pool.kv
            self._layers.clear()
        if layer not in self._layers:
            ruled = layer >= self._dense_layers and self._rule.keep is not None
            self._layers[layer] = PreparedDecode(
                self.pool.kv[layer],
                self.pool.meta[layer],
                self._rows.page_table,
                self.lengths,
                self.keep if ruled else None,
                radius_scale=self._rule.radius_scale,
                reduce=self._rule.reduce,
                scale=scale,
            )
        result = self._layers[layer](q[:, :, 0], k[:, :, 0], v[:, :, 0])
        self.attended[layer] = result.attended
        return result.out[:, None]

    def release(self) -> None:
        """Let go of the rows' pages; no step may follow."""
        self._left = 0
        self._layers.clear()
        self._prepared_for = None
        self._rows.keep([])

    def count(self) -> None:
        """Nothing: `attended` stays on the device."""


def page_rule(group: Group) -> PageRule:
    """The page rule of a group's method; ValueError as `Method.rule_alone`, naming the method."""
    try:
        return group.method.rule_alone()
    except ValueError as error:
        raise ValueError(f"method {type(group.method).__name__.lower()}: {error}") from error


def _check_rotation(patched: Patch) -> None:
    rotary = getattr(patched.model.base_model, "rotary_emb", None)
    kind = str(getattr(rotary, "rope_type", ""))
    if any(moving in kind for moving in MOVING_ROTATIONS):
        raise ValueError(
            f"model {type(patched.model).__name__}: its rotary embedding ({kind}) depends on the"
            " longest position, so a step cannot be repeated without asking for it"
        )


@torch.inference_mode()
def generate(loaded: LoadedModel, sample: Sample, points: Sequence[Point]) -> list[tuple[int, ...]]:
    """The tokens that `engine.evaluate` gives for `points`, in their order, in latency mode.

    The context is prefilled once; the rows of each method go on from it in a graph of their own.
    Rows past their end-of-sequence token go on with the others, unseen.
    """
    check_sample(sample, loaded.language.max_length)
    groups, order = groups_of(loaded, points)
    steps = len(sample.tail) + sample.max_new_tokens
    found: list[tuple[int, ...]] = []
    with patch(loaded.model, lambda rows: groups, points[0].page_size) as patched:
        prefix = prefill(loaded, patched, sample, (), len(order))
        for group in groups:
            rows = prefix.rows.fork(0, len(group.budgets))
            decoder = Decoder(patched, rows, group, steps)
            if loaded.device.type == "cuda":
                decoder.capture()
            found += _answers(decoder, sample, loaded.language.eos_ids)
            rows.keep([])
    return [tokens for _, tokens in sorted(zip(order, found, strict=True))]


def _answers(decoder: Decoder, sample: Sample, eos_ids: frozenset[int]) -> list[tuple[int, ...]]:
    """What each row of a decoder answers: the tail is fed, the rest chosen."""
    rows = len(decoder.budgets)
    for token in sample.tail:
        decoder.feed([token] * rows)
        decoder.step()
    chosen = []
    for number in range(sample.max_new_tokens):
        if number:
            decoder.step()
        chosen.append(decoder.tokens.clone())
    answers = torch.cat(chosen, 1).tolist() if chosen else [[]] * rows
    ends = [
        next((place for place, token in enumerate(row) if token in eos_ids), len(row))
        for row in answers
    ]
    return [tuple(row[:end]) for row, end in zip(answers, ends, strict=True)]
