"""Metrics: hand-derived values, and the package `rouge` where it is installed."""

from __future__ import annotations

import importlib.util
import random

import pytest

from quest_dist.tasks.metrics import best, f1, first_integer, normalise, rouge_l, string_match_all


def test_normalise():
    assert normalise("The  Quick, brown (fox)!\nAn ape's a.") == "quick brown fox apes"
    assert normalise("theatre an-the") == "theatre anthe"  # punctuation goes before articles


@pytest.mark.parametrize(
    ("said", "meant", "expected"),
    [
        ("the cat", "cat", 1.0),
        ("cat sat", "cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat dog", "cat dog dog", 2 / 3),  # two common of three and three
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("a the", "an", 0.0),  # nothing is left of either
        ("Paris, France.", "paris", 2 / 3),
    ],
)
def test_f1(said, meant, expected):
    assert f1(said, meant) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("said", "meant", "recall", "precision"),
    [
        ("a b c", "a b c", 1, 1),
        ("a b x y z", "a b c d e", 2 / 5, 2 / 5),
        # The definition's own example: the union over two sentences is {w1, w2, w3, w5}.
        ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 4 / 5, 4 / 8),
        ("a a a", "a", 1, 1),  # distinct words are counted
        ("b a", "a b", 1 / 2, 1 / 2),  # the subsequence keeps the order
        ("A b", "a b", 1 / 2, 1 / 2),  # case counts
        ("a b.", "a b", 1, 1),  # a full stop only ends the sentence
        ("a b,", "a b", 1 / 2, 1 / 2),  # other punctuation belongs to its word
    ],
)
def test_rouge_l(said, meant, recall, precision):
    expected = 2 * recall * precision / (recall + precision + 1e-8)
    assert rouge_l(said, meant) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("said", "meant"), [("", "a"), ("...", "a"), ("a", ""), ("a", ".")])
def test_rouge_l_without_a_sentence_is_zero(said, meant):
    assert rouge_l(said, meant) == 0.0


@pytest.mark.skipif(not importlib.util.find_spec("rouge"), reason="package rouge is not installed")
def test_rouge_l_equals_the_package():
    from rouge import Rouge

    rng = random.Random(3)
    texts = [" ", "a. .b", "one\ttwo.  three\n. four", "x" * 40, ". a"]
    texts += [
        " ".join(
            rng.choice(["a", "b", "c.", "d", "e,", ". ", "f\n"]) for _ in range(rng.randint(1, 30))
        )
        for _ in range(60)
    ]
    for said in texts:
        for meant in texts[:20]:
            try:
                expected = Rouge().get_scores([said], [meant], avg=True)["rouge-l"]["f"]
            except Exception:  # LongBench scores whatever the package refuses as 0
                expected = 0.0
            assert rouge_l(said, meant) == pytest.approx(expected, abs=1e-9), (said, meant)


@pytest.mark.parametrize(
    ("said", "key", "expected"),
    [
        (" 71432. Remember", "71432", 1),
        ("7143 2", "71432", 0),
        ("none", "1", 0),
        ("x071432", "71432", 1),
    ],
)
def test_first_integer(said, key, expected):
    assert first_integer(said, key) == expected


def test_best_takes_the_best_answer_in_percent():
    assert best("f1", "cat sat", ("dog", "cat", "cat sat")) == 100.0
    assert best("f1", "x", ("dog",)) == 0.0


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("1234567 and 89", ("1234567", "89"), 100),
        ("1234567", ("1234567", "89", "ab", "cd"), 25),
        ("Ab, CD", ("aB", "cd"), 100),  # case does not count
        ("x1234567x", ("1234567",), 100),  # anywhere in the text
        ("123456", ("1234567",), 0),
        ("", ("a",), 0),
    ],
)
def test_string_match_all_is_the_share_of_the_answers_found(said, answers, expected):
    assert string_match_all(said, answers) == expected
