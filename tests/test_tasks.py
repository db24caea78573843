"""Tasks: samples of passkey, LongBench and PG-19, their scores, and the mistakes they refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from tiny_language import tiny_language

from quest_dist.tasks.files import Files
from quest_dist.tasks.generated import Generated
from quest_dist.tasks.longbench import LongBench, fill
from quest_dist.tasks.passkey import FILLER, KEY_LINE, OPENING, QUESTION, Passkey
from quest_dist.tasks.pg19 import PG19
from quest_dist.tasks.prompts import FORMS
from quest_dist.tasks.task import Outcome

RECORD = {"context": "Ada lives in {Rome}. Now, Question: no.", "input": "Where is Ada?"}
BIG = {"max_length": 100_000}


def write(root, task="qasper", **changes):
    record = {**RECORD, "answers": ["Rome", "in Rome"], "_id": "r1", **changes}
    (root / f"{task}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return Files(str(root))


def test_tasks_need_neither_torch_nor_transformers():
    names = "task prompt prompts metrics longbench passkey pg19 files hub generated families fit"
    names += " ruler niah variable_tracking common_words"
    names += " recall attention_map"
    code = "import sys, importlib\n"
    code += f"for n in {names.split()!r}: importlib.import_module('quest_dist.tasks.' + n)\n"
    code += "import quest_dist.models\n"
    code += "assert not {'torch', 'transformers', 'ray', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- LongBench ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_official_prompts_hold_context_and_question_once(name):
    form = FORMS[name]
    record = {"context": "CONTEXT", "input": "Question: INPUT"}
    body, question = fill(form, record)
    assert body.count("CONTEXT") == 1
    assert body.count("INPUT") == (name != "gov_report")
    assert "{" not in body
    assert body.index("CONTEXT") < question
    assert body[question:].startswith(form.question)


def test_the_question_is_found_outside_the_context_and_braces_are_kept(tmp_path):
    task = LongBench(data=write(tmp_path), dataset="qasper", metric="f1")
    language = tiny_language(**BIG, head="<s>user: ", foot="</s><s>assistant:")
    sample = task.sample(0, language)
    assert "{Rome}" in language.decode(sample.context)
    assert language.decode(sample.tail) == "Question: Where is Ada?\n\nAnswer:assistant:"
    assert sample.answers == ("Rome", "in Rome")
    assert sample.max_new_tokens == 128
    assert sample.info == {"record": "r1"}
    assert not sample.truncated


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("narrativeqa", "Do not provide any explanation.\n\nQuestion: Where is Ada?\n\nAnswer:"),
        ("hotpotqa", "Question: Where is Ada?\nAnswer:"),
        ("gov_report", "Now, write a one-page summary of the report.\n\nSummary:"),
    ],
)
def test_where_the_tail_begins(tmp_path, name, tail):
    language = tiny_language(**BIG)
    task = LongBench(data=write(tmp_path, name), dataset=name, metric="f1")
    assert language.decode(task.sample(0, language).tail) == tail


@pytest.mark.parametrize(
    ("name", "tail"),
    [
        ("narrativeqa", "Question: Where is Ada?\n\nAnswer:"),
        ("qasper", "Question: Where is Ada?\n\nAnswer:"),
        ("multifieldqa_en", "Question: Where is Ada?\nAnswer:"),
        ("hotpotqa", "Question: Where is Ada?\nAnswer:"),
        ("gov_report", "Now, write a one-page summary of the report.\n\nSummary:"),
        ("triviaqa", "Where is Ada?"),
    ],
)
def test_the_tail_of_kvpress_is_the_records_own_input(tmp_path, name, tail):
    language = tiny_language(**BIG)
    task = LongBench(
        data=write(tmp_path, name), dataset=name, metric="f1", protocol={"tail": "input"}
    )
    assert language.decode(task.sample(0, language).tail) == tail


@pytest.mark.parametrize("name", FORMS)
def test_a_protocol_may_add_to_the_official_length_of_answers(tmp_path, name):
    made = {"data": write(tmp_path, name), "dataset": name, "metric": "f1"}
    longer = {**made, "protocol": {"extra_new_tokens": 20}}
    official = {"narrativeqa": 128, "qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32}
    official |= {"gov_report": 512, "triviaqa": 32}
    language = tiny_language(**BIG)
    assert LongBench(**made).sample(0, language).max_new_tokens == official[name]
    assert LongBench(**longer).sample(0, language).max_new_tokens == official[name] + 20
    assert LongBench(**longer, max_new_tokens=7).sample(0, language).max_new_tokens == 7


def test_few_shot_prompts_are_never_framed_and_ask_at_the_last_question(tmp_path):
    ask = "Passage:\nAda lives in Rome.\nQuestion:\nWhere is Ada?\nAnswer:"
    data = write(tmp_path, "triviaqa", input=ask)
    language = tiny_language(**BIG, head="<s>user: ", foot="</s>")
    sample = LongBench(data=data, dataset="triviaqa", metric="f1").sample(0, language)
    assert language.decode(sample.context).startswith("Answer the question based on the given")
    assert language.decode(sample.tail) == "Question:\nWhere is Ada?\nAnswer:"
    released = {"tail": "released"}
    sample = LongBench(data=data, dataset="triviaqa", metric="f1", protocol=released).sample(
        0, language
    )
    assert len(language.decode(sample.tail)) in range(100, 110)


def test_chat_can_be_switched_off_by_the_protocol(tmp_path):
    language = tiny_language(**BIG, head="<s>user: ", foot="</s>")
    task = LongBench(data=write(tmp_path), dataset="qasper", metric="f1", protocol={"chat": False})
    assert language.decode(task.sample(0, language).context).startswith("You are given")


def test_a_context_that_is_too_long_is_cut_and_says_so(tmp_path):
    data = write(tmp_path, context="Nobody said a word. " * 500)
    task = LongBench(data=data, dataset="qasper", metric="f1", max_new_tokens=50)
    sample = task.sample(0, tiny_language(max_length=900))
    assert sample.truncated
    assert len(sample.context) + len(sample.tail) + 50 in (899, 900)


def test_longbench_scores(tmp_path):
    task = LongBench(data=write(tmp_path), dataset="qasper", metric="f1")
    sample = task.sample(0, tiny_language(**BIG))
    assert task.score(sample, Outcome(" In Rome.")) == 100.0
    assert task.score(sample, Outcome("\n\nRome\nor so")) == 50.0
    data = write(tmp_path, "triviaqa", input="Question:\nWhere?\nAnswer:")
    task = LongBench(data=data, dataset="triviaqa", metric="f1")
    sample = task.sample(0, tiny_language(**BIG))
    assert task.score(sample, Outcome("\n\nRome\nPassage: more")) == 100.0


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"dataset": "qaspr"}, r"task.dataset='qaspr'.*did you mean 'qasper'"),
        ({"metric": "rouge"}, r"task.metric='rouge'.*did you mean 'rouge_l'"),
        ({"samples": 0}, "task.samples=0"),
        ({"max_new_tokens": 0}, "task.max_new_tokens=0"),
        ({"protocol": {"tail": "x"}}, "protocol.tail"),
    ],
)
def test_longbench_mistakes(tmp_path, settings, match):
    given = {"data": write(tmp_path), "dataset": "qasper", "metric": "f1", **settings}
    with pytest.raises(ValueError, match=match):
        LongBench(**given)


def test_all_samples_of_endless_data_are_refused():
    task = LongBench(data=Generated(), dataset="qasper", metric="f1", samples=None)
    with pytest.raises(ValueError, match="never ends"):
        task.count()


def test_samples_cap_what_the_data_holds(tmp_path):
    data = write(tmp_path)
    assert LongBench(data=data, dataset="qasper", metric="f1", samples=10).count() == 1
    assert LongBench(data=Generated(), dataset="qasper", metric="f1", samples=7).count() == 7


# --- passkey -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [400, 1000])
@pytest.mark.parametrize("chat", [False, True])
def test_passkey_meets_its_length_within_a_sentence(length, chat):
    language = tiny_language(head="<s>user: ", foot="</s><s>assistant:")
    longest = max(len(language.encode(" " + sentence)) for sentence in FILLER)
    for index in range(10):
        sample = Passkey(length=length, chat=chat).sample(index, language)
        size = len(sample.context) + len(sample.tail)
        assert length - longest < size <= length
        assert sample.info["length"] == size


def test_passkey_text():
    language = tiny_language()
    sample = Passkey(length=600).sample(3, language)
    text = language.decode(sample.context + sample.tail)
    key = sample.info["key"]
    assert sample.answers == (str(key),)
    assert 10_000 <= key <= 99_999
    assert text.startswith(OPENING + "\n" + FILLER[0])
    assert text.count(KEY_LINE.format(key=key)) == 1
    assert language.decode(sample.tail) == QUESTION
    assert text.index(KEY_LINE[:12]) / len(text) == pytest.approx(sample.info["depth"], abs=0.1)


def test_passkey_depths_cycle_and_keys_differ_and_are_stable():
    language = tiny_language()
    task = Passkey(length=300)
    samples = [task.sample(i, language) for i in range(20)]
    depths = [s.info["depth"] for s in samples]
    assert depths[:10] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert depths[10:] == depths[:10]
    assert len({s.answers for s in samples}) == 20
    assert Passkey(length=300, samples=99).sample(7, language) == samples[7]
    assert Passkey(length=300, seed=1).sample(7, language).answers != samples[7].answers
    # Golden: a change here means every stored passkey result names another key.
    assert [s.info["key"] for s in samples[:3]] == [31062, 69672, 32731]


def test_released_passkey_tail_is_400_characters():
    language = tiny_language()
    sample = Passkey(length=1000, protocol={"tail": "released"}).sample(0, language)
    assert len(language.decode(sample.tail)) in range(400, 420)


def test_text_made_to_size_is_never_cut():
    short = tiny_language(max_length=980)
    with pytest.raises(ValueError, match=r"takes 1005 tokens, more than model\.max_length=980"):
        Passkey(length=995).sample(0, short)
    task = LongBench(data=Generated(1000), dataset="qasper", metric="f1")
    with pytest.raises(ValueError, match=r"data\.tokens is too much for model\.max_length=980"):
        task.sample(0, short)


def test_passkey_scores_and_mistakes():
    language = tiny_language()
    task = Passkey(length=300)
    sample = task.sample(0, language)
    assert task.score(sample, Outcome(f" {sample.answers[0]}. Remember")) == 100.0
    assert task.score(sample, Outcome(" 1")) == 0.0
    for wrong in ({"samples": 0}, {"length": 5}, {"depths": 0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Passkey(**wrong)


# --- PG-19 -------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    for name, word in (("a", "first"), ("b", "second")):
        text = "\n\n".join(f"{word} {i} nobody said a word" for i in range(400))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    return Files(str(tmp_path))


def test_pg19_takes_the_beginning_of_every_book_first(library):
    language = tiny_language()
    task = PG19(data=library, prefill=100, tokens=50, samples=100)
    samples = [task.sample(i, language) for i in range(task.count())]
    assert [s.info["book"] for s in samples[:4]] == ["a", "b", "a", "b"]
    assert language.decode(samples[0].context).startswith("first 0 nobody")
    assert len({s.context for s in samples}) == len(samples)
    for sample in samples:
        assert len(sample.context) == 100
        assert len(sample.tail) == 51  # the first of them is predicted by the prefill
        assert sample.score_tail
        assert sample.max_new_tokens == 0


def test_pg19_without_prefill_decodes_all_but_one(library):
    task = PG19(data=library, prefill=0, tokens=50)
    assert len(task.sample(0, tiny_language()).context) == 1
    assert task.sample(0, tiny_language(bos=0)).context == (0,)


def test_pg19_score_is_the_mean(library):
    task = PG19(data=library, prefill=10, tokens=3)
    sample = task.sample(0, tiny_language())
    assert task.score(sample, Outcome("", nll=(1.0, 2.0, 6.0))) == 3.0


def test_pg19_mistakes(library):
    with pytest.raises(ValueError, match="tokens=0"):
        PG19(data=library, tokens=0)
    with pytest.raises(ValueError, match="no book has"):
        PG19(data=library, prefill=10**6).count()
    with pytest.raises(ValueError, match=r"more than model.max_length=150"):
        PG19(data=library, prefill=100, tokens=50).sample(0, tiny_language(max_length=150))
