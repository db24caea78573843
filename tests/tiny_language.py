"""A small byte-level tokenizer and its Language, trained in a moment without file or network."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quest_dist.tasks.filler import ARTICLE, DOCUMENT, REPORT, STORY
from quest_dist.tasks.prompt import Language

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer over bytes with 600 entries; <s> begins and </s> ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*ARTICLE, *STORY, *REPORT, *DOCUMENT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def tiny_language(**changes: Any) -> Language:
    """A Language of 2,048 tokens without chat format or BOS, unless changed."""
    settings: dict[str, Any] = {
        "tokenizer": tiny_tokenizer(),
        "head": "",
        "foot": "",
        "max_length": 2048,
        "eos_ids": frozenset({1}),
    }
    return Language(**{**settings, **changes})
