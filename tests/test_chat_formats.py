"""Golden prompts: the exact text and ids of every configured model's prompt, BOS and end tokens.

The strings and ids are the models' own. They were computed once with the models' vocabularies: of
Llama 3 and Qwen in their makers' packages (llama-models, dashscope), of Mistral v3 in
mistral-common, of Llama 2 in llama-tokenizer-js. Here a tokenizer holds only the pieces of one
golden prompt under those ids and takes the longest first, which gives the same ids on this text.
TEMPLATES do with one message of a user what the models' own chat templates do (those of Llama 3
and Qwen2.5 were read beside theirs, Mistral's beside its makers' description); tools, systems and
answers, which no prompt of ours has, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from quest_dist import models
from quest_dist.folders import find
from quest_dist.tasks.prompt import Language, Protocol

BODY = "Where is Ada?\nAnswer:"
TEMPLATES = {
    # As later Llamas do, today's date unless one is given: the date must be given.
    "llama31_8b": (
        "{{- bos_token }}"
        "{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
        "{% endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + date_string + '\n\n' }}"
        "{{- '<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
        "{{- m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "qwen25_7b": (
        "{{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. ' }}"
        "{{- 'You are a helpful assistant.<|im_end|>\n' }}"
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "mistral_7b": (
        "{{- bos_token }}{%- for m in messages %}{{- '[INST] ' + m.content + '[/INST]' }}"
        "{%- endfor %}"
    ),
}


@dataclass(frozen=True)
class Golden:
    """A model's prompt around BODY: its text, and its pieces with their ids."""

    head: str
    foot: str
    pieces: tuple[tuple[str, int], ...]
    eos: Any
    """The end tokens of the model's published generation_config.json."""
    bos_token: str | None = "<s>"
    eos_token: str = "</s>"
    special: tuple[str, ...] = ()


_LLAMA2_BODY = (("▁Where", 6804), ("▁is", 338), ("▁Ada", 23255), ("?", 29973), ("\n", 13))
_ENDS = (("Answer", 22550), (":", 29901))
_VICUNA = (
    *(("<s>", 1), ("▁A", 319), ("▁chat", 13563), ("▁between", 1546), ("▁a", 263)),
    *(("▁curious", 12758), ("▁user", 1404), ("▁and", 322), ("▁an", 385), ("▁artificial", 23116)),
    *(("▁intelligence", 21082), ("▁assistant", 20255), (".", 29889), ("▁The", 450)),
    *(("▁assistant", 20255), ("▁gives", 4076), ("▁helpful", 8444), (",", 29892)),
    *(("▁detailed", 13173), (",", 29892), ("▁and", 322), ("▁pol", 1248), ("ite", 568)),
    *(("▁answers", 6089), ("▁to", 304), ("▁the", 278), ("▁user", 1404), ("'", 29915)),
    *(("s", 29879), ("▁questions", 5155), (".", 29889), ("▁US", 3148), ("ER", 1001)),
    *((":", 29901), *_LLAMA2_BODY, *_ENDS),
    *(("▁A", 319), ("SS", 1799), ("IST", 9047), ("ANT", 13566), (":", 29901)),
)
GOLDEN = {
    "longchat_7b": Golden(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: ",
        " ASSISTANT:",
        _VICUNA,
        eos=2,
    ),
    "yarn_llama2_7b_128k": Golden("", "", (("<s>", 1), *_LLAMA2_BODY, *_ENDS), eos=2),
    # No blank after [INST] and none before [/INST]: a token stands across the seam.
    "llama2_7b": Golden(
        "[INST]",
        "[/INST]",
        (
            *(("<s>", 1), ("▁[", 518), ("INST", 25580), ("]", 29962), ("Where", 11921)),
            *(*_LLAMA2_BODY[1:], ("Answer", 22550)),
            *((":[", 10834), ("/", 29914), ("INST", 25580), ("]", 29962)),
        ),
        eos=2,
    ),
    "mistral_7b": Golden(
        "<s>[INST] ",
        "[/INST]",
        (
            *(("<s>", 1), ("[INST]", 3), ("▁Where", 7694), ("▁is", 1117), ("▁A", 1098)),
            *(("da", 2473), ("?", 29572), ("\n", 781), ("An", 3588), ("swer", 17749)),
            *((":", 29515), ("[/INST]", 4)),
        ),
        eos=2,
        special=("[INST]", "[/INST]"),
    ),
    "llama31_8b": Golden(
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        (
            *(("<|begin_of_text|>", 128000), ("<|start_header_id|>", 128006), ("system", 9125)),
            *(("<|end_header_id|>", 128007), ("\n\n", 271), ("Cut", 38766), ("ting", 1303)),
            *((" Knowledge", 33025), (" Date", 2696), (":", 25), (" December", 6790), (" ", 220)),
            *(("202", 2366), ("3", 18), ("\n", 198), ("Today", 15724), (" Date", 2696)),
            *((":", 25), (" ", 220), ("26", 1627), (" Jul", 10263), (" ", 220), ("202", 2366)),
            *(("4", 19), ("\n\n", 271), ("<|eot_id|>", 128009), ("<|start_header_id|>", 128006)),
            *(("user", 882), ("<|end_header_id|>", 128007), ("\n\n", 271), ("Where", 9241)),
            *((" is", 374), (" Ada", 52249), ("?\n", 5380), ("Answer", 16533), (":", 25)),
            *(("<|eot_id|>", 128009), ("<|start_header_id|>", 128006), ("assistant", 78191)),
            *(("<|end_header_id|>", 128007), ("\n\n", 271)),
        ),
        eos=[128001, 128008, 128009],
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>"),
    ),
    "qwen25_7b": Golden(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        (
            *(("<|im_start|>", 151644), ("system", 8948), ("\n", 198), ("You", 2610)),
            *((" are", 525), (" Q", 1207), ("wen", 16948), (",", 11), (" created", 3465)),
            *((" by", 553), (" Alibaba", 54364), (" Cloud", 14817), (".", 13), (" You", 1446)),
            *((" are", 525), (" a", 264), (" helpful", 10950), (" assistant", 17847), (".", 13)),
            *(("<|im_end|>", 151645), ("\n", 198), ("<|im_start|>", 151644), ("user", 872)),
            *(("\n", 198), ("Where", 9064), (" is", 374), (" Ada", 51149), ("?\n", 5267)),
            *(("Answer", 16141), (":", 25), ("<|im_end|>", 151645), ("\n", 198)),
            *(("<|im_start|>", 151644), ("assistant", 77091), ("\n", 198)),
        ),
        eos=[151645, 151643],
        bos_token=None,
        eos_token="<|im_end|>",
        special=("<|im_start|>",),
    ),
}
# The same tokenizer and format.
for same in ("llama31_8b_awq", "llama32_1b"):
    TEMPLATES[same], GOLDEN[same] = TEMPLATES["llama31_8b"], GOLDEN["llama31_8b"]


