"""Prompts: one tokenisation, split where the protocol says, cut in the middle, framed by data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml
from tiny_language import tiny_language, tiny_tokenizer

from quest_dist import bundled
from quest_dist.folders import find
from quest_dist.tasks.files import Files
from quest_dist.tasks.longbench import LongBench
from quest_dist.tasks.prompt import Protocol, chat_format

BODY = (
    "Read this.\n\nThe road went on over the hills. Nobody said a word.\n\n"
    "Question: where?\nAnswer:"
)
ASK = BODY.index("Question:")
FRAME = {"head": "<s>user: ", "foot": "</s><s>assistant:"}


@pytest.mark.parametrize(
    "tail", ["question", "released", "chars7", "chars40", "tokens1", "tokens9"]
)
@pytest.mark.parametrize("frame", [{}, FRAME])
@pytest.mark.parametrize("bos", [None, 0])
def test_context_and_tail_are_the_ids_of_one_prompt(tail, frame, bos):
    language = tiny_language(bos=bos, **frame)
    cut = language.cut(BODY, Protocol(tail), question=ASK)
    text = language.head + BODY + language.foot
    opening = () if bos is None or text.startswith("<s>") else (bos,)
    assert cut.context + cut.tail == opening + language.encode(text)
    assert cut.tail
    assert not cut.truncated


def test_question_tail_begins_at_the_question_and_ends_with_the_chat_format():
    language = tiny_language(**FRAME)
    cut = language.cut(BODY, Protocol(), question=ASK)
    raw = language.tokenizer.decode(list(cut.tail), skip_special_tokens=False)
    assert raw == "Question: where?\nAnswer:</s><s>assistant:"


def test_character_tail_counts_the_chat_format_and_stops_at_the_marker():
    language = tiny_language(**FRAME)
    size = len(FRAME["foot"]) + 8

    def tail(rule, marker=-1):
        cut = language.cut(BODY, Protocol(rule), question=ASK, marker=marker)
        return language.tokenizer.decode(list(cut.tail), skip_special_tokens=False)

    assert tail(f"chars{size}").endswith("\nAnswer:</s><s>assistant:")
    assert tail("chars400", marker=ASK) == "Question: where?\nAnswer:</s><s>assistant:"
    assert tail("released") == tail("chars100")


def test_a_token_across_the_seam_belongs_to_the_tail():
    language = tiny_language()
    whole = language.encode(BODY)
    for at in range(1, len(BODY)):
        cut = language.cut(BODY, Protocol(), question=at)
        seam = len(language.decode(cut.context))
        first = language.decode(whole[: len(cut.context) + 1])
        assert seam <= at < len(first) or len(cut.tail) == 1 or len(cut.context) == 1


@pytest.mark.parametrize("tail", ["question", "tokens1"])
def test_a_long_prompt_loses_its_middle_and_keeps_chat_format_and_question(tail):
    language = tiny_language(max_length=101, **FRAME)
    body = "Begin here. " + "Nobody said a word for a long time. " * 50 + "Question: what?"
    cut = language.cut(body, Protocol(tail), question=body.rindex("Question:"), reserve=20)
    ids = cut.context + cut.tail
    whole = language.encode(language.head + body + language.foot)
    framed = len(language.encode(language.head)) + len(language.encode(language.foot))
    half = (101 - 20 - framed) // 2
    assert cut.truncated
    assert len(ids) == framed + 2 * half
    first = len(language.encode(language.head)) + half
    assert ids == whole[:first] + whole[-(len(ids) - first) :]
    if tail == "question":
        assert language.decode(cut.tail).startswith("Question: what?")


def test_the_benchmarks_own_limit_counts_bos_but_not_the_chat_format():
    body = "Nobody said a word. " * 40
    plain = tiny_language(max_prompt=31, bos=0)
    cut = plain.cut(body, Protocol("tokens1"), question=0)
    assert len(cut.context + cut.tail) == 30  # two halves of 15
    framed = tiny_language(max_prompt=31, **FRAME)
    cut = framed.cut(body, Protocol("tokens1"), question=0)
    frame = len(framed.encode(framed.head)) + len(framed.encode(framed.foot))
    assert len(cut.context + cut.tail) == 30 + frame


def test_a_question_longer_than_half_the_limit_keeps_a_context():
    language = tiny_language(max_length=60)
    body = "Start. " + "Question: " + "why? " * 200
    cut = language.cut(body, Protocol(), question=7, reserve=10)
    assert cut.truncated
    assert cut.context
    assert len(cut.context + cut.tail) == 50


@pytest.mark.parametrize("tail", ["question", "input", "chars9", "chars90", "tokens1", "tokens30"])
@pytest.mark.parametrize("frame", [{"bos": 0}, FRAME])
def test_head_keeps_the_beginning_the_whole_question_and_the_tail(tail, frame):
    language = tiny_language(max_length=101, max_prompt=70, **frame)
    body = "Begin here. " + "Nobody said a word for a long time. " * 50 + "Question: what?\nAnswer:"
    question = body.rindex("Question:")
    cut = language.cut(body, Protocol(tail, truncation="head"), question=question, reserve=20)
    free = tiny_language(**frame).cut(body, Protocol(tail), question=question)
    ids, whole = cut.context + cut.tail, free.context + free.tail
    framed = len(language.encode(language.head)) + len(language.encode(language.foot))
    assert cut.truncated
    assert len(ids) == framed + min(70, 101 - 20 - framed)
    assert cut.tail == free.tail
    asked = free.context + free.tail
    kept = max(len(cut.tail), len(language.encode(body[question:] + language.foot)))
    assert ids[-kept:] == asked[-kept:]
    assert ids[:-kept] == whole[: len(ids) - kept]


def test_head_never_cuts_into_the_question_to_make_room():
    language = tiny_language(max_length=60, bos=0)
    body = "Start. " + "Question: " + "why? " * 200
    with pytest.raises(ValueError, match=r"leaves no room .* a question of \d+ tokens"):
        language.cut(body, Protocol(truncation="head"), question=7, reserve=10)


def test_truncation_can_be_forbidden_and_can_be_impossible():
    body = "Nobody said a word. " * 40
    with pytest.raises(ValueError, match=r"truncation=error"):
        tiny_language(max_length=50).cut(body, Protocol(truncation="error"), question=0)
    with pytest.raises(ValueError, match="leaves no room"):
        tiny_language(max_length=50, bos=0).cut(body, Protocol(), question=0, reserve=48)


def test_bos_is_not_doubled_where_a_chat_template_writes_it():
    assert tiny_language(bos=0).opening("text") == (0,)
    assert tiny_language(bos=0).opening("<s>text") == ()
    assert tiny_language(bos=None).opening("text") == ()


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", ("", "")),
        ("llama2", ("[INST]", "[/INST]")),
        (
            "vicuna",
            (
                "A chat between a curious user and an artificial intelligence assistant. The "
                "assistant gives helpful, detailed, and polite answers to the user's questions. "
                "USER: ",
                " ASSISTANT:",
            ),
        ),
        ("template", ("<s>user: ", "</s><s>assistant:")),
        ({"head": "Q ", "foot": " A"}, ("Q ", " A")),
    ],
)
def test_chat_formats(choice, expected):
    assert chat_format(choice, tiny_tokenizer()) == expected


def test_chat_format_mistakes():
    with pytest.raises(ValueError, match=r"did you mean 'vicuna'"):
        chat_format("vicunna", tiny_tokenizer())
    with pytest.raises(ValueError, match="head and foot"):
        chat_format({"head": ""}, tiny_tokenizer())
    with pytest.raises(ValueError, match="carries no chat template"):
        chat_format("template", object())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tail": "questions"}, r"protocol.tail='questions'.*did you mean 'question'"),
        ({"tail": "chars0"}, "protocol.tail"),
        ({"truncation": "midle"}, "did you mean 'middle'"),
        ({"chat": "yes"}, "protocol.chat='yes' is not true or false"),
        ({"extra_new_tokens": -1}, "protocol.extra_new_tokens=-1 is not a whole number from 0 up"),
        ({"extra_new_tokens": True}, "protocol.extra_new_tokens=True"),
        (
            {"trunkation": "head"},
            r"protocol.trunkation: no such setting; did you mean 'truncation'",
        ),
    ],
)
def test_protocol_mistakes(settings, match):
    with pytest.raises(ValueError, match=match):
        Protocol.parse(settings)


def test_protocol_ignores_what_is_not_about_prompts():
    settings = {"label": "x", "about": "y", "dense_layers": 0, "tail": "chars100"}
    assert Protocol.parse(settings) == Protocol("chars100")


@pytest.fixture(scope="module")
def smollm():
    """The bundled model's Language (converted once into the user's cache)."""
    try:
        bundled.weights()
    except ValueError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled.folder())
    head, foot = chat_format("template", tokenizer)
    return tiny_language(tokenizer=tokenizer, head=head, foot=foot)


def test_golden_tokens_of_the_bundled_model(smollm):
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert smollm.head == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    assert smollm.foot == "<|im_end|>\n<|im_start|>assistant\n"
    assert smollm.encode("Hello there 12345.\n\nNow,") == (
        *(19556, 665, 216, 33, 34, 35, 36, 37, 30, 198, 198, 2696, 28),
    )
    cut = smollm.cut("The pass key is 71432.\nWhat is it?", Protocol(), question=23)
    assert cut.context[:3] == (1, 9690, 198)
    assert cut.tail == (1780, 314, 357, 47, 2, 198, 1, 520, 9531, 198)


FIRST = (1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365)
FIRST += (3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2)
# "Question: Which corpora are used?", "Answer:", the end of the turn, the assistant's beginning.
ASKED = (17872, 42, 10366, 5808, 81, 359, 804, 47, 198, 198, 21350, 42, 2, 198, 1, 520, 9531, 198)
WHOLE, CUT = (198, 198, *ASKED), (39, 34, *ASKED)  # before it the instructions' end, or a table's


@pytest.mark.parametrize(
    ("name", "limit", "context", "tail", "new", "last"),
    [
        ("quest_paper", 8192, 2962, 18, 128, WHOLE),
        ("quest_paper", 1200, 1054, 18, 128, WHOLE),
        ("quest_released", 8192, 2962, 18, 128, WHOLE),
        ("quest_released", 1200, 1054, 18, 128, WHOLE),
        ("longbench_official", 8192, 2979, 1, 128, WHOLE),
        ("longbench_official", 1200, 1071, 1, 128, WHOLE),
        ("kvpress", 8192, 2962, 18, 148, WHOLE),
        ("kvpress", 1200, 1034, 18, 148, CUT),
    ],
)
def test_golden_tokens_of_a_qasper_prompt(smollm, tmp_path, name, limit, context, tail, new, last):
    text = " ".join(f"Table {n} lists the words of corpus {n}." for n in range(200))
    record = {"context": text, "input": "Which corpora are used?", "answers": ["all"]}
    (tmp_path / "qasper.jsonl").write_text(json.dumps(record), encoding="utf-8")
    protocol = yaml.safe_load((find("conf") / "protocol" / f"{name}.yaml").read_text())
    task = LongBench(data=Files(str(tmp_path)), dataset="qasper", metric="f1", protocol=protocol)
    sample = task.sample(0, replace(smollm, max_length=limit))
    ids = sample.context + sample.tail
    assert (ids[:20], ids[-20:]) == (FIRST, last)
    found = (len(sample.context), len(sample.tail), sample.max_new_tokens, sample.truncated)
    assert found == (context, tail, new, limit == 1200)


def test_every_protocol_has_a_golden_prompt():
    marked = test_golden_tokens_of_a_qasper_prompt.pytestmark[0].args[1]
    names = {path.stem for path in (find("conf") / "protocol").glob("*.yaml")}
    assert {case[0] for case in marked} == names


def test_the_beginning_of_the_answer_stands_behind_the_chat_format_and_is_never_cut():
    language = tiny_language(max_length=60, head="<s>user: ", foot="</s><s>assistant:")
    body = "Nobody said a word. " * 40
    cut = language.cut(body, Protocol(), question=len(body), begun=" The word is", reserve=10)
    assert cut.truncated
    assert language.decode(cut.context + cut.tail).endswith("assistant: The word is")
    assert len(cut.context) + len(cut.tail) + 10 <= 60
    plain = language.length(body, chat=False)
    assert language.length(body, chat=False, begun=" is") > plain
