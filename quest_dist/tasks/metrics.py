"""Scores of a predicted text against references, by the definitions of LongBench and RULER.

* `f1`: overlap of token multisets after lower-casing and removing punctuation, articles and blanks.
* `rouge_l`: summary-level ROUGE-L F as the PyPI package `rouge` computes it, which published
  LongBench numbers rest on: sentences end at every full stop, words are compared with their
  punctuation and case, counts are of distinct words, and the longest common subsequence of each
  sentence pair is the one its back-tracking finds.
* `first_integer`: the passkey rule.
* `string_match_all`: RULER's; the share of the answers that the prediction holds.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lower-case, drop ASCII punctuation, then articles, and collapse blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of token precision and recall; 0 without any common token."""
    said, meant = normalise(prediction).split(), normalise(reference).split()
    common = sum((Counter(said) & Counter(meant)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(meant)
    return 2 * precision * recall / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    """Split as the package does: an all-blank sentence is one empty word, an empty one is none."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(reference: Sequence[str], said: Sequence[str]) -> set[str]:
    """Return the words of one longest common subsequence, found with the package's preferences."""
    rows, columns = len(reference), len(said)
    table = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i, word in enumerate(reference, 1):
        for j, other in enumerate(said, 1):
            same = word == other
            table[i][j] = table[i - 1][j - 1] + 1 if same else max(table[i - 1][j], table[i][j - 1])
    found, i, j = set(), rows, columns
    while i and j:
        if reference[i - 1] == said[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def rouge_l(prediction: str, reference: str) -> float:
    """Return summary-level ROUGE-L F; 0 where either text has no sentence.

    The package recurses once per word and LongBench scores its RecursionError as 0; this one has no
    such limit.
    """
    said, meant = _sentences(prediction), _sentences(reference)
    if not said or not meant:
        return 0.0
    union: set[str] = set()
    for sentence in meant:
        for other in said:
            union |= _common_words(sentence, other)
    recall = len(union) / len({word for sentence in meant for word in sentence})
    precision = len(union) / len({word for sentence in said for word in sentence})
    # The package's guard against a zero denominator; it moves every score by about 1e-8.
    return 2.0 * precision * recall / (precision + recall + 1e-8)


def first_integer(prediction: str, reference: str) -> float:
    """Return 1 where the first integer written in `prediction` is the number `reference`."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and int(found.group()) == int(reference))


METRICS: Mapping[str, Callable[[str, str], float]] = {
    "f1": f1,
    "rouge_l": rouge_l,
    "accuracy": first_integer,
}


def best(metric: str, prediction: str, answers: Sequence[str]) -> float:
    """Return the best score of `prediction` over `answers` in 0..100."""
    return 100.0 * max(METRICS[metric](prediction, answer) for answer in answers)


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of `answers` that stand anywhere in `prediction`, in 0..100; case aside."""
    said = prediction.lower()
    return 100.0 * sum(answer.lower() in said for answer in answers) / len(answers)
