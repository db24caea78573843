"""Language: how text becomes the token ids of one prompt, and where decoding starts in them.

A prompt is one string, `head + body + foot`: the chat format around the task's own text. It is
tokenised once; the split into context and tail, and a cut to the model's limit, happen on the ids
of that one tokenisation. (Tokenising the parts apart, as released evaluation code does, drops or
adds a token at the seam: then even full attention does not answer the benchmark's prompt.)

Where the tail starts is a rule of the protocol:
* `question`   at the task's question, by the structure of its template;
* `input`      at the line of the template that the record's input fills (kvpress's question);
* `charsN`     at the last N characters, but not before the task's marker (the released code);
* `released`   the `charsN` that the released code uses for this task;
* `tokensN`    at the last N tokens; `tokens1` prefills everything, as LongBench itself does.

What a prompt that is too long loses is another rule, `truncation`; the chat format is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from quest_dist.suggest import did_you_mean

CHAT_FORMATS: Mapping[str, tuple[str, str]] = {
    "none": ("", ""),
    # FastChat's conversation "vicuna_v1.1", which LongChat and Vicuna share.
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        " ASSISTANT:",
    ),
    # LongBench's own wrapping for Llama-2 chat models: no blanks, no system text.
    "llama2": ("[INST]", "[/INST]"),
}
"""Text before and after what the user says. `template` asks the tokenizer's own chat template."""

CHAT_CHOICES = (*CHAT_FORMATS, "template")
TAIL_CHOICES = ("question", "input", "released", "chars100", "chars400", "tokens1")
TRUNCATION_CHOICES = ("middle", "head", "error")

ELSEWHERE = ("label", "about", "dense_layers")
"""Settings of a protocol that concern no prompt: its names, and the default of the grid's axis."""


def unknown(what: str, value: object, choices: Collection[str]) -> ValueError:
    """Return the error for a value that is not one of `choices`."""
    return ValueError(f"{what}={value!r}: no such choice; {did_you_mean(value, choices)}")


@dataclass(frozen=True)
class Protocol:
    """How samples are presented: the settings of `conf/protocol` that tasks obey."""

    tail: str = "question"
    chat: bool = True
    """False: no task is wrapped in the model's chat format."""
    truncation: str = "middle"
    """Of a prompt that is too long `middle` keeps both ends, `head` the beginning and all from the
    question (or the tail, if that begins earlier) on; `error` refuses it."""
    extra_new_tokens: int = 0
    """Tokens that an answer may take beyond the benchmark's own number."""

    @classmethod
    def parse(cls, settings: Mapping[str, Any] | None) -> Protocol:
        """Read the settings that concern prompts; ValueError names the key, value and choices."""
        settings = settings or {}
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in (*known, *ELSEWHERE):
                raise ValueError(f"protocol.{key}: no such setting; {did_you_mean(key, known)}")
        tail = str(settings.get("tail", cls.tail))
        if not re.fullmatch(r"question|input|released|(chars|tokens)[1-9]\d*", tail):
            raise unknown("protocol.tail", tail, TAIL_CHOICES)
        truncation = str(settings.get("truncation", cls.truncation))
        if truncation not in TRUNCATION_CHOICES:
            raise unknown("protocol.truncation", truncation, TRUNCATION_CHOICES)
        chat = settings.get("chat", cls.chat)
        if not isinstance(chat, bool):
            raise ValueError(f"protocol.chat={chat!r} is not true or false")
        extra = settings.get("extra_new_tokens", cls.extra_new_tokens)
        if not isinstance(extra, int) or isinstance(extra, bool) or extra < 0:
            raise ValueError(f"protocol.extra_new_tokens={extra!r} is not a whole number from 0 up")
        return cls(tail, chat, truncation, extra)


@dataclass(frozen=True)
class Cut:
    """The token ids of one prompt, split where decoding starts."""

    context: tuple[int, ...]
    tail: tuple[int, ...]
    truncated: bool


