"""LongBench v1's prompts and answer lengths, word for word, for the six tasks of the Quest paper.

From THUDM/LongBench, config/dataset2prompt.json and dataset2maxlen.json (MIT licence). Oddities
such as "asconcisely" and the blank before qasper's second instruction are the benchmark's own:
published numbers were measured with them.
"""

from __future__ import annotations

from collections.abc import Mapping

from quest_dist.tasks.sources import Form

_QASPER = (
    "Answer the question {as_above}as concisely as you can, using a single phrase or sentence if "
    "possible. If the question cannot be answered based on the information in the article, write "
    '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
    "Do not provide any explanation.\n\n"
)
_HOTPOTQA = (
    "Answer the question based on the given passages. Only give me the answer and do not output "
    "any other words.\n\n"
)

FORMS: Mapping[str, Form] = {
    "narrativeqa": Form(
        template="You are given a story, which can be either a novel or a movie script, and a "
        "question. Answer the question asconcisely as you can, using a single phrase if possible. "
        "Do not provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on "
        "the story asconcisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nQuestion: {input}\n\nAnswer:",
        marker="Do not provide",
        question="Do not provide",
        max_new_tokens=128,
    ),
    "qasper": Form(
        template="You are given a scientific article and a question. "
        + _QASPER.replace("{as_above}", "")
        + "Article: {context}\n\n "
        + _QASPER.replace("{as_above}", "based on the above article ")
        + "Question: {input}\n\nAnswer:",
        marker="Question:",
        question="Question:",
        max_new_tokens=128,
    ),
    "multifieldqa_en": Form(
        template="Read the following text and answer briefly.\n\n{context}\n\nNow, answer the "
        "following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        marker="Now,",
        question="Now,",
        max_new_tokens=64,
    ),
    "hotpotqa": Form(
        template=_HOTPOTQA
        + "The following are given passages.\n{context}\n\n"
        + _HOTPOTQA
        + "Question: {input}\nAnswer:",
        marker="Question:",
        question="Question:",
        max_new_tokens=32,
    ),
    "gov_report": Form(
        template="You are given a report by a government agency. Write a one-page summary of the "
        "report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        marker="Now,",
        question="Now,",
        max_new_tokens=512,
    ),
    # Few-shot: the released marker stands before the examples, so our tail looks for the question.
    "triviaqa": Form(
        template="Answer the question based on the given passage. Only give me the answer and do "
        "not output any other words. The following are some examples.\n\n{context}\n\n{input}",
        marker="Answer the question",
        question="Question:",
        max_new_tokens=32,
        chat=False,
        ends=("\n",),
    ),
}
