"""LongBench: question answering and summaries over long contexts, by the benchmark's own rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quest_dist.tasks.metrics import best
from quest_dist.tasks.prompt import Language, Protocol, unknown
from quest_dist.tasks.prompts import FORMS
from quest_dist.tasks.sources import Form, Record, Source
from quest_dist.tasks.task import Outcome, Sample, Task

METRIC_CHOICES = ("f1", "rouge_l")


def fill(form: Form, record: Record) -> tuple[str, int]:
    """Return the prompt of a record and the character at which its question begins.

    The fields are put in by hand, since a context may itself hold braces.
    """
    before, after = form.template.split("{context}")
    after = after.replace("{input}", record["input"])
    body = before + record["context"] + after
    # Looked for outside the context, which is free to contain the marker's words.
    found = after.rfind(form.question)
    return body, len(body) - len(after) + max(found, 0)


def asked(form: Form, record: Record, body: str) -> int | None:
    """Return where in the prompt `body` the line begins that the record's input fills, if one."""
    after = form.template.split("{context}")[1]
    before, found, rest = after.partition("{input}")
    if not found:
        return None
    line = before[before.rfind("\n") + 1 :]
    return len(body) - len(rest) - len(record["input"]) - len(line)


class LongBench(Task):
    """One LongBench dataset: its prompt, length limit, answer length and metric.

    `max_new_tokens: null` takes the official number (or the generated family's own) and what the
    protocol adds to it.
    """

    def __init__(
        self,
        *,
        data: Source,
        dataset: str,
        metric: str,
        seed: int = 0,
        protocol: Mapping[str, Any] | None = None,
        samples: int | None = 10,
        max_new_tokens: int | None = None,
    ) -> None:
        """Check the settings; ValueError names the key and its choices."""
        if dataset not in FORMS:
            raise unknown("task.dataset", dataset, FORMS)
        if metric not in METRIC_CHOICES:
            raise unknown("task.metric", metric, METRIC_CHOICES)
        if samples is not None and samples < 1:
            raise ValueError(f"task.samples={samples} is below 1 (null for all)")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"task.max_new_tokens={max_new_tokens} is below 1")
        self.data, self.dataset, self.metric = data, dataset, metric
        self.seed, self.samples = seed, samples
        self.protocol = Protocol.parse(protocol)
        self.form = data.form(dataset) or FORMS[dataset]
        official = self.form.max_new_tokens + self.protocol.extra_new_tokens
        self.max_new_tokens = max_new_tokens or official

    def identity(self) -> dict[str, Any]:
        """Return the identity of the records."""
        return self.data.identity(self.dataset)

    def count(self) -> int:
        """Return the number of records, capped by `samples`."""
        there = self.data.count(self.dataset)
        if there is None:
            if self.samples is None:
                raise ValueError("task.samples=null asks for all, but generated data never ends")
            return self.samples
        return there if self.samples is None else min(there, self.samples)

    def needs(self) -> int | None:
        """Return a made prompt's size and the answer's; a real one is cut to what a model holds."""
        return None if self.data.tokens is None else self.data.tokens + self.max_new_tokens

    def sample(self, index: int, language: Language) -> Sample:
        """Build the prompt of record `index`."""
        chat = self.form.chat and self.protocol.chat

        def measure(record: Record) -> int:
            return language.length(fill(self.form, record)[0], chat=chat)

        record = self.data.record(self.dataset, index, self.seed, measure)
        body, question = fill(self.form, record)
        cut = language.cut(
            body,
            self.protocol,
            question=question,
            asked=asked(self.form, record, body),
            marker=body.rfind(self.form.marker),
            chat=chat,
            reserve=self.max_new_tokens,
        )
        if cut.truncated and self.data.form(self.dataset):
            # Text made to size has no middle to lose: the facts may be in it.
            raise ValueError(
                f"data.tokens is too much for model.max_length={language.max_length} less "
                f"{self.max_new_tokens} tokens to generate"
            )
        return Sample(
            index=index,
            context=cut.context,
            tail=cut.tail,
            answers=tuple(record["answers"]),
            max_new_tokens=self.max_new_tokens,
            truncated=cut.truncated,
            info={"record": record.get("_id"), **record.get("info", {})},
        )

    def score(self, sample: Sample, outcome: Outcome) -> float:
        """Return the best score over the reference answers, 0..100."""
        return best(self.metric, self.form.answer(outcome.text), sample.answers)