@dataclass(frozen=True)
class Language:
    """A tokenizer with everything that turns a task's text into the ids a model sees."""

    tokenizer: Any
    """A transformers tokenizer that reports character offsets (any `tokenizers`-backed one)."""
    head: str
    foot: str
    max_length: int
    """Tokens the model can hold: context, tail and generated ones together."""
    eos_ids: frozenset[int]
    """Ids that end an answer: all of the tokenizer's, the model's and its generation defaults."""
    bos: int | None = None
    """Id put before every prompt; None where the tokenizer itself puts none."""
    max_prompt: int | None = None
    """Tokens of the unwrapped prompt above which it is cut, where a benchmark states a limit."""

    def hold(self, tokens: int) -> None:
        """Raise ValueError unless the model holds so many tokens."""
        if tokens > self.max_length:
            raise ValueError(
                f"a sample takes {tokens} tokens, more than model.max_length={self.max_length}"
            )

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of `text` with nothing added around them."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        text: str = self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def opening(self, text: str) -> tuple[int, ...]:
        """Return the BOS id that belongs before `text`, unless a chat template has written it."""
        if self.bos is None or text.startswith(str(self.tokenizer.bos_token)):
            return ()
        return (self.bos,)

    def length(self, body: str, *, chat: bool = True, begun: str = "") -> int:
        """Count the tokens of the whole prompt around `body`, the answer's beginning included."""
        text = (self.head + body + self.foot if chat else body) + begun
        return len(self.opening(text)) + len(self.encode(text))

    def cut(
        self,
        body: str,
        protocol: Protocol,
        *,
        question: int,
        asked: int | None = None,
        marker: int = -1,
        released: str = "chars100",
        chat: bool = True,
        begun: str = "",
        reserve: int = 0,
    ) -> Cut:
        """Tokenise the prompt around `body` once and split it by the protocol's rule.

        `question`, `asked` and `marker` are character positions in `body`: where the question
        begins, where the line of the record's input does (None: with the question), and where the
        released code's marker stands (-1: none). `released` is the task's released rule;
        `begun` is how the answer begins, behind the chat format and never cut, as that is;
        `reserve` counts the tokens that will be generated after the prompt. ValueError where the
        prompt cannot fit, or where it must be cut and the protocol refuses that.
        """
        head, foot = (self.head, self.foot) if chat and protocol.chat else ("", "")
        foot += begun
        text = head + body + foot
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in coded["offset_mapping"]]
        opening = self.opening(text)
        ids = (*opening, *coded["input_ids"])
        rule = released if protocol.tail == "released" else protocol.tail
        if rule.startswith("tokens"):
            split = len(ids) - int(rule.removeprefix("tokens"))
        else:
            at = len(head) + (question if rule == "question" or asked is None else asked)
            if rule.startswith("chars"):
                floor = len(head) + marker if marker >= 0 else -1
                at = max(len(text) - int(rule.removeprefix("chars")), floor)
            # A token across the position belongs to the tail: it cannot be prefilled by half.
            split = len(opening) + sum(end <= at for end in ends)

        inner = sum(end <= len(head) for end in ends) if head else 0
        outer = sum(end > len(text) - len(foot) for end in ends) if foot else 0
        last = None
        if protocol.truncation == "head":
            start = len(opening) + sum(end <= len(head) + question for end in ends)
            last = min(start, split)
        first, last = self._lost(len(ids), len(opening), inner, outer, reserve, last)
        truncated = first < last
        if truncated and protocol.truncation == "error":
            raise ValueError(
                f"the prompt has {len(ids)} tokens, more than model.max_length={self.max_length} "
                f"less {reserve} to generate, and protocol.truncation=error forbids cutting it"
            )
        if truncated:
            ids = ids[:first] + ids[last:]
            split = max(split - (last - first), first) if split >= first else split
        split = min(max(split, 1), len(ids) - 1)
        return Cut(ids[:split], ids[split:], truncated)

    def _lost(
        self, total: int, opening: int, inner: int, outer: int, reserve: int, last: int | None
    ) -> tuple[int, int]:
        """Return (first, last): ids[first:last] is what a prompt that is too long loses.

        The limit holds for the unwrapped prompt, BOS included, as in LongBench; the chat format is
        never cut. With `last` given, all from there on is kept, and before it what room is left;
        without, both halves have half the limit, rounded down.
        """
        room = self.max_length - reserve - inner - outer
        limit = min(room, self.max_prompt or room)
        if total - inner - outer <= limit:
            return total, total
        begin = limit // 2 if last is None else limit - (total - outer - last)
        if begin <= opening:
            kept = "" if last is None else f", a question of {total - outer - last} tokens"
            raise ValueError(
                f"model.max_length={self.max_length} leaves no room for a prompt beside "
                f"{reserve} tokens to generate and a chat format of {inner + outer} tokens{kept}"
            )
        return inner + begin, total - outer - begin if last is None else last


def chat_format(choice: str | Mapping[str, str], tokenizer: Any) -> tuple[str, str]:
    """Return the text before and after the user's words for a `chat` setting of a model.

    `choice` is a name of CHAT_FORMATS, `template` for the tokenizer's own, or {head, foot}.
    """
    if isinstance(choice, Mapping):
        if set(choice) != {"head", "foot"}:
            raise ValueError(f"model.chat={dict(choice)!r} needs exactly the keys head and foot")
        return str(choice["head"]), str(choice["foot"])
    if choice in CHAT_FORMATS:
        return CHAT_FORMATS[choice]
    if choice != "template":
        raise unknown("model.chat", choice, CHAT_CHOICES)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "model.chat='template' but this model's tokenizer carries no chat template"
        )
    place = "\x02body\x03"
    # Templates that print today's date would make every day's prompt another one; some accept ours.
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": place}],
        tokenize=False,
        add_generation_prompt=True,
        date_string="26 Jul 2024",
    )
    head, found, foot = text.partition(place)
    if not found:
        raise ValueError("model.chat='template': this model's chat template alters the user's text")
    return head, foot