def settings_of(name: str) -> dict[str, Any]:
    """The model's settings as its file in conf/model states them."""
    path = Path(find("conf")) / "model" / f"{name}.yaml"
    [(_, settings)] = yaml.safe_load(path.read_text(encoding="utf-8")).items()
    return dict(settings)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The pieces of a golden prompt as a tokenizer that, like the model's own, puts BOS itself."""
    golden = GOLDEN[name]
    bytewise = not any("▁" in piece for piece, _ in golden.pieces)
    names = {*golden.special, golden.eos_token, *filter(None, [golden.bos_token])}
    into = {" ": "Ġ", "\n": "Ċ"} if bytewise else {}
    vocab = {"<unk>": 0, "</s>": 2} if not bytewise else {"<unk>": 1}
    for piece, number in golden.pieces:
        text = piece if piece in names else "".join(into.get(letter, letter) for letter in piece)
        vocab[text] = number
    made = Tokenizer(
        WordPiece(
            vocab, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=1000
        )
    )
    made.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if bytewise
        else pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    )
    made.add_special_tokens([AddedToken(each, normalized=False) for each in sorted(names)])
    if golden.bos_token:
        bos = (golden.bos_token, vocab[golden.bos_token])
        made.post_processor = processors.TemplateProcessing(
            single=f"{golden.bos_token} $A", special_tokens=[bos]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=golden.bos_token,
        eos_token=golden.eos_token,
        chat_template=TEMPLATES.get(name),
    )


def language_of(name: str, **changes: Any) -> Language:
    """The Language that a worker makes of the model's settings and this tokenizer."""
    published = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=None),
        generation_config=SimpleNamespace(eos_token_id=GOLDEN[name].eos),
    )
    read = {**models.KEYS, **settings_of(name), **changes}
    return models.language(read, tokenizer_of(name), published)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_prompt_is_the_models_own_text_and_ids(name: str) -> None:
    golden, language = GOLDEN[name], language_of(name)
    assert (language.head, language.foot) == (golden.head, golden.foot)
    cut = language.cut(BODY, Protocol(), question=0)
    assert cut.context + cut.tail == tuple(number for _, number in golden.pieces)
    assert language.length(BODY) == len(golden.pieces)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("stated", [True, False])
def test_bos_comes_once_and_first_or_never(name: str, chat: bool, stated: bool) -> None:
    language = language_of(name, **({} if stated else {"bos": None}))
    cut = language.cut(BODY, Protocol("tokens1"), question=0, chat=chat)
    ids = cut.context + cut.tail
    bos = language.tokenizer.bos_token_id
    assert (bos is None) == (name == "qwen25_7b")
    assert [at for at, number in enumerate(ids) if number == bos] == ([] if bos is None else [0])


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - {"yarn_llama2_7b_128k"}))
def test_few_shot_prompts_have_no_chat_format(name: str) -> None:
    language = language_of(name)
    framed, bare = (language.cut(BODY, Protocol(), question=0, chat=chat) for chat in (True, False))
    ids = bare.context + bare.tail
    assert ids[1 if language.bos else 0 :] == language.encode(BODY)
    assert len(ids) < len(framed.context + framed.tail)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_stated_end_tokens_are_those_of_the_model(name: str) -> None:
    stated = settings_of(name)["eos"]
    assert language_of(name).eos_ids == set(stated)
    assert language_of(name, eos=None).eos_ids == set(stated)


def test_every_model_of_a_hub_has_a_golden_prompt() -> None:
    files = (Path(find("conf")) / "model").glob("*.yaml")
    names = {path.stem for path in files}
    assert {name for name in names if settings_of(name)["source"] == "hub"} == set(GOLDEN)
